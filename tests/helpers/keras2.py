"""Networks of Keras 2 that are wrapped and trained, and comparisons of them."""

import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator import GradientAccumulateModel

layers, optimizers = tf.keras.layers, tf.keras.optimizers

K, EXAMPLES = 3, 12


def data(examples=EXAMPLES):
    r = np.random.default_rng(0)
    x = r.normal(size=(examples, 6)).astype("float32")
    return x, r.normal(size=(examples, 3)).astype("float32")


def network(**arguments):
    tf.keras.utils.set_random_seed(0)
    x = tf.keras.Input((6,))
    h = layers.Dense(8, activation="tanh", kernel_regularizer="l2")(x)
    return tf.keras.Model(x, layers.Dense(3, **arguments)(h))


def values(model):
    return [np.asarray(tf.cast(w, "float32")) for w in model.weights]


def assert_same(model, reference, tolerance=1e-5):
    start = values(network())
    for a, b, c in zip(values(model), values(reference), start):
        moved = np.abs(b - c).max()
        assert np.abs(a - b).max() <= tolerance * moved + 1e-7


def fit(model, batch=EXAMPLES, **arguments):
    x, y = data()
    model.fit(x, y, batch_size=batch, epochs=3, shuffle=False, verbose=0, **arguments)
    return model


def wrapped(model=None, **arguments):
    model = network() if model is None else model
    arguments = {"accum_steps": K, **arguments}
    return GradientAccumulateModel(
        inputs=model.input, outputs=model.output, **arguments
    )


def compiled(model, optimizer, loss="mse", **arguments):
    model.compile(optimizer, loss, **arguments)
    return model


LEGACY = optimizers.legacy

HDF5_IS_OLD = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
