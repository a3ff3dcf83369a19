"""What each compiled loss is divided by, and how that joins pieces exactly.

A compiled loss on piece k is a numerator over a denominator. The full batch's is

    sum_k num_k / sum_k den_k  =  sum_k (den_k / sum_i den_i) * (num_k / den_k)

so that all pieces' numerators need one number only, the full batch's denominator, and
a piece without weight no division at all. The engine weighs a piece's whole loss by its
share of the examples, `share_k`; the *factors* here take that off the compiled losses:

    total = sum_k share_k * (sum_j factor_jk * num_jk + additional losses)
    factor_jk = 1 / sum_i den_ji / share_k

Where every piece's denominator is as large as its share says, Keras's own loss of the
piece takes the numerator's place, and the factor is 1.

Additional losses (regularizers, `add_loss`) then count once an update, as means over
examples do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from gradient_accumulator.backend import trainer
from gradient_accumulator.backend.api import keras, ops
from gradient_accumulator.pieces import Pieces, first_input, map_leaves

# What a loss divides by, as far as a reduction's name tells.
ADDITIVE = "additive"  # nothing: pieces add up
BY_EXAMPLES = "by_examples"  # the loss cannot be taken apart
NORMALIZED = "normalized"  # a number that each piece has its own of


def kind(loss: keras.losses.Loss) -> str:
    """How the value of `loss` on a full batch comes from its values on pieces.

    A loss whose class overrides `__call__` keeps its reduction to itself, so its
    pieces weigh by their examples. So does one without reduction, whose values the
    optimizer sees summed.
    """
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
    whether pieces of one shape can differ in the denominator.

    Of the predictions only mask and shape are used, so that a compiler drops the rest
    of the forward pass.
    """

    def __init__(self, loss: keras.losses.Loss):
        self.loss = loss
        self.kind = kind(loss)
        self.value: Any = None
        self.rank = 0
        self.varies = False

    def __call__(self, y_true, y_pred, sample_weight=None):
        if self.kind == NORMALIZED:
            self._measure(y_true, y_pred, sample_weight)
        return ops.zeros((), trainer.loss_dtype(self.loss))

    def _measure(self, y_true, y_pred, sample_weight):
        loss = self.loss

        values = trainer.loss_values(loss, y_true, y_pred)
        self.rank = len(values.shape)
        if self.rank == 0:
            self.kind = BY_EXAMPLES  # one value for the piece couples its examples
            return
        mask = _both(trainer.get_mask(y_pred), trainer.get_mask(values))
        if loss.reduction != "mean_with_sample_weight":
            sample_weight = None
        self.varies = mask is not None or sample_weight is not None
        if self.varies:
            self.value = trainer.counted(loss, values, mask, sample_weight)
        else:
            self.value = _size(values, y_true)


class _Inspected(Denominator):
    """One that also calls a loss that is not taken apart, for its `rank`."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        if self.kind == BY_EXAMPLES:
            self.rank = len(self.loss(y_true, y_pred, sample_weight).shape)
        return super().__call__(y_true, y_pred, sample_weight)


def _both(mask, other):
    if mask is None or other is None:
        return other if mask is None else mask
    return mask & other


def _size(values, y_true):
    # The targets' shape is known without a forward pass, the values' may not be. Axes
    # of one length in all pieces do not matter to what a piece is worth.
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
    """The factors above, from every piece's denominators.

    Args:
        denominators: Float tensor of shape `(pieces, losses)`; for losses that are
            not `NORMALIZED` its values do not matter. None if no loss is.
        shares: Float tensor of shape `(pieces,)`.
        kinds: The `kind` of each loss.
        totals: Float tensor of shape `(losses,)`, what the pieces' denominators add up
            to together with those of other processes. None if there are no others.

    Returns:
        Float tensor of shape `(pieces, losses)`. A loss whose denominator is 0 on
        the full batch has factor 0.
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


