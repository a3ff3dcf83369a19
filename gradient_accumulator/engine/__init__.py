"""An update's operations, one engine a backend; only the active one's is imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gradient_accumulator.devices import backend

if TYPE_CHECKING:
    from gradient_accumulator.engine.engine_base import Engine
    from gradient_accumulator.engine.optimizer_base import Accumulators

__all__ = ["new_accumulators", "new_engine"]


def new_engine() -> Engine:
    """A new engine of the backend that Keras runs on.

    Raises:
        NotImplementedError: If Keras runs on a backend that does not train.
    """
    return importlib.import_module(f"{__name__}.{backend()}").ENGINE()


def new_accumulators() -> Accumulators:
    """New operations of `GradientAccumulateOptimizer`, for the same backend."""
    name = f"{__name__}.{backend()}_accumulators"
    return importlib.import_module(name).ACCUMULATORS()
