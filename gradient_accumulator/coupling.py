"""Whether a loss couples the examples of a batch, found by trying it.

Micro-batches give a loss's gradient on the batch only if its value there comes from
the values on the micro-batches. What a function does with its examples cannot be read
from it, and shapes do not tell: `ops.mean(ops.square(y - y_pred))` gives one number
for a batch as Dice does, and a contrastive loss one for each example. So a loss is
called with a few made-up examples, and with each half of them.
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

# Of Keras's own losses those that may; the others are known not to.
_OF_KERAS = ("circle", "dice", "tversky")

EXAMPLES = 4  # made up, of which each half has half
_UNKNOWN_LENGTH = 8
_LONGEST = 32  # of an axis between the first and the last
_MOST_VALUES = 2**24


@dataclass(frozen=True)
class Shape:
    """What is known of an array without its values."""

    shape: tuple
    dtype: str


def shape_of(tensor: Any) -> Shape | None:
    """None where too little is known to make up another."""
    shape = getattr(tensor, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None or not len(shape):
        return None
    return Shape(tuple(shape), keras.backend.standardize_dtype(tensor.dtype))


def keras_own(loss: Any) -> str | None:
    """The name of Keras's function that a compiled loss is; None if it is another."""
    if not trainer.is_loss_of_keras(loss):
        return None
    return getattr(loss, "fn", type(loss)).__name__


def name_of(loss: Any) -> str:
    """What a user calls it."""
    name = getattr(getattr(loss, "fn", None), "__name__", None)
    return loss.name if name in (None, "<lambda>") else name


def is_known(loss: Any) -> bool:
    """Whether it is one of Keras's own that never couples."""
    return keras_own(loss) not in (None, *_OF_KERAS)


def couples(
    loss: Any,
    y_true: Any,
    y_pred: Any,
    scope: Callable[[], AbstractContextManager] = nullcontext,
) -> bool | None:
    """Whether values on micro-batches do not make up a loss's value on their batch.

    Args:
        loss: A compiled loss.
        y_true: Nested `Shape`s of what it is called with.
        y_pred: The same.
        scope: Makes a scope without effects on variables.

    Returns:
        None if it does not take made-up examples, or is random.
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
                value(EXAMPLES),  # again: a loss that draws numbers differs from itself
            ]

    try:
        found = devices.active().call_once(
            values,
            keras.tree.map_structure(lambda x: made_up(_targets, x), y_true),
            keras.tree.map_structure(lambda x: made_up(_predictions, x), y_pred),
        )
        whole, first, second, again = (np.asarray(v, "float64") for v in found)
    except Exception:  # whatever a user's loss does with what is no data of the user's
        return None
    if not np.isfinite(whole).any():
        return None
    if _same(whole, _joined(loss, whole, (first, second))):
        return False
    return True if _same(whole, again) else None


def _is_opaque(loss):
    return type(loss).__call__ is not keras.losses.Loss.__call__


def _value(loss, y_true, y_pred):
    """A loss before it is reduced, if it lets that be seen."""
    if _is_opaque(loss):
        return loss(y_true, y_pred)
    return trainer.loss_values(loss, y_true, y_pred)


def _joined(loss, whole, parts):
    """What a batch's value is taken for, from those of its halves."""
    if whole.ndim and len(whole) == EXAMPLES and len(parts[0]) == EXAMPLES // 2:
        return np.concatenate(parts)
    if whole.shape[1:] != parts[0].shape[1:] or parts[0].shape != parts[1].shape:
        return np.array(np.nan)  # as many values as there happen to be
    added = sum(parts)
    adds_up = not _is_opaque(loss) and loss.reduction == "sum"
    return added if adds_up else added / 2


def _same(a, b):
    tolerance = 3e-2 if keras.config.floatx() == "float16" else 1e-3
    return a.shape == b.shape and np.allclose(
        a, b, rtol=tolerance, atol=1e-6, equal_nan=True
    )


def _as_predicted(y_true, y_pred):
    """Targets, whose unknown lengths are taken to be those of the predictions."""
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
    """What long axes, of steps or pixels, become: in targets as in predictions."""
    inner = {length for leaf in leaves for length in leaf.shape[1:-1]}
    shorter = {n: _LONGEST for n in inner if n is not None and n > _LONGEST}
    return {**shorter, None: _UNKNOWN_LENGTH}


def _shape(leaf, lengths):
    return (EXAMPLES, *(lengths.get(length, length) for length in leaf.shape[1:]))


def _targets(r, shape, dtype):
    """Of zeros and ones: labels, probabilities, numbers and masks can be that."""
    likely = np.linspace(0.8, 0.2, EXAMPLES).reshape((-1,) + (1,) * (len(shape) - 1))
    values = r.random(shape) < likely
    # Halves never have as many ones, which a loss may divide by.
    values.reshape(EXAMPLES, -1)[:, 0] = [True, True, True, False]
    return values.astype(dtype if dtype != "bfloat16" else "float32")


def _predictions(r, shape, dtype):
    """That are probabilities, and may be numbers or logits."""
    return r.uniform(0.1, 0.9, shape).astype("float32" if "float" in dtype else dtype)
