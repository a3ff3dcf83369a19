"""The denominator of each compiled loss, with which micro-batches add up exactly.

A compiled loss on micro-batch k is a numerator over a denominator. On the batch it is

    sum_k num_k / sum_k den_k  =  sum_k (den_k / sum_i den_i) * (num_k / den_k)

So the numerators of all micro-batches are divided by one number, the batch's
denominator, and a micro-batch with denominator 0 adds nothing. An update multiplies the
whole loss of a micro-batch by its share of the examples, `share_k`. The *factors* here
undo that for the compiled losses:

    total = sum_k share_k * (sum_j factor_jk * num_jk + additional losses)
    factor_jk = 1 / sum_i den_ji / share_k

If denominators are proportional to the numbers of examples, Keras's own loss of the
micro-batch replaces the numerator, and the factor is 1.

Additional losses (regularizers, `add_loss`) have no factor: they count once an update,
as means over examples do.

If a model has one compiled loss and no other, the update need not know its denominator
first: the pass that computes a micro-batch's numerator computes its denominator too,
and the sums are divided in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradient_accumulator.compat import CompiledLoss, CompiledModel, internals
from gradient_accumulator.compat.api import keras, ops
from gradient_accumulator.coupling import shape_of
from gradient_accumulator.microbatches import (
    is_number,
)

# The kinds of losses differ in the denominator.
ADDITIVE = "additive"  # there is none: micro-batches add up
BY_EXAMPLES = "by_examples"  # it is the number of examples: the loss is a mean
NORMALIZED = "normalized"  # it is measured, before the first micro-batch
DIVIDED_LAST = "divided_last"  # it is measured, and divides after the last micro-batch


def kind(loss: keras.losses.Loss) -> str:
    """The kind of a loss: how its values on micro-batches add up to that on the batch.

    If the class of a loss overrides `__call__`, its reduction is not known, and the
    loss of a micro-batch is weighted by its examples. This also holds for a loss
    without reduction, whose values the optimizer sums.
    """
    if type(loss).__call__ is not keras.losses.Loss.__call__:
        return BY_EXAMPLES
    if loss.reduction == "sum":
        return ADDITIVE
    if loss.reduction in (None, "none"):
        return BY_EXAMPLES
    return NORMALIZED


class Denominator:
    """A stand-in for a compiled loss, which measures what the loss would divide by.

    Calling it returns 0. The call uses only the mask and the shape of the predictions,
    so that a compiler drops the rest of the forward pass. Afterwards it has:

    Attributes:
        kind: The loss's kind.
        value: The denominator of a `NORMALIZED` loss, a scalar tensor or a number.
        rank: The number of axes of the loss's values before they are reduced.
        varies: Whether micro-batches of one shape can have different denominators.
        by_predictions: Whether these depend on the values or the mask of predictions.
        by_one_weight: Whether plain Keras would divide by a sample weight that is one
            number, the weight of every example.
    """

    def __init__(self, loss: keras.losses.Loss):
        self.loss = loss
        self.kind = kind(loss)
        self.value: Any = None
        self.rank = 0
        self.varies = False
        self.by_predictions = False
        self.by_one_weight = False

    def __call__(self, y_true, y_pred, sample_weight=None):
        if self.kind == NORMALIZED:
            self._measure(y_true, y_pred, sample_weight)
        return ops.zeros((), CompiledLoss(self.loss).dtype)

    def _measure(self, y_true, y_pred, sample_weight):
        values = CompiledLoss(self.loss).values(y_true, y_pred)
        self.rank = len(values.shape)
        if self.rank == 1 and not _is_of_each(values, y_pred):
            self.rank = 2  # a value for each time step, for example
        if self.rank == 0:
            # The loss has one value for all examples, which has no denominator.
            self.kind = BY_EXAMPLES
            return
        masked = internals.get_mask(y_pred) is not None
        by_weights = (
            self.loss.reduction == "mean_with_sample_weight"
            and sample_weight is not None
        )
        by_mask = masked or internals.get_mask(values) is not None
        self.varies = by_mask or by_weights
        # A mask gives each value its own weight.
        self.by_one_weight = by_weights and not by_mask and is_number(sample_weight)
        # A user's own loss may take its mask from anywhere.
        self.by_predictions = masked or not CompiledLoss(self.loss).is_keras_own
        if self.varies:
            self.value = CompiledLoss(self.loss).denominator(
                values, y_true, y_pred, sample_weight
            )
        else:
            self.value = _size(values, y_true)


class _Inspected(Denominator):
    """A `Denominator` that also calls a loss of the kind `BY_EXAMPLES`, for its `rank`.

    Attributes:
        arguments: The shapes of the loss's targets and predictions.
        hides_weights: Whether a mask or weights may change what the loss divides by, in
            a way that is not known.
    """

    arguments: tuple = (None, None)
    hides_weights = False

    def __call__(self, y_true, y_pred, sample_weight=None):
        self.arguments = tuple(
            keras.tree.map_structure(shape_of, each) for each in (y_true, y_pred)
        )
        if self.kind == BY_EXAMPLES:
            self.rank = len(self.loss(y_true, y_pred, sample_weight).shape)
            self.hides_weights = self.loss.reduction not in (None, "none", "sum") and (
                internals.get_mask(y_pred) is not None
                or (
                    self.loss.reduction == "mean_with_sample_weight"
                    and sample_weight is not None
                )
            )
        return super().__call__(y_true, y_pred, sample_weight)


def _is_of_each(values, y_pred):
    """Whether there may be one value for each example, by the shapes."""
    predictions = keras.tree.flatten(y_pred)[0]
    count = predictions.shape[0] if len(predictions.shape) else None
    return None in (count, values.shape[0]) or count == values.shape[0]


def _size(values, y_true):
    # The shape of the values may need a forward pass, that of the targets does not. The
    # targets may have more axes of fixed length, which change no factor.
    shape = tuple(getattr(y_true, "shape", ()))
    rank = len(values.shape)
    if shape[:rank] == tuple(values.shape) and None not in shape[rank:]:
        values = y_true
    size = 1
    for length in ops.shape(values):
        size = size * length
    return size


def dtype() -> str:
    """The dtype of shares, denominators and factors."""
    return "float64" if keras.config.floatx() == "float64" else "float32"


def factors(denominators, shares, kinds: Sequence[str], totals=None):
    """The factor of each loss in each micro-batch, by the formula above.

    Args:
        denominators: Float tensor of shape `(microbatches, losses)`, of which only the
            values of `NORMALIZED` losses are used. None if there is no such loss.
        shares: Float tensor of shape `(microbatches,)`.
        kinds: The `kind` of each loss.
        totals: Float tensor of shape `(losses,)`, the sums of the denominators over
            the micro-batches of all processes. None if there is one process.

    Returns:
        Float tensor of shape `(microbatches, losses)`. A loss whose denominator is 0 on
        the batch has factor 0.
    """
    shares = ops.expand_dims(shares, axis=1)
    additive = 1 / shares
    normalized = additive
    if denominators is not None:
        if totals is None:
            totals = ops.sum(denominators, axis=0)
        normalized = ops.divide_no_nan(1.0, totals * shares)
    by_examples = ops.convert_to_tensor([[k == BY_EXAMPLES for k in kinds]])
    additives = ops.convert_to_tensor([[k == ADDITIVE for k in kinds]])
    return ops.where(by_examples, 1.0, ops.where(additives, additive, normalized))


class Weighing:
    """Replaces the compiled losses of a micro-batch by their weighted numerators.

    Calling it with a loss returns a function that replaces the loss. After the
    micro-batch, `denominator` is the denominator of a `DIVIDED_LAST` loss, or 0.

    Args:
        kinds: The `kind` of each call of a loss. A model's own `compute_loss` may call
            a loss several times, or not at all.
        factors: The micro-batch's factor for each call.
    """

    def __init__(self, kinds: Sequence[str], factors: Sequence):
        self._waiting = iter(zip(kinds, factors))
        self.denominator: Any = 0.0

    def __call__(self, loss: keras.losses.Loss) -> Callable:
        def value(y_true, y_pred, sample_weight=None):
            kind, factor = self._next()
            given = y_true, y_pred, sample_weight
            if kind == BY_EXAMPLES:
                value = loss(*given)
            elif kind == DIVIDED_LAST:
                value, denominator = CompiledLoss(loss).numerator_and_denominator(
                    *given
                )
                self.denominator = ops.stop_gradient(ops.cast(denominator, dtype()))
            else:
                value = CompiledLoss(loss).numerator(*given)
            return value * ops.cast(factor, value.dtype)

        return value

    def _next(self):
        try:
            return next(self._waiting)
        except StopIteration:
            raise ValueError(
                "A model's own `compute_loss` must call its compiled losses equally "
                "often in every micro-batch. Received: one call more"
            ) from None


def correction(expected: Any, found: Any) -> Any:
    """The factor for sums that were divided by `expected` instead of `found`.

    Args:
        expected: The number of examples by which numerators were divided.
        found: The right denominator. If it is 0, the factor is 0.
    """
    return ops.divide_no_nan(ops.cast(expected, dtype()), ops.cast(found, dtype()))


def measure(model, data, y_pred, stand_in=Denominator) -> list[Denominator]:
    """The denominators of the compiled losses, one for each call of a loss."""
    x, y, sample_weight = CompiledModel(model).unpack(data)
    return CompiledModel(model).stand_ins(stand_in, (x, y, y_pred, sample_weight))


@dataclass
class Losses:
    """The facts about a model's losses that are known before the first micro-batch.

    Args:
        denominators: The denominators of the compiled losses.
        need_shares: Whether a micro-batch's own pass must know its share, because no
            correction at the end would give the batch's values.
        alone: Whether the model's loss consists of compiled losses only.
    """

    denominators: list[Denominator]
    need_shares: bool
    alone: bool = False

    def kinds(self, even: bool) -> tuple[str, ...]:
        """The compiled losses' kinds in an update.

        Args:
            even: Whether all micro-batches have one shape, except for the number of
                examples.
        """
        kinds = tuple(
            # The number of values is proportional to the number of examples.
            BY_EXAMPLES
            if d.kind == NORMALIZED and not d.varies and (even or d.rank == 1)
            else d.kind
            for d in self.denominators
        )
        if kinds == (NORMALIZED,) and self.alone and not self.need_shares:
            return (DIVIDED_LAST,)
        return kinds

    def one_by_one(self, even: bool) -> bool:
        """Whether a micro-batch can be trained on before the next ones are known."""
        return not self.need_shares and set(self.kinds(even)) <= {
            BY_EXAMPLES,
            DIVIDED_LAST,
        }

    def check_cut(self) -> None:
        """Raise if the micro-batches of a batch cannot be exact."""
        if any(d.by_one_weight for d in self.denominators):
            raise ValueError(
                "A loss with `reduction='mean_with_sample_weight'` divides by the "
                "weight of a batch, and is no mean if this weight is one number. Give "
                "a weight for each example, or give the micro-batches themselves "
                "(`accum_steps`), each with one number. "
                "Received: a sample weight of shape ()"
            )

    @property
    def by_predictions(self) -> bool:
        """Whether denominators depend on the values or the mask of predictions."""
        return any(d.by_predictions for d in self.denominators)


def inspect(
    model,
    data,
    scope=internals.StatelessScope,
    trace: Callable = internals.compute_output_spec,
    training: bool = True,
) -> Losses:
    """Finds the facts about a model's losses by a call with symbolic tensors.

    Args:
        model: A compiled and built model.
        data: A micro-batch, as nested `keras.KerasTensor`s.
        scope: Function that returns a stateless scope in which the model's variables
            have values.
        trace: Function that calls a function with the data, without any effect.
        training: Whether to call the model in training, in which it may add losses.
    """
    found = Losses([], need_shares=CompiledModel(model).rounds_or_overwrites)

    def run(data):
        x, y, sample_weight = CompiledModel(model).unpack(data)
        with scope(collect_losses=True):
            y_pred = CompiledModel(model).forward(x, training)
            additional = list(model.losses)
            # Losses with axes are summed, by Keras or by TensorFlow.
            found.need_shares |= any(len(loss.shape) for loss in additional)
            if CompiledModel(model).has_compiled_losses:
                found.denominators = measure(model, data, y_pred, _Inspected)
                found.need_shares |= CompiledModel(model).records_shares(y) or any(
                    d.kind == BY_EXAMPLES and d.rank for d in found.denominators
                )
            found.alone = (
                training
                and not additional
                and CompiledModel(model).compiled_loss_is_all
            )
            if CompiledModel(model).may_average_numbers(y_pred):
                found.need_shares |= not training or CompiledModel(
                    model
                ).averages_numbers((x, y, y_pred, sample_weight), additional)
        return ops.zeros(())

    trace(run, data)
    return found


def values(denominators: list[Denominator]):
    """The denominators as a tensor of shape `(losses,)`; 1 for a loss without one."""
    return ops.stack(
        [ops.cast(1 if d.value is None else d.value, dtype()) for d in denominators]
    )
