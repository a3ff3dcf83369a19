"""Keras 2's batch normalization, for inputs of several ranks, and the saving of it."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from gradient_accumulator.compat.keras2_names import keras, ops

# The base of a layer's attribute that holds variables. It is saved with the layer,
# whose saved graphs use its variables. It is no layer, so that its variables are no
# weights.
State: Any = tf.__internal__.tracking.AutoTrackable


class Normalization(keras.layers.BatchNormalization):
    """Keras's layer, whose inference takes inputs of every rank that has the axis.

    Keras's own layer takes inputs of one rank only, for which it counts the axis from
    the front and chooses a kernel.
    """

    input_spec: Any
    _keras_spec: Any = None  # the spec of the inputs that Keras's own layer takes

    def build(self, input_shape):
        axes = self.axis if isinstance(self.axis, (list, tuple)) else [self.axis]
        super().build(input_shape)
        if len(axes) == 1:
            self._feature_axis = axes[0]
            self._keras_spec = self.input_spec
            (size,) = self.input_spec.axes.values()
            self.input_spec = keras.layers.InputSpec(
                min_ndim=max(2, axes[0] + 1), axes={axes[0]: size}
            )

    def call(self, inputs, training=None, mask=None):
        spec = self._keras_spec
        if spec is None or len(inputs.shape) == spec.ndim:
            return super().call(inputs, training=training, mask=mask)
        dtype = keras.backend.result_type(self.compute_dtype, "float32")
        mean, variance, offset, scale = (
            None if each is None else tf.cast(each, dtype)
            for each in (self.moving_mean, self.moving_variance, self.beta, self.gamma)
        )
        axis = self._feature_axis
        outputs = ops.batch_normalization(
            tf.cast(inputs, dtype), mean, variance, axis, offset, scale, self.epsilon
        )
        return tf.cast(outputs, self.compute_dtype)

    def get_config(self):
        config = super().get_config()
        if self._keras_spec is not None:
            config["axis"] = self._feature_axis
        return config


def feature_axis(layer: Any) -> int:
    """Returns the axis of features of a batch normalization layer."""
    if getattr(layer, "_keras_spec", None) is not None:
        return layer._feature_axis
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if len(axes) > 1:
        raise ValueError(
            "Argument `axis` must be one axis if batch normalization accumulates. "
            f"Received: axis={list(axes)} of layer {layer.name!r}"
        )
    return axes[0]


def forget(layer: Any) -> None:
    """Delete attributes that Keras's layer does not have, before it becomes one."""
    if layer._keras_spec is not None:
        layer.input_spec = layer._keras_spec
        del layer._keras_spec, layer._feature_axis
    layer._delete_tracking("_pool")
