"""What the backends' files share."""

from __future__ import annotations

from typing import Any

import keras


def new_accumulator(optimizer: Any, variable: keras.Variable, dtype: str):
    """A variable of an optimizer that sums one variable's gradients."""
    path = getattr(variable, "path", None) or variable.name
    return optimizer.add_variable(
        tuple(variable.shape),
        dtype=dtype,
        name=f"{path.replace('/', '_').replace(':', '_')}_gradient_accumulator",
        layout=getattr(variable, "_layout", None),
    )
