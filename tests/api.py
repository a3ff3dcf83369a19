"""Keras in the tests: Keras 3, or Keras 2 by the names of Keras 3."""

from gradient_accumulator.compat.api import KERAS_2, keras, ops

__all__ = ["KERAS_2", "keras", "layers", "ops"]

layers = keras.layers

if KERAS_2:
    import types

    import tensorflow as tf

    more = {
        "any": tf.reduce_any,
        "matmul": tf.matmul,
        "mean": tf.reduce_mean,
        "transpose": tf.transpose,
    }
    ops = types.SimpleNamespace(**more | vars(ops))
