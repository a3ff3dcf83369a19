"""The step of an optimizer of Keras 2."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from gradient_accumulator.compat.keras2_names import keras


class OptimizerStep:
    """The step of an optimizer, and the scale of the loss that it wants.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    def scaled(self, loss: Any) -> Any:
        """Returns the loss, multiplied by the optimizer's scale."""
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            return self.optimizer.get_scaled_loss(loss)
        return loss

    def apply_scaled(self, gradients: list, variables: list) -> None:
        """Make one step of the optimizer, with gradients of the scaled loss."""
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        self.optimizer.apply_gradients(list(zip(gradients, variables)))

    def apply(self, pairs: list, aggregated: bool = False) -> None:
        """Make one step of the optimizer, with gradients of the loss itself.

        Args:
            pairs: Pairs of a gradient, or None, and its variable.
            aggregated: Whether the gradients are summed over replicas already.
        """
        keywords: dict[str, bool] = {}
        if aggregated and isinstance(self.optimizer, keras.optimizers.legacy.Optimizer):
            keywords["experimental_aggregate_gradients"] = False
        elif aggregated:
            keywords["skip_gradients_aggregation"] = True
        # The method of its class, because the object may have one that accumulates.
        type(self.optimizer).apply_gradients(self.optimizer, pairs, **keywords)

    def build(self, variables: list) -> None:
        """Create the optimizer's variables."""
        if isinstance(self.optimizer, keras.optimizers.legacy.Optimizer):
            self.optimizer._create_all_weights(variables)
        else:
            self.optimizer.build(variables)

    def add_variable(
        self, shape: tuple, dtype: str, name: str, like: Any = None, **arguments
    ) -> tf.Variable:
        """Returns a new variable of the optimizer, filled with zeros.

        Args:
            shape: The variable's shape.
            dtype: Its dtype.
            name: Its name.
            like: Not used on Keras 2.
            **arguments: Arguments of `tf.Variable`.
        """
        variable = tf.Variable(
            lambda: tf.zeros(shape, dtype), trainable=False, name=name, **arguments
        )
        self.optimizer._variables.append(variable)
        return variable

    @property
    def may_skip(self) -> bool:
        """Whether the optimizer skips updates that are not finite."""
        return self._dynamic_scaler() is not None

    def _dynamic_scaler(self):
        optimizer = self.optimizer
        while optimizer is not None:
            if (
                isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
                and optimizer.dynamic
            ):
                return optimizer
            optimizer = getattr(optimizer, "inner_optimizer", None)
        return None

    def position(self) -> Any:
        """The current scale, None if the optimizer skips no updates."""
        scaler = self._dynamic_scaler()
        return None if scaler is None else tf.identity(scaler.loss_scale)

    def skipped_since(self, position: Any) -> Any:
        """Whether the optimizer skipped an update since `position`.

        A skipped update lowers the scale, unless it is 1, and restarts the counter.
        """
        scaler = self._dynamic_scaler()
        return (scaler.loss_scale <= position) & tf.equal(scaler.dynamic_counter, 0)
