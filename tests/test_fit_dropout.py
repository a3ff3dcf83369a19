"""Dropout in micro-batches: seeds and masks."""

import keras
import numpy as np
import problems
import pytest
from helpers import COUNT, FULL, arrays, compiled, fit, size, ways
from keras import layers, ops

from gradient_accumulator import accumulate


class Masks(layers.Layer):
    """Adds up, for each column, the inputs that dropout keeps."""

    def build(self, shape):
        self.total = self.add_weight(
            shape=(shape[-1],), initializer="zeros", trainable=False
        )

    def call(self, x, training=False):
        if training:
            self.total.assign_add(ops.sum(x, axis=0))
        return x


@problems.seeded
def with_dropout():
    x = layers.Input((256,))
    h = Masks(name="masks")(layers.Dropout(0.5, seed=3)(x))
    return keras.Model(x, layers.Dense(1)(h))


@ways
@pytest.mark.core
def test_microbatches_draw_different_dropout_masks(way):
    model = compiled(way, with_dropout)
    microbatches = 4
    if way == "accum_steps":
        accumulate(model, accum_steps=microbatches)
        batch_size = 1
    else:
        accumulate(model, microbatch_size=1)
        batch_size = microbatches
    # Each micro-batch is one example of ones, so that a column's total counts the
    # micro-batches that kept it.
    fit(
        model,
        np.ones((microbatches, 256)),
        np.ones((microbatches, 1)),
        batch_size=batch_size,
    )
    total = ops.convert_to_numpy(model.get_layer("masks").total)
    kept = set(np.round(total / 2).astype(int))
    assert kept == set(range(microbatches + 1))


@ways
@pytest.mark.core
def test_two_runs_from_one_seed_are_equal(way):
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(11)
        model = compiled(way, with_dropout)
        x = problems.normal(problems.random(), COUNT, 256)
        fit(model, x, x[:, :1], batch_size=size(way), epochs=2, shuffle=True)
        runs.append(arrays(model.weights))
    for name, value in runs[0].items():
        np.testing.assert_array_equal(runs[1][name], value)


@ways
def test_seeds_go_on_between_updates(way):
    """Two updates also draw different masks, as in plain Keras."""
    model = compiled(way, with_dropout)
    fit(model, np.ones((FULL, 256)), np.ones((FULL, 1)), batch_size=size(way))
    first = ops.convert_to_numpy(model.get_layer("masks").total)
    fit(model, np.ones((FULL, 256)), np.ones((FULL, 1)), batch_size=size(way))
    second = ops.convert_to_numpy(model.get_layer("masks").total) - first
    assert not np.array_equal(first, second)
