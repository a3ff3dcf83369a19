"""Gradient accumulation for Keras: training in micro-batches, exactly as on the batch.

`accumulate` makes an existing model train in micro-batches. `GradientAccumulateModel`
is a `keras.Model` that trains in micro-batches. For training loops of your own there
are `accumulated_value_and_grad` and `GradientAccumulateOptimizer`.
"""

from __future__ import annotations

from gradient_accumulator.agc import adaptive_clip_grad, compute_norm, unitwise_norm
from gradient_accumulator.callbacks import FlushGradients
from gradient_accumulator.functional import accumulated_value_and_grad
from gradient_accumulator.layers import AccumBatchNormalization
from gradient_accumulator.model import GradientAccumulateModel, accumulate
from gradient_accumulator.notices import AccumulationWarning
from gradient_accumulator.optimizer import GradientAccumulateOptimizer
from gradient_accumulator.utils import (
    replace_batchnorm_layers,
    restore_batchnorm_layers,
)

__all__ = [
    "AccumBatchNormalization",
    "AccumulationWarning",
    "FlushGradients",
    "GradientAccumulateModel",
    "GradientAccumulateOptimizer",
    "accumulate",
    "accumulated_value_and_grad",
    "adaptive_clip_grad",
    "compute_norm",
    "replace_batchnorm_layers",
    "restore_batchnorm_layers",
    "unitwise_norm",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """The installed version."""
    from importlib import metadata

    try:
        return metadata.version("gradient-accumulator")
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "0+not.installed"
