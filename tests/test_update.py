"""One update: models whose layers move, or add, what an update must not mix up."""

import keras
import numpy as np
import pytest
from helpers import BACKEND, array
from keras import layers, ops

from gradient_accumulator import accumulate

pytestmark = pytest.mark.core


class Own(layers.Dense):
    """A layer of a user's class, whose gradients may be sparse on TensorFlow."""


class SquaredSums(layers.Layer):
    """Adds a loss with an axis, which Keras sums."""

    def call(self, x):
        self.add_loss(0.01 * ops.sum(ops.square(x), axis=-1))
        return x


def sgd():
    return keras.optimizers.SGD(0.1)


def trained(between, microbatch_size=None, optimizer=sgd, **compiling):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [layers.Input((6,)), layers.Dense(5), between(), Own(3, activation="tanh")]
    )
    model.compile(optimizer(), "mse", **compiling)
    before = [array(weight) for weight in model.weights]
    if microbatch_size is not None:
        accumulate(model, microbatch_size=microbatch_size)
    r = np.random.default_rng(0)
    x, y = r.normal(size=(16, 6)), r.normal(size=(16, 3))
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    return before, [array(weight) for weight in model.weights]


def check(between, **arguments):
    before, expected = trained(between, **arguments)
    _, found = trained(between, microbatch_size=3, **arguments)
    for start, plain, ours in zip(before, expected, found):
        moved = np.abs(plain - start).max()
        assert np.abs(plain - ours).max() <= 1e-5 * max(moved, 1e-3)


def test_spectral_normalization_beside_a_layer_of_ones_own():
    check(lambda: layers.SpectralNormalization(layers.Dense(4)))


def test_additional_losses_with_an_axis():
    check(SquaredSums)


@pytest.mark.skipif(BACKEND == "jax", reason="has float64 by a flag of the process")
def test_additional_losses_where_floats_are_of_64_bits():
    floatx, before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        check(SquaredSums)
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(before)


def test_a_regularizer_of_weights_in_eager_execution():
    check(lambda: layers.Dense(4, kernel_regularizer="l2"), run_eagerly=True)


def test_a_loss_scale_in_eager_execution():
    check(
        SquaredSums,
        optimizer=lambda: keras.optimizers.LossScaleOptimizer(sgd()),
        run_eagerly=True,
        metrics=["mae"],
    )


@pytest.mark.skipif(BACKEND != "torch", reason="Keras raises, or keeps its graph")
def test_layers_frozen_between_two_fits_without_compile():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([layers.Input((6,)), layers.Dense(5), layers.Dense(3)])
    model.compile("sgd", "mse")
    accumulate(model, microbatch_size=3)
    x, y = np.ones((8, 6)), np.ones((8, 3))
    model.fit(x, y, verbose=0)
    frozen, trained = model.layers
    frozen.trainable = False
    before = [array(layer.kernel) for layer in (frozen, trained)]
    model.fit(x, y, verbose=0)
    after = [array(layer.kernel) for layer in (frozen, trained)]
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 0