def weighing(kinds: Sequence[str], factors: Sequence) -> Callable:
    """A function that takes the compiled losses, one after the other, and returns for
    each what is called in its place in a piece.

    Args:
        kinds: The `kind` of each loss.
        factors: The piece's factor of each loss.
    """
    waiting = iter(zip(kinds, factors))

    def weigh(loss):
        kind, factor = next(waiting)

        def value(y_true, y_pred, sample_weight=None):
            whole = loss if kind == BY_EXAMPLES else partial(trainer.numerator, loss)
            value = whole(y_true, y_pred, sample_weight)
            return value * ops.cast(factor, value.dtype)

        return value

    return weigh


def measure(model, data, y_pred, stand_in=Denominator) -> list[Denominator]:
    """The denominators of a piece's compiled losses."""
    _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    return trainer.standing_in(model, stand_in, y, y_pred, sample_weight)


@dataclass
class Losses:
    """What can be said of a model's losses before a piece is trained on.

    Args:
        denominators: Of the compiled losses.
        need_shares: Whether a piece's share of the full batch has to be known while it
            is trained on, for more than a factor that the end can correct.
    """

    denominators: list[Denominator]
    need_shares: bool

    def kinds(self, even: bool) -> tuple[str, ...]:
        """The compiled losses' kinds in an update.

        Args:
            even: Whether all pieces have one shape, but for the number of examples.
        """
        return tuple(
            # One value for each example: as many as the piece's share says.
            BY_EXAMPLES
            if d.kind == NORMALIZED and not d.varies and (even or d.rank == 1)
            else d.kind
            for d in self.denominators
        )

    def by_examples(self, even: bool) -> bool:
        """Whether the number of its examples is all that a piece is worth, so that no
        other piece has to be known."""
        return not self.need_shares and set(self.kinds(even)) <= {BY_EXAMPLES}


