"""What each compiled loss is divided by, and how that joins micro-batches exactly.

A compiled loss on micro-batch k is a numerator over a denominator. The batch's is

    sum_k num_k / sum_k den_k  =  sum_k (den_k / sum_i den_i) * (num_k / den_k)

so that all micro-batches' numerators need one number only, the batch's denominator, and
a micro-batch without weight no division at all. The engine weighs a micro-batch's whole
loss by its share of the examples, `share_k`; the *factors* here take that off the
compiled losses:

    total = sum_k share_k * (sum_j factor_jk * num_jk + additional losses)
    factor_jk = 1 / sum_i den_ji / share_k

Where every micro-batch's denominator is as large as its share says, Keras's own loss of
the micro-batch takes the numerator's place, and the factor is 1.

Additional losses (regularizers, `add_loss`) then count once an update, as means over
examples do.

Where one compiled loss is all that there is, its denominator need not be known before:
the pass that computes a micro-batch's numerator gives its denominator too, and what was
summed is divided in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from gradient_accumulator import notices
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras, ops
from gradient_accumulator.coupling import shape_of
from gradient_accumulator.microbatches import (
    Microbatches,
    first_input,
    is_number,
    map_leaves,
)

# The kinds of denominators, as far as a reduction's name tells them.
ADDITIVE = "additive"  # nothing: micro-batches add up
BY_EXAMPLES = "by_examples"  # the loss cannot be taken apart
NORMALIZED = "normalized"  # a number that each micro-batch has its own of
DIVIDED_LAST = "divided_last"  # the same, divided by when all micro-batches are done


def kind(loss: keras.losses.Loss) -> str:
    """How the value of `loss` on a batch comes from its values on micro-batches.

    A loss whose class overrides `__call__` keeps its reduction to itself, so its
    micro-batches weigh by their examples. So does one without reduction, whose values
    the optimizer sees summed."""
    if type(loss).__call__ is not keras.losses.Loss.__call__:
        return BY_EXAMPLES
    if loss.reduction == "sum":
        return ADDITIVE
    if loss.reduction in (None, "none"):
        return BY_EXAMPLES
    return NORMALIZED


class Denominator:
    """Stands in for a compiled loss, to learn what it would divide by.

    Calling it returns 0. Afterwards `kind` is the loss's kind, `value` the denominator
    of a `NORMALIZED` one (a scalar tensor or a number, else None), `rank` is the number
    of axes of the loss's values before they are reduced, if they are, and `varies` says
    whether micro-batches of one shape can differ in the denominator, `by_predictions`
    whether they can by the predictions' values or mask, `by_one_weight` whether plain
    Keras would divide by one number, the weight of all examples.

    Of the predictions only mask and shape are used, so that a compiler drops the rest
    of the forward pass.
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
        return ops.zeros((), trainer.loss_dtype(self.loss))

    def _measure(self, y_true, y_pred, sample_weight):
        values = trainer.loss_values(self.loss, y_true, y_pred)
        self.rank = len(values.shape)
        if self.rank == 1 and not _is_of_each(values, y_pred):
            self.rank = 2  # as many as there are steps, or whatever
        if self.rank == 0:
            self.kind = (
                BY_EXAMPLES  # one value for the micro-batch couples its examples
            )
            return
        masked = trainer.get_mask(y_pred) is not None
        by_weights = (
            self.loss.reduction == "mean_with_sample_weight"
            and sample_weight is not None
        )
        by_mask = masked or trainer.get_mask(values) is not None
        self.varies = by_mask or by_weights
        # With a mask there is a weight for each value.
        self.by_one_weight = by_weights and not by_mask and is_number(sample_weight)
        # Where a loss of one's own takes a mask from is not known.
        self.by_predictions = masked or not trainer.is_loss_of_keras(self.loss)
        if self.varies:
            self.value = trainer.denominator(
                self.loss, values, y_true, y_pred, sample_weight
            )
        else:
            self.value = _size(values, y_true)


