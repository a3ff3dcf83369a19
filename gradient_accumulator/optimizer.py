"""`GradientAccumulateOptimizer`: accumulation in training loops of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradient_accumulator.backend.api import KERAS_2

if TYPE_CHECKING or not KERAS_2:
    from gradient_accumulator.backend.keras3 import optimizer
else:
    from gradient_accumulator.backend.keras2 import optimizer

__all__ = ["GradientAccumulateOptimizer"]

GradientAccumulateOptimizer = optimizer.GradientAccumulateOptimizer
