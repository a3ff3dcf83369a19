"""Finds out by a trial whether a loss couples the examples of a batch.

Micro-batches give the gradient of a loss on the batch only if its value on the batch
follows from its values on the micro-batches. The code of a function does not show this,
and neither do shapes: `ops.mean(ops.square(y - y_pred))` gives one number for a batch,
as Dice does, and does not couple examples; a contrastive loss gives one number for each
example, and couples them. Therefore a loss is called with a few made-up examples, and
with each half of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradient_accumulator import devices
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras, ops

# The losses of Keras that may couple examples. Its other losses never do.
_MAY_COUPLE = ("circle", "dice", "tversky")

EXAMPLES = 4  # the number of made-up examples
_UNKNOWN_LENGTH = 8  # what an axis of unknown length becomes
_LONGEST = 32  # what a longer axis between the first and the last becomes
_MOST_VALUES = 2**24  # a loss of more made-up values is not tried


@dataclass(frozen=True)
class Shape:
    """The shape and the dtype of an array."""

    shape: tuple
    dtype: str


def shape_of(tensor: Any) -> Shape | None:
    """Returns a tensor's `Shape`, or None if its rank is not known or is 0."""
    shape = getattr(tensor, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None or not len(shape):
        return None
    return Shape(tuple(shape), keras.backend.standardize_dtype(tensor.dtype))


def keras_own(loss: Any) -> str | None:
    """Returns the name of Keras's function if a compiled loss is Keras's, else None."""
    if not trainer.is_loss_of_keras(loss):
        return None
    return getattr(loss, "fn", type(loss)).__name__


def name_of(loss: Any) -> str:
    """Returns the name by which a user knows a loss."""
    name = getattr(getattr(loss, "fn", None), "__name__", None)
    return loss.name if name in (None, "<lambda>") else name


def is_known(loss: Any) -> bool:
    """Whether a loss is one of Keras's that never couple examples."""
    return keras_own(loss) not in (None, *_MAY_COUPLE)


def couples(
    loss: Any,
    y_true: Any,
    y_pred: Any,
    scope: Callable[[], AbstractContextManager] = nullcontext,
) -> bool | None:
    """Whether a loss on a batch differs from what its micro-batches' values give.

    Args:
        loss: A compiled loss.
        y_true: Nested `Shape`s of the targets that it is called with.
        y_pred: Nested `Shape`s of the predictions that it is called with.
        scope: Function that returns a scope without effects on variables.

    Returns:
        A bool, or None if the loss does not take made-up examples, or is random.
    """
    leaves = keras.tree.flatten((y_true, y_pred))
    if None in leaves:
        return None
    y_true = _as_predicted(y_true, y_pred)
    leaves = keras.tree.flatten((y_true, y_pred))
    lengths = _lengths(leaves)
    if sum(int(np.prod(_shape(leaf, lengths))) for leaf in leaves) > _MOST_VALUES:
        return None
    r = np.random.default_rng(0)

    def made_up(make, leaf):
        return make(r, _shape(leaf, lengths), leaf.dtype)

    def values(y_true, y_pred):
        def value(*examples):
            def taken(array):
                return ops.convert_to_tensor(array[slice(*examples)])

            return _value(
                loss,
                keras.tree.map_structure(taken, y_true),
                keras.tree.map_structure(taken, y_pred),
            )

        half = EXAMPLES // 2
        with scope():
            return [
                value(EXAMPLES),
                value(half),
                value(half, EXAMPLES),
                value(EXAMPLES),  # again, for a random loss gives another value
            ]

    try:
        found = devices.active().call_once(
            values,
            keras.tree.map_structure(lambda x: made_up(_targets, x), y_true),
            keras.tree.map_structure(lambda x: made_up(_predictions, x), y_pred),
        )
        whole, first, second, again = (np.asarray(v, "float64") for v in found)
    except Exception:  # a user's loss may raise anything on data that is made up
        return None
    if not np.isfinite(whole).any():
        return None
    if _is_close(whole, _joined(loss, whole, (first, second))):
        return False
    return True if _is_close(whole, again) else None


def _is_opaque(loss):
    return type(loss).__call__ is not keras.losses.Loss.__call__


def _value(loss, y_true, y_pred):
    """Returns the values that a loss reduces, or its number if it hides the values."""
    if _is_opaque(loss):
        return loss(y_true, y_pred)
    return trainer.loss_values(loss, y_true, y_pred)


def _joined(loss, whole, halves):
    """Returns the value that an update would give a batch, from those of its halves."""
    if whole.ndim and len(whole) == EXAMPLES and len(halves[0]) == EXAMPLES // 2:
        return np.concatenate(halves)
    if whole.shape[1:] != halves[0].shape[1:] or halves[0].shape != halves[1].shape:
        return np.array(np.nan)  # the number of values depends on the data
    added = sum(halves)
    adds_up = not _is_opaque(loss) and loss.reduction == "sum"
    return added if adds_up else added / 2


def _is_close(a, b):
    tolerance = 3e-2 if keras.config.floatx() == "float16" else 1e-3
    return a.shape == b.shape and np.allclose(
        a, b, rtol=tolerance, atol=1e-6, equal_nan=True
    )


def _as_predicted(y_true, y_pred):
    """Returns the targets, with the predictions' lengths where theirs are unknown."""
    pairs = [*zip(keras.tree.flatten(y_true), keras.tree.flatten(y_pred))]
    if len(pairs) != len(keras.tree.flatten(y_true)):
        return y_true
    known = [
        Shape(
            tuple(p if t is None else t for t, p in zip(true.shape, pred.shape)),
            true.dtype,
        )
        if len(true.shape) == len(pred.shape)
        else true
        for true, pred in pairs
    ]
    return keras.tree.pack_sequence_as(y_true, known)


def _lengths(leaves):
    """Returns the new length of each length that is too long, and of an unknown one.

    Steps or pixels then have the same number in targets and in predictions.
    """
    inner = {length for leaf in leaves for length in leaf.shape[1:-1]}
    shorter = {n: _LONGEST for n in inner if n is not None and n > _LONGEST}
    return {**shorter, None: _UNKNOWN_LENGTH}


def _shape(leaf, lengths):
    return (EXAMPLES, *(lengths.get(length, length) for length in leaf.shape[1:]))


def _targets(r, shape, dtype):
    """Returns zeros and ones: labels, probabilities, numbers and masks can be those."""
    likely = np.linspace(0.8, 0.2, EXAMPLES).reshape((-1,) + (1,) * (len(shape) - 1))
    values = r.random(shape) < likely
    # The halves never have equally many ones, because a loss may divide by that number.
    values.reshape(EXAMPLES, -1)[:, 0] = [True, True, True, False]
    return values.astype(dtype if dtype != "bfloat16" else "float32")


def _predictions(r, shape, dtype):
    """Returns numbers from 0.1 to 0.9: probabilities, and also numbers or logits."""
    return r.uniform(0.1, 0.9, shape).astype("float32" if "float" in dtype else dtype)
