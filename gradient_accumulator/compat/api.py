"""The Keras in use, by Keras 3's names: `keras` and `ops`.

It is Keras 2 if TensorFlow uses that (by `TF_USE_LEGACY_KERAS`), or if the installed
package `keras` is Keras 2, as beside TensorFlow up to 2.15; otherwise it is Keras 3.
All code of a process uses one Keras, which is `tf.keras` too.
"""

from __future__ import annotations

import importlib
import os
from importlib import metadata
from typing import TYPE_CHECKING, Any


def _uses_keras_2() -> bool:
    # TensorFlow reads these values as true.
    if os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "true", "True"):
        return True
    try:
        version = metadata.version("keras")
    except metadata.PackageNotFoundError:  # a nightly build has another name
        version = importlib.import_module("keras").__version__
    return version.startswith("2.")


KERAS_2 = _uses_keras_2()

if TYPE_CHECKING or not KERAS_2:
    import keras as keras
    from keras import ops as ops
else:
    from gradient_accumulator.compat.keras2_names import keras as keras
    from gradient_accumulator.compat.keras2_names import ops as ops


def is_keras_own(function: Any) -> bool:
    """Whether a class or method comes from Keras itself, not from a user's subclass."""
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] in ("keras", "tf_keras")
