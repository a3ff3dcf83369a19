"""`GradientAccumulateOptimizer`: accumulation in training loops of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradient_accumulator.compat.api import KERAS_2

if TYPE_CHECKING or not KERAS_2:
    from gradient_accumulator.compat import keras3_optimizer as optimizer
else:
    from gradient_accumulator.compat import keras2_optimizer as optimizer

__all__ = ["GradientAccumulateOptimizer"]

GradientAccumulateOptimizer = optimizer.GradientAccumulateOptimizer
