"""The model and the optimizer wrapper, under the module name of version 0.5."""

from gradient_accumulator.model import GradientAccumulateModel
from gradient_accumulator.optimizer import GradientAccumulateOptimizer

__all__ = ["GradientAccumulateModel", "GradientAccumulateOptimizer"]