def inspect(
    model,
    data,
    scope=trainer.StatelessScope,
    trace: Callable = trainer.compute_output_spec,
    training: bool = True,
) -> Losses:
    """The losses of a model, from a piece's shapes, without its values.

    Args:
        model: A compiled and built model.
        data: A piece, nested, of `keras.KerasTensor`s.
        scope: Makes a stateless scope in which the model's variables have values.
        trace: Calls a function with the data, without any effect.
        training: Whether to call the model as in training, where it may add losses.
    """
    found = Losses([], need_shares=trainer.rounds_or_overwrites(model))

    def run(data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with scope(collect_losses=True):
            y_pred = trainer.forward(model, x, training)
            # Losses with axes are summed, by Keras or by TensorFlow.
            found.need_shares |= any(len(loss.shape) for loss in model.losses)
            if trainer.has_compiled_losses(model):
                found.denominators = measure(model, data, y_pred, _Inspected)
                found.need_shares |= trainer.records_shares(model, y) or any(
                    d.kind == BY_EXAMPLES and d.rank for d in found.denominators
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
        "An update needs at least one example. Leave pieces without any out of the "
        "data. Received: an update of such pieces only"
    )


class Weighed:
    """The pieces of one update, in a loop of the host, each with what it is worth.

    Iterating gives `(piece, share, kinds, factors)`; factors are None where all are 1.
    Shares add up to `examples / expected` in the end, `examples` being all there were.

    Args:
        pieces: Iterable of nested arrays.
        expected: The number of examples that the shares are of.
        kinds: The compiled losses' kinds.
        factors: A row for each piece, or None.
        totals: As for `HostWeights`.
    """

    def __init__(self, pieces, expected, kinds=(), factors=None, totals=None):
        self.pieces = pieces
        self.expected = expected
        self.kinds = kinds
        self.factors = factors
        self.totals = totals
        self.count = 0
        self.examples = 0

    def __iter__(self):
        for k, piece in enumerate(self.pieces):
            size = examples(piece)
            if size == 0:  # the share of a process that others give all to do
                continue
            self.count += 1
            self.examples += size
            row = None if self.factors is None else self.factors[k]
            yield piece, size / self.expected, self.kinds, row

    def correction(self) -> float:
        """What sums over the pieces are to be multiplied by, when all are done."""
        examples = self.examples
        if self.totals is not None:
            (examples,) = self.totals([examples])
        if not examples:
            raise no_examples()
        return self.expected / examples


class HostWeights:
    """Finds what pieces are worth, for a loop of the host.

    Args:
        model: A compiled and built model.
        measure: A function of the model's state and a piece that returns `values`.
        scope: As for `inspect`, but a function of the model's state first.
        totals: Sums a list of numbers over the processes that train together, each on
            pieces of its own. None if there is one.
        devices: The number of devices that each have an equal part of every piece. If
            there are several, `measure` returns a row for each, and so do the factors.
        check: Function of the number of pieces, called where it must be the same in
            all processes.
    """

    def __init__(
        self,
        model,
        measure,
        scope=trainer.StatelessScope,
        totals=None,
        devices=1,
        check=lambda pieces: None,
    ):
        self.check = check
        self.model = model
        self.devices = devices
        self.measure = measure
        self.scope = scope
        self.totals = totals
        self.even = trainer.has_static_inputs(model)
        self.inspected: dict[str, Losses] = {}

    def __call__(self, pieces: Pieces, *state) -> Weighed:
        """The pieces of one update, made one by one where nothing needs all of them.

        Args:
            pieces: The pieces.
            *state: The model's state.
        """
        first = next(pieces.iterator)
        losses = self._inspect(first, state)
        drawn = chain([first], pieces.iterator)
        if pieces.examples is None:
            if losses.by_examples(self.even):
                expected = max(examples(first), 1) * pieces.count
                return Weighed(drawn, expected, totals=self.totals)
        elif losses.by_examples(even=self.even or self.totals is None):
            return Weighed(drawn, max(pieces.examples, 1), totals=self.totals)
        return self._all(list(drawn), losses, state)

    def _all(self, pieces: list, losses: Losses, state: tuple) -> Weighed:
        self.check(len(pieces))
        sizes = [examples(piece) for piece in pieces]
        shapes = {str(map_leaves(_inner_shape, piece)) for piece in pieces}
        # Another process's pieces may have another shape.
        even = self.even if self.totals else len(shapes) == 1
        kinds = losses.kinds(even)
        denominators, totals = None, None
        if NORMALIZED in kinds:
            denominators = ops.stack(
                [
                    self.measure(*state, piece) if size else ops.zeros(len(kinds))
                    for piece, size in zip(pieces, sizes)
                ]
            )
        expected = sum(sizes)
        if self.totals is not None:
            own = [] if denominators is None else ops.sum(denominators, axis=0)
            expected, *sums = self.totals([expected, *map(float, own)])
            totals = ops.convert_to_tensor(sums, dtype=dtype())
        weighed = partial(Weighed, pieces, expected, totals=self.totals)
        if set(kinds) <= {BY_EXAMPLES}:
            return weighed()
        # Of what is empty the factors are not used.
        shares = ops.convert_to_tensor([max(s, 1) for s in sizes], dtype()) / expected
        if self.devices == 1:
            return weighed(kinds, list(factors(denominators, shares, kinds, totals)))
        if denominators is not None:
            denominators = ops.reshape(denominators, (-1, len(kinds)))
        shares = ops.repeat(shares / self.devices, self.devices)
        rows = factors(denominators, shares, kinds)
        return weighed(kinds, list(ops.reshape(rows, (-1, self.devices, len(kinds)))))

    def _inspect(self, piece, state):
        # What a loss divides by depends on what there is, not on how much.
        structure = str(map_leaves(_kind_of_array, piece))
        if structure not in self.inspected:
            self.inspected[structure] = inspect(
                self.model, map_leaves(symbolic, piece), partial(self.scope, *state)
            )
        return self.inspected[structure]


def symbolic(array) -> keras.KerasTensor:
    """What is known of an array without its values."""
    return keras.KerasTensor(
        tuple(array.shape), keras.backend.standardize_dtype(array.dtype)
    )


def examples(piece) -> int:
    """The number of examples of a piece."""
    return first_input(piece).shape[0]


def _kind_of_array(array):
    return len(array.shape), array.dtype


def _inner_shape(array):
    return tuple(array.shape[1:])
