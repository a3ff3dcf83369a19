"""Descriptions of values in errors: they never show the numbers in a tensor."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from gradient_accumulator.compat.api import KERAS_2, keras

FRAMEWORKS = {
    "jax": "JAX",
    "jaxlib": "JAX",
    "tensorflow": "TensorFlow",
    "torch": "PyTorch",
}
# Keras's names of the frameworks.
BACKENDS = {"JAX": "jax", "TensorFlow": "tensorflow", "PyTorch": "torch"}
NUMBERS_AND_TEXT = (bool, int, float, complex, str, bytes, np.bool_)
SHOWN = 3  # the number of entries of a list or a dictionary that are shown
LENGTH = 120  # the most characters of one entry


def described(value: Any) -> str:
    """Returns the text by which an error shows a value.

    For a tensor that is its class, shape and dtype.
    """
    if isinstance(value, Mapping):
        entries = [f"{k!r}: {described(v)}" for k, v in islice(value.items(), SHOWN)]
        return "{" + _listed(entries, len(value)) + "}"
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = [described(each) for each in islice(value, SHOWN)]
        start, end = "()" if isinstance(value, tuple) else "[]"
        return start + _listed(entries, len(value)) + end
    if value is None or isinstance(value, NUMBERS_AND_TEXT):
        return _shortened(repr(value))
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _tensor(value)
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) or (
        _is_of_keras(value)
    ):
        return _shortened(repr(value))
    # The `repr` of a user's class may show all data that it holds.
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _listed(entries: list[str], count: int) -> str:
    return ", ".join(entries) + (f", ... ({count} in all)" if count > SHOWN else "")


def _shortened(text: str) -> str:
    return text if len(text) <= LENGTH else text[: LENGTH - 3] + "..."


def _tensor(value: Any) -> str:
    path = getattr(value, "path", None)
    name = f" {path!r}" if isinstance(path, str) else ""
    # TensorFlow does not always know the rank.
    rank_is_known = getattr(value.shape, "rank", 0) is not None
    shape = tuple(value.shape) if rank_is_known else "unknown"
    dtype = getattr(value.dtype, "name", value.dtype)
    return f"<{type(value).__name__}{name} of shape {shape}, {dtype}>"


def _is_of_keras(value: Any) -> bool:
    kinds = (keras.layers.Layer, keras.optimizers.Optimizer, keras.losses.Loss)
    return isinstance(value, kinds)


def check_of_backend(name: str, values: Iterable) -> None:
    """Raise if tensors belong to another framework than the one that Keras runs on.

    Args:
        name: Name of the argument.
        values: The argument's entries: tensors, variables, or other objects.
    """
    values = list(values)
    backend = keras.backend.backend()
    for kind in {type(value) for value in values}:
        framework = _framework(kind)
        if framework is None or BACKENDS[framework] == backend:
            continue
        running = next(f for f, b in BACKENDS.items() if b == backend)
        keras_3 = "use Keras 3, and " if KERAS_2 else ""
        raise TypeError(
            f"Argument `{name}` holds {_plural(kind)} of {framework}'s, and Keras runs "
            f"on {running}: {keras_3}set the environment variable "
            f"KERAS_BACKEND={BACKENDS[framework]} before Keras is imported, in a new "
            f"process. Received: {name}={described(values)}"
        )


def _framework(kind: type) -> str | None:
    """Returns the framework of a class of tensors, or None for any other class.

    For Keras's variables it is None, because they always fit Keras's backend.
    """
    roots = [cls.__module__.partition(".")[0] for cls in kind.__mro__]
    if roots[0] in ("keras", "tf_keras"):
        return None
    return next((FRAMEWORKS[root] for root in roots if root in FRAMEWORKS), None)


def _plural(kind: type) -> str:
    """Returns the plural noun for objects of a class."""
    if kind.__name__ == "Parameter":
        return "parameters"
    if kind.__name__.endswith("Variable"):
        return "variables"
    return "tensors" if hasattr(kind, "shape") else "objects"
