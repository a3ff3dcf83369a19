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
from contextlib import nullcontext
from functools import partial
from typing import Any

import keras
from keras import ops

from gradient_accumulator.backend.trainer import (
    apply_mask,
    compute_output_spec,
    forward,
    get_mask,
    has_compiled_losses,
    numerator,
    standing_in,
)
from gradient_accumulator.pieces import map_leaves

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
    of a `NORMALIZED` one (a scalar tensor or a number, else None), and `varies` says
    whether pieces of one shape can differ in it.

    Of the predictions only mask and shape are used, so that a compiler drops the rest
    of the forward pass.
    """

    def __init__(self, loss: keras.losses.Loss):
        self.loss = loss
        self.kind = kind(loss)
        self.value: Any = None
        self.varies = False

    def __call__(self, y_true, y_pred, sample_weight=None):
        if self.kind == NORMALIZED:
            self._measure(y_true, y_pred, sample_weight)
        return ops.zeros((), dtype=self.loss.dtype)

    def _measure(self, y_true, y_pred, sample_weight):
        loss = self.loss

        def convert(x):
            return ops.convert_to_tensor(x, dtype=loss.dtype)

        values = loss.call(
            keras.tree.map_structure(convert, y_true),
            keras.tree.map_structure(convert, y_pred),
        )
        if len(values.shape) == 0:
            self.kind = BY_EXAMPLES  # one value for the piece couples its examples
            return
        mask = _both(get_mask(y_pred), get_mask(values))
        if loss.reduction != "mean_with_sample_weight":
            sample_weight = None
        self.varies = mask is not None or sample_weight is not None
        if self.varies:
            weights = apply_mask(sample_weight, mask, dtype=loss.dtype, reduction="sum")
            self.value = ops.sum(weights)
        else:
            self.value = _size(values, y_true)


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
    return keras.backend.result_type(keras.config.floatx(), "float32")


def shares(sizes) -> list[float]:
    """Each piece's part of the full batch's examples."""
    total = sum(sizes)
    return [size / total for size in sizes]


def factors(denominators, shares, kinds: Sequence[str]):
    """The factors above, from every piece's denominators.

    Args:
        denominators: Float tensor of shape `(pieces, losses)`; for losses that are
            not `NORMALIZED` its values do not matter. None if no loss is.
        shares: Float tensor of shape `(pieces,)`.
        kinds: The `kind` of each loss.

    Returns:
        Float tensor of shape `(pieces, losses)`. A loss whose denominator is 0 on
        the full batch has factor 0.
    """
    shares = ops.expand_dims(shares, axis=1)
    additive = 1 / shares
    normalized = additive
    if denominators is not None:
        totals = ops.sum(denominators, axis=0, keepdims=True)
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
            whole = loss if kind == BY_EXAMPLES else partial(numerator, loss)
            value = whole(y_true, y_pred, sample_weight)
            return value * ops.cast(factor, value.dtype)

        return value

    return weigh


def measure(model, data, y_pred) -> list[Denominator]:
    """The denominators of a piece's compiled losses."""
    _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    return standing_in(model, Denominator, y, y_pred, sample_weight)


def inspect(
    model, data, scope=nullcontext, trace=compute_output_spec
) -> list[Denominator]:
    """The kinds of the compiled losses, from a piece's shapes, without its values.

    Args:
        model: A compiled and built model.
        data: A piece, nested, of `keras.KerasTensor`s.
        scope: Makes a context in which the model's variables have values.
        trace: Calls a function with the data, without any effect.
    """
    found: list[Denominator] = []
    if not has_compiled_losses(model):
        return found

    def run(data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with scope():
            found[:] = measure(model, data, forward(model, x, training=False))
        return ops.zeros(())

    trace(run, data)
    return found


def kinds_of(denominators: list[Denominator], even: bool) -> tuple[str, ...]:
    """The losses' kinds in an update; if any is `NORMALIZED`, pieces have to be looked
    at before the first one.

    Args:
        denominators: From `inspect`.
        even: Whether all pieces have one shape, but for the number of examples.
    """
    return tuple(
        BY_EXAMPLES if d.kind == NORMALIZED and even and not d.varies else d.kind
        for d in denominators
    )


def values(denominators: list[Denominator]):
    """Tensor of shape `(losses,)`; 1 where a loss has no denominator."""
    return ops.stack(
        [ops.cast(1 if d.value is None else d.value, dtype()) for d in denominators]
    )


class HostFactors:
    """The factors of an update's pieces, for a loop of the host that knows them all.

    Args:
        model: A compiled and built model.
        measure: A function of the model's state and a piece that returns `values`.
        scope: As for `inspect`, of the model's state.
    """

    def __init__(self, model, measure, scope=nullcontext):
        self.model = model
        self.measure = measure
        self.scope = scope
        self.inspected: dict[str, list[Denominator]] = {}

    def __call__(self, pieces: list, shares: list[float], *state) -> tuple:
        """The losses' kinds, and their factors for each piece: None where all are 1."""
        found = self._inspect(pieces[0], state)
        even = len({str(map_leaves(_inner_shape, piece)) for piece in pieces}) == 1
        kinds = kinds_of(found, even)
        if set(kinds) <= {BY_EXAMPLES}:
            return kinds, [None] * len(pieces)
        denominators = None
        if NORMALIZED in kinds:
            denominators = ops.stack([self.measure(*state, piece) for piece in pieces])
        shares = ops.convert_to_tensor(shares, dtype=dtype())
        return kinds, list(factors(denominators, shares, kinds))

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


def _kind_of_array(array):
    return len(array.shape), array.dtype


def _inner_shape(array):
    return tuple(array.shape[1:])
