"""The devices that train a model.

Each backend has one file, and only that of the active backend is imported.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from gradient_accumulator.compat.api import keras

if TYPE_CHECKING:
    from gradient_accumulator.devices.devices_base import Devices

__all__ = ["active", "backend"]


@functools.cache  # so that TensorFlow does not convert it in a traced caller
def active() -> Devices:
    """The devices of the backend that Keras runs on.

    Raises:
        NotImplementedError: If Keras runs on a backend that does not train.
    """
    name = backend()
    return importlib.import_module(f"{__name__}.{name}_devices").DEVICES


def backend() -> str:
    """The name of the backend that Keras runs on.

    Raises:
        NotImplementedError: If it is a backend that does not train.
    """
    name = keras.backend.backend()
    if name not in ("tensorflow", "jax", "torch"):
        raise NotImplementedError(
            "Training in micro-batches needs a Keras backend that trains: set "
            "KERAS_BACKEND to 'tensorflow', 'jax' or 'torch' before Keras is "
            f"imported. Received: keras.backend.backend()={name!r}"
        )
    return name
