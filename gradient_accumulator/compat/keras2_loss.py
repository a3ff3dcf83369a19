"""A compiled loss of Keras 2: its values, and what it divides by."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

from gradient_accumulator.compat.keras2_internals import (
    get_mask,
    is_keras_own,
)
from gradient_accumulator.compat.keras2_names import keras


def _casts(y_true):
    return y_true.dtype.is_floating


class CompiledLoss:
    """A loss that a model is compiled with.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: keras.losses.Loss):
        self.loss = loss

    def denominator(
        self, values: Any, y_true: Any, y_pred: Any, sample_weight: Any
    ) -> Any:
        """Returns the denominator if there is a mask: the number of unmasked values.

        Keras 2 does not divide by sample weights.
        """
        masks = [m for m in (get_mask(y_pred), get_mask(values)) if m is not None]
        dtype = values.dtype
        share = tf.reduce_mean(tf.cast(functools.reduce(tf.logical_and, masks), dtype))
        return tf.cast(tf.size(values), dtype) * share

    @property
    def dtype(self) -> str:
        """The dtype that the loss computes in, if no values tell it."""
        return keras.backend.floatx()

    def values(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """Returns the values of the loss before they are reduced, with their mask."""
        y_pred = tf.convert_to_tensor(y_pred)
        y_true = tf.cast(y_true, y_pred.dtype) if _casts(y_true) else y_true
        return self.loss.call(y_true, y_pred)

    @property
    def is_keras_own(self) -> bool:
        """Whether Keras's own code computes the values of the loss, and their mask."""
        return is_keras_own(type(self.loss)) and is_keras_own(
            getattr(self.loss, "fn", type(self.loss))
        )

    def numerator(self, y_true, y_pred, sample_weight=None) -> Any:
        """Returns the numerator: the loss with the reduction `sum`."""
        # The loss itself may be in use elsewhere.
        summed = object.__new__(type(self.loss))
        summed.__dict__.update(self.loss.__dict__, reduction="sum")
        return summed(y_true, y_pred, sample_weight)

    def numerator_and_denominator(self, y_true, y_pred, sample_weight=None) -> tuple:
        """Returns the numerator and the denominator."""
        values = self.values(y_true, y_pred)
        given = y_true, y_pred, sample_weight
        return self.numerator(*given), self.denominator(values, *given)
