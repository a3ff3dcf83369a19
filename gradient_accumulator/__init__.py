"""Gradient accumulation for any Keras training, exact to the big batch.

`accumulate` makes a model that exists train in pieces, and
`GradientAccumulateModel` is a `keras.Model` that does.
"""

from __future__ import annotations

import sys as _sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING

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


def _is_command() -> bool:
    """Whether the command line is what runs: `gradient-accumulator`, or by `python -m`.

    It chooses Keras's backend, and so may not import Keras before. Whoever else imports
    this package wants Keras to know its classes, to load their files.
    """
    if _sys.argv[:1] == ["-m"]:  # Python looks for the module that it is to run
        module = _sys.orig_argv[len(_sys.orig_argv) - len(_sys.argv)]
        return module.removeprefix("-m") in (__name__, f"{__name__}.cli")
    return _Path(*_sys.argv[:1]).stem == "gradient-accumulator"


if TYPE_CHECKING or not _is_command():
    from gradient_accumulator.agc import (
        adaptive_clip_grad,
        compute_norm,
        unitwise_norm,
    )
    from gradient_accumulator.callbacks import FlushGradients
    from gradient_accumulator.gradients import accumulated_value_and_grad
    from gradient_accumulator.layers import AccumBatchNormalization
    from gradient_accumulator.model import GradientAccumulateModel, accumulate
    from gradient_accumulator.notices import AccumulationWarning
    from gradient_accumulator.optimizer import (
        GradientAccumulateOptimizer,
    )
    from gradient_accumulator.utils import (
        replace_batchnorm_layers,
        restore_batchnorm_layers,
    )


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradient_accumulator import (
        agc,
        callbacks,
        gradients,
        layers,
        model,
        notices,
        optimizer,
        utils,
    )

    modules = (model, optimizer, callbacks, gradients, agc, layers, notices, utils)
    return next(vars(m)[name] for m in modules if hasattr(m, name))


def _version() -> str:
    """The version that is installed."""
    from importlib import metadata

    try:
        return metadata.version("gradient-accumulator")
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "0+not.installed"
