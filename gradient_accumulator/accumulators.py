"""Where version 0.5 had the two wrappers."""

from gradient_accumulator.model import GradientAccumulateModel
from gradient_accumulator.optimizer import GradientAccumulateOptimizer

__all__ = ["GradientAccumulateModel", "GradientAccumulateOptimizer"]
