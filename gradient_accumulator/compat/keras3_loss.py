"""A compiled loss of Keras 3: its values, and what it divides by."""

from __future__ import annotations

from typing import Any

import keras
from keras.src.losses import loss as losses

from gradient_accumulator.compat.keras3_internals import (
    get_mask,
    is_keras_own,
    set_mask,
)
from gradient_accumulator.compat.keras3_metrics import (
    is_number,
)


class CompiledLoss:
    """A loss that a model is compiled with.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: keras.losses.Loss):
        self.loss = loss

    @property
    def dtype(self) -> str:
        """The dtype that the loss computes in."""
        return self.loss.dtype

    @property
    def is_keras_own(self) -> bool:
        """Whether Keras's own code computes the values of the loss, and their mask."""
        return is_keras_own(type(self.loss)) and is_keras_own(
            getattr(self.loss, "fn", type(self.loss))
        )

    def _like(self, **attributes: Any) -> keras.losses.Loss:
        """Returns a copy of the loss with other attributes.

        The loss itself may be in use elsewhere.
        """
        other = object.__new__(type(self.loss))
        other.__dict__.update(self.loss.__dict__, **attributes)
        for name, value in attributes.items():
            if getattr(other, name) is not value:
                raise ValueError(
                    "The denominator of a loss whose class itself defines "
                    f"`{name}` is not known: make it an attribute, and pass it to "
                    f"`super().__init__`. Received: loss={self.loss}"
                )
        return other

    def denominator(
        self, values: Any, y_true: Any, y_pred: Any, sample_weight: Any
    ) -> Any:
        """Returns the denominator if there is a mask, or weights.

        It is measured: a loss whose values are all 1 has this ratio of its sum to its
        mean.

        Args:
            values: The loss's values, with their mask.
            y_true: The targets.
            y_pred: The predictions.
            sample_weight: The sample weights, or None.
        """
        ones = keras.ops.ones_like(values)
        mask = get_mask(values)
        if mask is not None:
            set_mask(ones, mask)
        if self.loss.reduction != "mean_with_sample_weight":
            sample_weight = None
        elif is_number(sample_weight):
            # A weight for each value, because Keras would divide by the one number.
            sample_weight = ones * keras.ops.cast(sample_weight, ones.dtype)
        elif sample_weight is not None:
            # On PyTorch Keras multiplies weights in place.
            sample_weight = keras.ops.copy(sample_weight)

        def reduced(reduction):
            of_ones = self._like(reduction=reduction, call=lambda *_: ones)
            return of_ones(y_true, y_pred, sample_weight)

        mean = losses.unscale_loss_for_distribution(reduced(self.loss.reduction))
        return keras.ops.divide_no_nan(reduced("sum"), mean)

    def values(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the values of the loss before they are reduced, with their mask."""

        def convert(x):
            return keras.ops.convert_to_tensor(x, dtype=self.loss.dtype)

        return self.loss.call(
            keras.tree.map_structure(convert, y_true),
            keras.tree.map_structure(convert, y_pred),
        )

    def numerator(self, y_true, y_pred, sample_weight=None) -> Any:
        """Returns the numerator: the loss with the reduction `sum`."""
        value = self._like(reduction="sum")(y_true, y_pred, sample_weight)
        if self.loss.reduction == "sum":
            return value
        return losses.scale_loss_for_distribution(value)

    def numerator_and_denominator(self, y_true, y_pred, sample_weight=None) -> tuple:
        """Returns the numerator and the denominator, from one call."""
        kept: list = []

        def call(*args):
            kept.append(self.loss.call(*args))
            return kept[-1]

        keeping = self._like(call=call)
        given = y_true, y_pred, sample_weight
        value = CompiledLoss(keeping).numerator(*given)
        return value, self.denominator(kept[-1], *given)
