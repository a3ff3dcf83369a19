"""What the backends' files share."""

from __future__ import annotations

import inspect
from typing import Any

import keras


def new_accumulator(optimizer: Any, variable: keras.Variable, dtype: str):
    """A variable of an optimizer that sums one variable's gradients."""
    path = getattr(variable, "path", None) or variable.name
    arguments = {}
    # Older versions of Keras take the layout from the variable's path.
    if "layout" in inspect.signature(optimizer.add_variable).parameters:
        arguments["layout"] = getattr(variable, "_layout", None)
    return optimizer.add_variable(
        tuple(variable.shape),
        dtype=dtype,
        name=f"{path.replace('/', '_').replace(':', '_')}_gradient_accumulator",
        **arguments,
    )
