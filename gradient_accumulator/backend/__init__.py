"""The loop over micro-batches, one file a backend; only the active backend's is
imported.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from gradient_accumulator.backend.api import KERAS_2, keras

if TYPE_CHECKING or not KERAS_2:
    from gradient_accumulator.backend.keras3 import trainer as trainer
else:
    from gradient_accumulator.backend.keras2 import trainer as trainer

__all__ = ["active", "trainer"]


@functools.cache  # it is asked for where TensorFlow would convert what it runs
def active() -> ModuleType:
    """The module of the backend that Keras runs on.

    Raises:
        NotImplementedError: If Keras runs on a backend that does not train.
    """
    name = keras.backend.backend()
    if name not in ("tensorflow", "jax", "torch"):
        raise NotImplementedError(
            "Training in micro-batches needs a Keras backend that trains: set "
            "KERAS_BACKEND to 'tensorflow', 'jax' or 'torch' before Keras is "
            f"imported. Received: keras.backend.backend()={name!r}"
        )
    return importlib.import_module(f"{__name__}.{name}")