class _Inspected(Denominator):
    """One that also calls a loss that is not taken apart, for its `rank`.

    `arguments` are the shapes of its targets and predictions; `hides_weights` says
    whether a mask or weights may change what it divides by, unknown to us.
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
                trainer.get_mask(y_pred) is not None
                or (
                    self.loss.reduction == "mean_with_sample_weight"
                    and sample_weight is not None
                )
            )
        return super().__call__(y_true, y_pred, sample_weight)


def _is_of_each(values, y_pred):
    """Whether there is one value for each example, as far as shapes tell."""
    predictions = keras.tree.flatten(y_pred)[0]
    count = predictions.shape[0] if len(predictions.shape) else None
    return None in (count, values.shape[0]) or count == values.shape[0]


def _size(values, y_true):
    # The targets' shape is known without a forward pass, the values' may not be. Axes
    # of one length in all micro-batches do not matter to what a micro-batch is worth.
    shape = tuple(getattr(y_true, "shape", ()))
    rank = len(values.shape)
    if shape[:rank] == tuple(values.shape) and None not in shape[rank:]:
        values = y_true
    size = 1
    for length in ops.shape(values):
        size = size * length
    return size


def dtype() -> str:
    """The dtype of shares, denominators and factors: not below the losses' own."""
    return "float64" if keras.config.floatx() == "float64" else "float32"


def factors(denominators, shares, kinds: Sequence[str], totals=None):
    """The factors above, from every micro-batch's denominators.

    Args:
        denominators: Float tensor of shape `(microbatches, losses)`; for losses that
            are not `NORMALIZED` its values do not matter. None if no loss is.
        shares: Float tensor of shape `(microbatches,)`.
        kinds: The `kind` of each loss.
        totals: Float tensor of shape `(losses,)`, what the micro-batches' denominators
            add up to together with those of other processes. None if there are no
            others.

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
    """Calls the compiled losses of a micro-batch, in their place.

    It takes a loss, and returns a function. Afterwards `denominator` is that of a loss
    that is `DIVIDED_LAST`, else 0.

    Args:
        kinds: The `kind` of each call of a loss: a model's own `compute_loss` may make
            several of one, or none.
        factors: The micro-batch's factor of each.
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
                value, denominator = trainer.taken_apart(loss, *given)
                self.denominator = ops.stop_gradient(ops.cast(denominator, dtype()))
            else:
                value = trainer.numerator(loss, *given)
            return value * ops.cast(factor, value.dtype)

        return value

    def _next(self):
        try:
            return next(self._waiting)
        except StopIteration:
            raise ValueError(
                "A model's own `compute_loss` must call its compiled losses as often "
                "in every micro-batch, with or without values. Received: one call more"
            ) from None


def correction(expected: Any, found: Any) -> Any:
    """The factor that mends sums which were divided by `expected`, not `found`.

    Args:
        expected: The number of examples that numerators were divided by.
        found: The denominator that they need. Where it is 0, so is the result.
    """
    return ops.divide_no_nan(ops.cast(expected, dtype()), ops.cast(found, dtype()))


def measure(model, data, y_pred, stand_in=Denominator) -> list[Denominator]:
    """The denominators of the compiled losses, one for each call in a micro-batch."""
    x, y, sample_weight = trainer.unpack(model, data)
    return trainer.standing_in(model, stand_in, (x, y, y_pred, sample_weight))


@dataclass
class Losses:
    """The facts about a model's losses that are known before the first micro-batch.

    Args:
        denominators: The denominators of the compiled losses.
        need_shares: Whether a micro-batch's share of the batch has to be known while it
            is trained on, for more than a factor that the end can correct.
        alone: Whether one compiled loss is all that the model's loss consists of.
    """

    denominators: list[Denominator]
    need_shares: bool
    alone: bool = False

    def kinds(self, even: bool) -> tuple[str, ...]:
        """The compiled losses' kinds in an update.

        Args:
            even: Whether all micro-batches have one shape, but for the number of
                examples.
        """
        kinds = tuple(
            # One value for each example: as many as the micro-batch's share says.
            BY_EXAMPLES
            if d.kind == NORMALIZED and not d.varies and (even or d.rank == 1)
            else d.kind
            for d in self.denominators
        )
        if kinds == (NORMALIZED,) and self.alone and not self.need_shares:
            return (DIVIDED_LAST,)
        return kinds

    def one_by_one(self, even: bool) -> bool:
        """Whether one can be trained on without knowing the other micro-batches."""
        return not self.need_shares and set(self.kinds(even)) <= {
            BY_EXAMPLES,
            DIVIDED_LAST,
        }

    def check_cut(self) -> None:
        """Raise if micro-batches that a batch is cut in cannot be exact."""
        if any(d.by_one_weight for d in self.denominators):
            raise ValueError(
                "A loss with `reduction='mean_with_sample_weight'` divides by the "
                "weight of a batch, and is no mean where that is one number. Give a "
                "weight for each example, or the micro-batches themselves "
                "(`accum_steps`), each with its number. "
                "Received: a sample weight of shape ()"
            )

    @property
    def by_predictions(self) -> bool:
        """Whether denominators depend on more of the predictions than their shape."""
        return any(d.by_predictions for d in self.denominators)


