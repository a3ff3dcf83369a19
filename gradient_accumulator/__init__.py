"""Gradient accumulation for any Keras training, exact to the big batch.

`accumulate` makes a model that exists train in pieces, and
`GradientAccumulateModel` is a `keras.Model` that does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__all__ = [
    "AccumBatchNormalization",
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

# The command line chooses Keras's backend, and so may not import Keras before. Whoever
# else imports this package wants Keras to know its classes, to load their files.
_IS_COMMAND = Path(*sys.argv[:1]).stem == "gradient-accumulator"

if TYPE_CHECKING or not _IS_COMMAND:
    from gradient_accumulator.agc import (
        adaptive_clip_grad,
        compute_norm,
        unitwise_norm,
    )
    from gradient_accumulator.callbacks import FlushGradients
    from gradient_accumulator.gradients import accumulated_value_and_grad
    from gradient_accumulator.layers import AccumBatchNormalization
    from gradient_accumulator.model import GradientAccumulateModel, accumulate
    from gradient_accumulator.optimizer import (
        GradientAccumulateOptimizer,
    )
    from gradient_accumulator.utils import (
        replace_batchnorm_layers,
        restore_batchnorm_layers,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradient_accumulator import (
        agc,
        callbacks,
        gradients,
        layers,
        model,
        optimizer,
        utils,
    )

    modules = (model, optimizer, callbacks, gradients, agc, layers, utils)
    return next(vars(m)[name] for m in modules if hasattr(m, name))
