"""Models that normalize their input, and their moving statistics."""

import keras
import numpy as np
import problems
from keras import layers

from gradient_accumulator import accumulate

from . import Batches, array

SIZES = (12, 7)  # of batches, whose last micro-batches of 5 are smaller

MICROBATCH = 5


def data(shape, dtype="float32", offset=3.0, spread=2.0):
    r = np.random.default_rng(0)
    scales = r.uniform(0.5, spread, shape[-1])
    return [
        ((r.normal(size=(n, *shape)) * scales + offset).astype(dtype), np.zeros((n, 1)))
        for n in SIZES
    ]


def model_of(normalization, shape, dtype="float32", mask=None):
    """A model that normalizes its input, so that its statistics are the data's."""
    keras.utils.set_random_seed(0)
    x = layers.Input(shape, dtype=dtype)
    h = layers.Masking(mask)(x) if mask is not None else x
    h = normalization(h)
    flatten = layers.Flatten() if mask is None else layers.GlobalAveragePooling1D()
    return keras.Model(x, layers.Dense(1)(flatten(h)))


def fit(model, batches, **arguments):
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(Batches(batches), shuffle=False, verbose=0, epochs=2, **arguments)
    return model


def cut(batches, size=MICROBATCH):
    return [microbatch for batch in batches for microbatch in problems.cut(batch, size)]


def in_microbatches(model, batches, way, **settings):
    if way == "microbatch_size":
        return fit(accumulate(model, microbatch_size=MICROBATCH, **settings), batches)
    return fit(accumulate(model, accum_steps=3, **settings), cut(batches))


def statistics(model):
    (layer,) = [x for x in model.layers if isinstance(x, layers.BatchNormalization)]
    return array(layer.moving_mean), array(layer.moving_variance)


def assert_same(model, reference, tolerance=1e-6):
    for got, expected in zip(statistics(model), statistics(reference), strict=True):
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)
