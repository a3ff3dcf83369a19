"""Gradient accumulation for any Keras training, exact to the big batch.

`accumulate` makes a model that exists train in micro-batches, and
`GradientAccumulateModel` is a `keras.Model` that does.
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
    """The version that is installed."""
    from importlib import metadata

    try:
        return metadata.version("gradient-accumulator")
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "0+not.installed"
