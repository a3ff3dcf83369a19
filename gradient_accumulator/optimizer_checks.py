"""Checks of what `GradientAccumulateOptimizer` is given."""

from __future__ import annotations

import math
from typing import Any

from gradient_accumulator.compat.api import keras
from gradient_accumulator.received import check_of_backend, described
from gradient_accumulator.settings import check_float_dtype

REDUCTIONS = ("MEAN", "SUM")


def check_variables(name: str, variables: list) -> None:
    """Raise unless all are variables that Keras's optimizers can update.

    Args:
        name: Name of the argument.
        variables: The argument's entries.
    """
    check_of_backend(name, variables)
    if keras.backend.backend() == "tensorflow":  # Keras takes its `tf.Variable`s too
        return
    others = [v for v in variables if not isinstance(v, keras.Variable)]
    if others:
        raise TypeError(
            f"Argument `{name}` must hold Keras's variables, such as "
            "`model.trainable_variables`, because Keras's optimizers update no others. "
            "With optimizers of PyTorch or optax, take the gradients from "
            f"`accumulated_value_and_grad`. Received: {name}={described(others)}"
        )


def check_weight(weight):
    if isinstance(weight, (bool, str)):
        raise TypeError(
            "Argument `weight` must be a number or a scalar tensor. "
            f"Received: weight={described(weight)} (of type {type(weight).__name__})"
        )
    if isinstance(weight, (int, float)) and not (0 <= weight < math.inf):
        raise ValueError(
            "Argument `weight` must be finite and not negative. "
            f"Received: weight={weight}"
        )
    if tuple(getattr(weight, "shape", ())) != ():
        raise ValueError(
            "Argument `weight` must be a number or a scalar tensor. "
            f"Received: weight of shape {tuple(weight.shape)}"
        )


def check_gradients(grads, variables):
    if len(grads) != len(variables):
        raise ValueError(
            "There must be one gradient for each variable. Received: "
            f"{len(grads)} gradients for {len(variables)} variables"
        )
    for gradient, variable in zip(grads, variables):
        # TensorFlow may not know a shape; sparse gradients are not checked.
        if (
            gradient is None
            or hasattr(gradient, "dense_shape")
            or getattr(gradient.shape, "rank", 0) is None
        ):
            continue
        shape, wanted = tuple(gradient.shape), tuple(variable.shape)
        if len(shape) != len(wanted) or any(
            a != b and a is not None for a, b in zip(shape, wanted)
        ):
            raise ValueError(
                "A gradient needs its variable's shape. Received: a gradient of shape "
                f"{shape} for {names_of([variable])} of shape {wanted}"
            )


def names_of(variables) -> list[str]:
    return [getattr(v, "path", None) or v.name for v in variables]


def check_settings(reduction: Any, accum_dtype: Any) -> None:
    """Raise if `GradientAccumulateOptimizer` cannot take these arguments."""
    check_float_dtype(accum_dtype)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(
            "Argument `reduction` must be 'MEAN' or 'SUM'. "
            f"Received: reduction={described(reduction)}"
        )
