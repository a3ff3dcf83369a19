"""Models and data for tests in which `fit` fails, and comparisons of their state."""

import keras
import numpy as np
import problems
import pytest
from keras import layers, ops

from . import BACKEND, arrays

BASE = problems.mlp()

WAYS = {
    "microbatch_size": ({"microbatch_size": 2}, 8),
    "accum_steps": ({"accum_steps": 4}, 2),
}

ways = pytest.mark.parametrize("way", WAYS)


def compiled(build=BASE, **arguments):
    model = build()
    model.compile(keras.optimizers.SGD(0.3, 0.9), "mse", **arguments)
    return model


def data(count=16):
    return tuple(a[:count] for a in problems.each_size(pair, (16,))[0])


def pair(r, n):
    return problems.normal(r, n, problems.FEATURES), problems.normal(r, n, 3)


def fit(model, *args, **arguments):
    return model.fit(*args, **{"shuffle": False, "verbose": 0, **arguments})


def state(model):
    return arrays(model.weights) | {
        f"optimizer {name}": value
        for name, value in arrays(model.optimizer.variables).items()
    }


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


class BadExample(Exception):
    pass


def momentum_model():
    """A model that has trained, so that its optimizer has state to lose."""
    model = compiled()
    fit(model, *data(), batch_size=8)
    return model


class Fails(layers.Layer):
    """A layer that fails on a value above 100, on every backend in the way it can."""

    def call(self, x, training=False):
        if not training:
            return x
        if BACKEND == "tensorflow":
            import tensorflow as tf

            limit = tf.debugging.assert_less(x, 100.0)
            with tf.control_dependencies([limit] if limit is not None else []):
                return tf.identity(x)
        if BACKEND == "jax":
            import jax

            def check(x):
                if np.max(x) > 100:
                    raise BadExample
                return x

            jax.debug.callback(check, jax.lax.stop_gradient(x))
            return x
        if bool(ops.any(x > 100)):
            raise BadExample
        return x


@problems.seeded
def failing():
    x = layers.Input((problems.FEATURES,))
    h = layers.Dense(8, activation="tanh")(Fails()(x))
    counted = problems.CountsExamples()(layers.Dropout(0.5)(h))
    return keras.Model(x, layers.Dense(3)(counted))