def inspect(
    model,
    data,
    scope=trainer.StatelessScope,
    trace: Callable = trainer.compute_output_spec,
    training: bool = True,
) -> Losses:
    """The losses of a model, from a micro-batch's shapes, without its values.

    Args:
        model: A compiled and built model.
        data: A micro-batch, nested, of `keras.KerasTensor`s.
        scope: Makes a stateless scope in which the model's variables have values.
        trace: Calls a function with the data, without any effect.
        training: Whether to call the model as in training, where it may add losses.
    """
    found = Losses([], need_shares=trainer.rounds_or_overwrites(model))

    def run(data):
        x, y, sample_weight = trainer.unpack(model, data)
        with scope(collect_losses=True):
            y_pred = trainer.forward(model, x, training)
            additional = list(model.losses)
            # Losses with axes are summed, by Keras or by TensorFlow.
            found.need_shares |= any(len(loss.shape) for loss in additional)
            if trainer.has_compiled_losses(model):
                found.denominators = measure(model, data, y_pred, _Inspected)
                found.need_shares |= trainer.records_shares(model, y) or any(
                    d.kind == BY_EXAMPLES and d.rank for d in found.denominators
                )
            found.alone = (
                training and not additional and trainer.compiled_loss_is_all(model)
            )
            if trainer.may_average_numbers(model, y_pred):
                found.need_shares |= not training or trainer.averages_numbers(
                    model, (x, y, y_pred, sample_weight), additional
                )
        return ops.zeros(())

    trace(run, data)
    return found


def values(denominators: list[Denominator]):
    """Tensor of shape `(losses,)`; 1 where a loss has no denominator."""
    return ops.stack(
        [ops.cast(1 if d.value is None else d.value, dtype()) for d in denominators]
    )


def no_examples() -> ValueError:
    return ValueError(
        "An update needs at least one example. Leave micro-batches without any out of "
        "the data. Received: an update of such micro-batches only"
    )


class Weighed:
    """The micro-batches of one update, in a loop of the host, each with what it is
    worth.

    Iterating gives `(microbatch, share, kinds, factors)`; factors are None where all
    are 1. Shares add up to `examples / expected` in the end, `examples` being all there
    were.

    Args:
        microbatches: Iterable of nested arrays.
        expected: The number of examples that the shares are of.
        kinds: The compiled losses' kinds.
        factors: A row for each micro-batch, or None.
        totals: As for `HostWeights`.
        devices: As for `HostWeights`.
    """

    def __init__(
        self, microbatches, expected, kinds=(), factors=None, totals=None, devices=1
    ):
        self.microbatches = microbatches
        self.expected = expected
        self.divided_last = DIVIDED_LAST in kinds
        # All are 1 where all losses weigh by examples.
        self.kinds = () if set(kinds) <= {BY_EXAMPLES} else kinds
        self.factors = factors
        self.totals = totals
        self.devices = devices
        self.count = 0
        self.examples = 0

    def __iter__(self):
        for k, microbatch in enumerate(self.microbatches):
            size = examples(microbatch)
            if size == 0:  # the share of a process that others give all to do
                continue
            self.count += 1
            self.examples += size
            yield microbatch, size / self.expected, self.kinds, self._row(k, size)

    def _row(self, k, size):
        if self.divided_last:
            # Times its share, a numerator is then divided by `expected`.
            shape = (1,) if self.devices == 1 else (self.devices, 1)
            return np.full(shape, self.devices / size, dtype())
        return None if self.factors is None else self.factors[k]

    def correction(self, denominator: Any = None) -> float:
        """The factor for the sums over the micro-batches, when all are done.

        Args:
            denominator: The sum of the denominators of a loss that is `DIVIDED_LAST`.
                If not given, it is left to the caller to divide by it.
        """
        numbers = [self.examples, 0.0 if denominator is None else float(denominator)]
        if self.totals is not None:
            numbers = self.totals(numbers)
        examples, found = numbers
        if not examples:
            raise no_examples()
        if not self.divided_last:
            return self.expected / examples
        if denominator is None:
            return self.expected
        return self.expected / found if found else 0.0


