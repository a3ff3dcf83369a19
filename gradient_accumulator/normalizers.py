"""What each compiled loss is divided by, and how that joins pieces exactly.

A compiled loss on piece k is a numerator over a denominator. The full batch's is

    sum_k num_k / sum_k den_k  =  sum_k (den_k / sum_i den_i) * (num_k / den_k)

so a piece's loss, as Keras computes it, is worth `den_k / sum_i den_i` of the full
batch's: not the same for every piece, nor for every output of one piece. The engine
weighs a piece's whole loss by its share of the examples, `share_k`; the *factors*
here correct each compiled loss from that share to its own:

    total = sum_k share_k * (sum_j factor_jk * loss_jk + additional losses)
    factor_jk = den_jk / sum_i den_ji / share_k

Additional losses (regularizers, `add_loss`) then count once an update, as means over
examples do.
"""

from __future__ import annotations

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


def factors(denominators, shares, kinds):
    """The factors above, from every piece's denominators.

    Args:
        denominators: Float tensor of shape `(pieces, losses)`; for losses that are
            not `NORMALIZED` its values do not matter.
        shares: Float tensor of shape `(pieces,)`.
        kinds: The `kind` of each loss.

    Returns:
        Float tensor of shape `(pieces, losses)`. A loss whose denominator is 0 on
        the full batch has factor 0.
    """
    shares = ops.expand_dims(shares, axis=1)
    normalized = ops.divide_no_nan(
        denominators, ops.sum(denominators, axis=0, keepdims=True) * shares
    )
    additive = [kind == ADDITIVE for kind in kinds]
    by_examples = [kind == BY_EXAMPLES for kind in kinds]
    return ops.where(
        ops.convert_to_tensor([additive], dtype="bool"),
        1 / shares,
        ops.where(ops.convert_to_tensor([by_examples], dtype="bool"), 1.0, normalized),
    )


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


def differ(denominators: list[Denominator], even: bool) -> bool:
    """Whether pieces have to be looked at before the first one.

    Args:
        denominators: From `inspect`.
        even: Whether all pieces have one shape, but for the number of examples.
    """
    return any(
        denominator.kind == NORMALIZED and (denominator.varies or not even)
        for denominator in denominators
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

    def __call__(self, pieces: list, shares: list[float], *state) -> list:
        """For each piece its losses' factors, or None where all are 1."""
        found = self._inspect(pieces[0], state)
        kinds = [denominator.kind for denominator in found]
        even = len({str(map_leaves(_inner_shape, piece)) for piece in pieces}) == 1
        if differ(found, even):
            denominators = ops.stack([self.measure(*state, piece) for piece in pieces])
        elif ADDITIVE in kinds:
            denominators = ops.ones((len(pieces), len(found)), dtype=dtype())
        else:
            return [None] * len(pieces)
        shares = ops.convert_to_tensor(shares, dtype=dtype())
        return list(factors(denominators, shares, kinds))

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
