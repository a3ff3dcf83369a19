"""What is private to Keras, or differs between its versions."""

from typing import TYPE_CHECKING

from gradient_accumulator.compat.api import KERAS_2

if TYPE_CHECKING or not KERAS_2:
    from gradient_accumulator.compat import keras3_internals as internals
    from gradient_accumulator.compat.keras3_loss import CompiledLoss
    from gradient_accumulator.compat.keras3_model import CompiledModel
    from gradient_accumulator.compat.keras3_step import OptimizerStep
else:
    from gradient_accumulator.compat import keras2_internals as internals
    from gradient_accumulator.compat.keras2_loss import CompiledLoss
    from gradient_accumulator.compat.keras2_model import CompiledModel
    from gradient_accumulator.compat.keras2_step import OptimizerStep

__all__ = ["CompiledLoss", "CompiledModel", "OptimizerStep", "internals"]