class HostWeights:
    """Finds what micro-batches are worth, for a loop of the host.

    Args:
        model: A compiled and built model.
        measure: A function of the model's state, a micro-batch and its `Losses` that
            returns `values`, and the state after the micro-batch as far as it matters
            to the others'.
        scope: As for `inspect`, but a function of the model's state first.
        notices: Tells the user, once each.
        totals: Sums a list of numbers over the processes that train together, each on
            micro-batches of its own. None if there is one.
        devices: The number of devices that each have an equal part of every
            micro-batch. If there are several, `measure` returns a row for each, and so
            do the factors.
        check: Function of the number of micro-batches, called where it must be the same
            in all processes.
    """

    def __init__(
        self,
        model,
        measure,
        scope,
        notices,
        totals=None,
        devices=1,
        check=lambda microbatches: None,
    ):
        self.check = check
        self.notices = notices
        self.model = model
        self.devices = devices
        self.measure = measure
        self.scope = scope
        self.totals = totals
        self.even = trainer.has_static_inputs(model)
        self.inspected: dict[str, Losses] = {}

    def __call__(self, microbatches: Microbatches, *state) -> Weighed:
        """The micro-batches of one update, made one by one where nothing needs all of
        them.

        Args:
            microbatches: The micro-batches.
            *state: The model's state.
        """
        first = next(microbatches.iterator)
        losses = self._inspect(first, state)
        if microbatches.examples is not None:
            losses.check_cut()
        drawn = chain([first], microbatches.iterator)
        weighed = partial(Weighed, totals=self.totals, devices=self.devices)
        if microbatches.examples is None:
            if losses.one_by_one(self.even):
                expected = max(examples(first), 1) * microbatches.count
                return weighed(drawn, expected, losses.kinds(self.even))
        else:
            even = self.even or self.totals is None
            kinds = losses.kinds(even)
            # A process that trains alone knows the shares.
            shares_known = self.totals is None and set(kinds) <= {BY_EXAMPLES}
            if shares_known or losses.one_by_one(even):
                return weighed(drawn, max(microbatches.examples, 1), kinds)
        return self._all(list(drawn), losses, state)

    def _all(self, microbatches: list, losses: Losses, state: tuple) -> Weighed:
        self.check(len(microbatches))
        sizes = [examples(microbatch) for microbatch in microbatches]
        shapes = {
            str(map_leaves(_inner_shape, microbatch)) for microbatch in microbatches
        }
        # Another process's micro-batches may have another shape.
        even = self.even if self.totals else len(shapes) == 1
        kinds = losses.kinds(even)
        denominators, totals = None, None
        if NORMALIZED in kinds:
            denominators = self._denominators(microbatches, sizes, kinds, losses, state)
        expected = sum(sizes)
        if self.totals is not None:
            own = [] if denominators is None else ops.sum(denominators, axis=0)
            expected, *sums = self.totals([expected, *map(float, own)])
            totals = ops.convert_to_tensor(sums, dtype=dtype())
        weighed = partial(
            Weighed, microbatches, expected, totals=self.totals, devices=self.devices
        )
        if set(kinds) <= {BY_EXAMPLES}:
            return weighed()
        # The factors of an empty micro-batch are not used.
        shares = ops.convert_to_tensor([max(s, 1) for s in sizes], dtype()) / expected
        if self.devices == 1:
            return weighed(kinds, list(factors(denominators, shares, kinds, totals)))
        if denominators is not None:
            denominators = ops.reshape(denominators, (-1, len(kinds)))
        shares = ops.repeat(shares / self.devices, self.devices)
        rows = factors(denominators, shares, kinds)
        return weighed(kinds, list(ops.reshape(rows, (-1, self.devices, len(kinds)))))

    def _denominators(self, microbatches, sizes, kinds, losses, state):
        rows = []
        for microbatch, size in zip(microbatches, sizes):
            row = ops.zeros(len(kinds))
            if size:
                # Masks may be drawn from seeds: each micro-batch sees the state that it
                # will be trained in.
                row, state = self.measure(state, microbatch, losses)
            rows.append(row)
        return ops.stack(rows)

    def _inspect(self, microbatch, state):
        # A denominator's kind depends on which arrays there are, not on their sizes.
        structure = str(map_leaves(_kind_of_array, microbatch))
        if structure not in self.inspected:
            scope = partial(self.scope, *state)
            with notices.watching(self.model) as seen:
                losses = inspect(self.model, map_leaves(symbolic, microbatch), scope)
            self.notices.tell(self.model, losses.denominators, seen, scope)
            self.inspected[structure] = losses
        return self.inspected[structure]


def symbolic(array) -> keras.KerasTensor:
    """The shape and dtype of an array."""
    return keras.KerasTensor(
        tuple(array.shape), keras.backend.standardize_dtype(array.dtype)
    )


def examples(microbatch) -> int:
    """The number of examples of a micro-batch."""
    return first_input(microbatch).shape[0]


def _kind_of_array(array):
    return len(array.shape), array.dtype


def _inner_shape(array):
    return tuple(array.shape[1:])
