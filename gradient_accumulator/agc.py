"""Adaptive gradient clipping: it bounds gradients relative to the norm of the weights.

Brock, De, Smith and Simonyan 2021, "High-Performance Large-Scale Image Recognition
Without Normalization", arXiv:2102.06171, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gradient_accumulator import devices
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras, ops
from gradient_accumulator.received import check_of_backend, described

# A layer, its name or that of a variable, or a function of a variable.
Excluded = Any


def compute_norm(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """Returns the L2 norm of a tensor over some of its axes.

    Args:
        x: Tensor of a float dtype.
        axis: Int or tuple of ints, the axes to sum squares over; None for all.
        keepdims: Whether these axes stay, with length 1.

    Returns:
        Tensor of `x`'s dtype; for half precision of float32, in which the squares do
        not overflow.
    """
    x = ops.convert_to_tensor(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if dtype in ("float16", "bfloat16"):
        x = ops.cast(x, "float32")
    return ops.sqrt(ops.sum(ops.square(x), axis=axis, keepdims=keepdims))


def unitwise_norm(x: Any) -> Any:
    """Returns the L2 norms of a weight's units. Each unit makes one output.

    | rank | examples | norm over |
    |---|---|---|
    | 0, 1, and more where one axis only is longer than 1 | bias, gain | all axes |
    | 2, 3 | dense and attention kernels | axis 0 |
    | from 4 up | convolution kernels | all axes but the last |

    Source: Brock et al. 2021, equation 3. The authors' code and
    `optax.adaptive_grad_clip` have the same axes.

    Args:
        x: Tensor of a float dtype, with Keras's order of axes.

    Returns:
        Tensor of `x`'s rank. The axes that were summed over have length 1.
    """
    x = ops.convert_to_tensor(x)
    shape = tuple(x.shape)
    axis: Any
    if sum(length != 1 for length in shape) <= 1:
        axis = tuple(range(len(shape)))
    elif len(shape) <= 3:
        axis = 0
    else:
        axis = tuple(range(len(shape) - 1))
    return compute_norm(x, axis=axis, keepdims=True) if shape else ops.abs(x)


def adaptive_clip_grad(
    parameters: Iterable,
    gradients: Iterable,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    *,
    agc_exclude: Excluded = None,
) -> list:
    """Clip gradients unit by unit, to a multiple of the norm of the unit's weights.

        gradient * min(1, clip_factor * max(|weights|, eps) / |gradient|)

    If you accumulate, clip the finished gradient of an update, once: clipped gradients
    of micro-batches add up to another gradient. `accumulate(model, ..., use_agc=True)`
    and `GradientAccumulateOptimizer(..., use_agc=True)` do so. In a loop of your own,
    call this function between `accumulated_value_and_grad` and the optimizer. It has no
    side effects, and may be called in `jax.jit` and in a `tf.function`.

    Source: Brock et al. 2021, equation 3.

    Args:
        parameters: The weights: Keras variables, or tensors of the active backend,
            such as `module.parameters()`.
        gradients: One tensor for each parameter, or None if it has no gradient.
        clip_factor: Positive number, the largest ratio of the two norms (the paper's
            lambda; 0.01 for batches of up to 4096).
        eps: Positive number. A smaller norm of weights counts as this number, so that
            weights that begin at zero can move.
        agc_exclude: The parameters that are not clipped: a layer, a name (of a layer or
            variable), a function of a parameter that returns a bool, or a list of
            these. The paper leaves out the last, linear layer.

    Returns:
        The list of clipped gradients. TensorFlow's sparse gradients become dense.

    Raises:
        TypeError: If a number or an entry of `agc_exclude` has a wrong type, or tensors
            belong to another framework than the one that Keras runs on.
        ValueError: If the lists have different lengths, a number is not positive, or
            `agc_exclude` names a layer or variable that is not among the parameters.

    Example:

    ```python
    loss, gradients = value_and_grad(model.trainable_variables, batch)
    gradients = adaptive_clip_grad(model.trainable_variables, gradients)
    optimizer.apply(gradients, model.trainable_variables)
    ```
    """
    parameters, gradients = list(parameters), list(gradients)
    check_of_backend("parameters", parameters)
    check_of_backend("gradients", gradients)
    if len(parameters) != len(gradients):
        raise ValueError(
            "There must be one gradient for each parameter. Received: "
            f"{len(gradients)} gradients for {len(parameters)} parameters"
        )
    clipping = AdaptiveClipping(clip_factor, eps, agc_exclude)
    clipping.check_excluded(parameters)
    return clipping.clip(parameters, gradients)


@dataclass(frozen=True)
class AdaptiveClipping:
    """The settings of adaptive clipping, checked.

    Args:
        clip_factor: As for `adaptive_clip_grad`.
        eps: As for `adaptive_clip_grad`.
        agc_exclude: As for `adaptive_clip_grad`; the attribute is a tuple.
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    agc_exclude: Excluded = None

    def __post_init__(self):
        for name in ("clip_factor", "eps"):
            _check_positive(name, getattr(self, name))
        exclude = self.agc_exclude
        if exclude is None:
            exclude = ()
        elif not isinstance(exclude, (list, tuple, set, frozenset)):
            exclude = (exclude,)
        for entry in exclude:
            if not isinstance(entry, str) and not callable(entry):
                raise TypeError(
                    "Argument `agc_exclude` must be a layer, a name, a function of a "
                    "variable, or a list of these. Received: "
                    f"agc_exclude={described(entry)} (of type {type(entry).__name__})"
                )
        object.__setattr__(self, "agc_exclude", tuple(exclude))

    def clip(self, parameters: list, gradients: list, scale: Any = None) -> list:
        """Returns the clipped gradients, with None for a parameter without gradient.

        Args:
            parameters: Variables or tensors.
            gradients: A tensor or None for each parameter.
            scale: The number that the loss was multiplied by, or None.
        """
        excluded = self._excluded(parameters)
        return [
            gradient
            if gradient is None or trainer.overwrites(parameter) or i in excluded
            else self._clip(parameter, gradient, scale)
            for i, (parameter, gradient) in enumerate(zip(parameters, gradients))
        ]

    def clip_update(self, optimizer: Any, variables: list, gradients: list) -> list:
        """Returns the finished gradients of an update, clipped and still scaled.

        The optimizer unscales them later. The result is as if it had unscaled first.
        """
        scale = trainer.scale_loss(optimizer, ops.ones((), "float32"))
        return self.clip(variables, gradients, scale)

    def _clip(self, parameter, gradient, scale):
        gradient = devices.active().dense(gradient)
        norm = unitwise_norm(gradient)
        largest = ops.stop_gradient(unitwise_norm(ops.convert_to_tensor(parameter)))
        largest = self.clip_factor * ops.maximum(
            ops.cast(largest, norm.dtype), self.eps
        )
        if scale is not None:
            # The bound is scaled as the gradient is.
            largest = largest * ops.cast(scale, norm.dtype)
        factor = ops.where(norm < largest, 1.0, ops.divide_no_nan(largest, norm))
        clipped = ops.cast(gradient, norm.dtype) * factor
        return ops.cast(clipped, gradient.dtype)

    def _excluded(self, parameters: list) -> set[int]:
        """Returns the indices of the parameters that are not clipped."""
        return {i for entry in self.agc_exclude for i in _places(entry, parameters)}

    def check_excluded(self, parameters: list) -> None:
        """Raise if an entry names none of the parameters, which include frozen ones."""
        for entry in self.agc_exclude:
            named = isinstance(entry, (str, keras.layers.Layer))
            if named and not _places(entry, parameters):
                names = [trainer.path(p) or "a tensor without name" for p in parameters]
                raise ValueError(
                    "Argument `agc_exclude` must name layers or variables among these: "
                    f"{names}. Received: agc_exclude={described(entry)}"
                )

    def get_config(self, parameters: list | None) -> dict:
        """Returns the arguments that make equal settings for a saved model.

        Args:
            parameters: The variables, whose names stand for functions and layers; None
                before there are any.

        Raises:
            ValueError: If `agc_exclude` has a function and there are no parameters.
        """
        names: list[str] = []
        for entry in self.agc_exclude:
            if isinstance(entry, str):
                names.append(entry)
            elif parameters is not None:
                places = _places(entry, parameters)
                names.extend(trainer.path(parameters[i]) for i in places)
            elif isinstance(entry, keras.layers.Layer):
                names.append(entry.name)
            else:
                raise ValueError(
                    "A function as `agc_exclude` is saved as the names of variables "
                    "that it excludes. They are not known before the optimizer is "
                    "built. "
                    f"Received: agc_exclude={described(entry)}"
                )
        return {
            "clip_factor": self.clip_factor,
            "eps": self.eps,
            "agc_exclude": list(dict.fromkeys(names)),
        }


def _places(entry: Excluded, parameters: list) -> list[int]:
    """Returns the indices of the parameters that an entry of `agc_exclude` means."""
    if isinstance(entry, keras.layers.Layer):
        own = {id(weight) for weight in entry.weights}
        places = [i for i, p in enumerate(parameters) if id(p) in own]
        # A clone of the model has another layer, of the same name.
        return places or _places(entry.name, parameters)
    if isinstance(entry, str):
        paths = [trainer.path(p) for p in parameters]
        return [
            i
            for i, path in enumerate(paths)
            if entry == path or entry in path.split("/")
        ]
    return [i for i, p in enumerate(parameters) if entry(p)]


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"Argument `{name}` must be a positive number. "
            f"Received: {name}={described(value)} (of type {type(value).__name__})"
        )
    if not 0 < value < math.inf:
        raise ValueError(
            f"Argument `{name}` must be a positive number. Received: {name}={value}"
        )
