"""What is private to Keras, or differs between its versions."""

from typing import TYPE_CHECKING

from gradient_accumulator.compat.api import KERAS_2

if TYPE_CHECKING or not KERAS_2:
    from gradient_accumulator.compat import keras3_trainer as trainer
else:
    from gradient_accumulator.compat import keras2_trainer as trainer

__all__ = ["trainer"]
