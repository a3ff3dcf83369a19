"""The step of an optimizer of Keras 3."""

from __future__ import annotations

import inspect
from typing import Any

import keras


class OptimizerStep:
    """The step of an optimizer, and the scale of the loss that it wants.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    def scaled(self, loss: Any) -> Any:
        """Returns the loss, multiplied by the optimizer's scale."""
        return self.optimizer.scale_loss(loss)

    def apply_scaled(self, gradients: list, variables: list) -> None:
        """Make one step of the optimizer, with gradients of the scaled loss."""
        self.optimizer.apply_gradients(zip(gradients, variables))

    def apply(self, pairs: list) -> None:
        """Make one step of the optimizer, with pairs of a gradient and its variable."""
        # The method of its class, because the object may have one that accumulates.
        type(self.optimizer).apply(self.optimizer, *zip(*pairs))

    def add_variable(
        self, shape: tuple, dtype: str, name: str, like: Any = None, **arguments
    ) -> keras.Variable:
        """Returns a new variable of the optimizer, filled with zeros.

        Args:
            shape: The variable's shape.
            dtype: Its dtype.
            name: Its name.
            like: A variable whose layout over devices it gets, or None.
            **arguments: Arguments of the optimizer's `add_variable`.
        """
        # Older versions of Keras take the layout from the variable's path.
        if "layout" in inspect.signature(self.optimizer.add_variable).parameters:
            arguments["layout"] = getattr(like, "_layout", None)
        return self.optimizer.add_variable(shape, dtype=dtype, name=name, **arguments)

    @property
    def may_skip(self) -> bool:
        """Whether the optimizer skips updates that are not finite."""
        return self._dynamic_scale() is not None

    def position(self) -> Any:
        """The current scale, None if the optimizer skips no updates."""
        scale = self._dynamic_scale()
        return None if scale is None else keras.ops.copy(scale.value)

    def skipped_since(self, position: Any) -> Any:
        """Whether the optimizer skipped an update since: it then lowers its scale."""
        return self._dynamic_scale().value < position

    def _dynamic_scale(self):
        optimizer = self.optimizer
        while optimizer is not None:
            if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                return optimizer.dynamic_scale
            optimizer = getattr(optimizer, "inner_optimizer", None)
        return None

    @property
    def scales_loss(self) -> bool:
        """Whether scaling the loss may read the optimizer's variables."""
        return (
            type(self.optimizer).scale_loss is not keras.optimizers.Optimizer.scale_loss
        )
