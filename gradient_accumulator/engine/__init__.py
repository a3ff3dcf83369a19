"""An update's operations, one engine a backend; only the active one's is imported."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from gradient_accumulator.devices import backend

__all__ = ["active"]


@functools.cache  # callers ask where TensorFlow would convert what runs
def active() -> ModuleType:
    """The engine of the backend that Keras runs on.

    Raises:
        NotImplementedError: If Keras runs on a backend that does not train.
    """
    return importlib.import_module(f"{__name__}.{backend()}")
