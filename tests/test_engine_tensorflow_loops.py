"""Loops with `tf.GradientTape` and an optimizer that accumulates."""

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND, array, assert_close
from helpers.loops import adam, assert_equal_weights, data

from gradient_accumulator import GradientAccumulateOptimizer

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="a TensorFlow loop")


@on_tensorflow
@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.core
def test_a_tape_in_a_tf_function(jit_compile):
    import tensorflow as tf

    def trained(optimizer, size):
        model = problems.mlp()()
        variables = model.trainable_variables
        before = model.get_weights()
        optimizer.build(variables)

        @tf.function(jit_compile=jit_compile)
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

        x, y = data()
        for _ in range(3):
            for i in range(0, len(x), size):
                step(x[i : i + size], y[i : i + size])
        return before, model.get_weights()

    before, reference = trained(adam(clipnorm=0.1), 8)
    _, ours = trained(GradientAccumulateOptimizer(adam(clipnorm=0.1), 4), 2)
    assert_equal_weights(ours, reference, before)


@on_tensorflow
@pytest.mark.core
def test_flush_in_a_tf_function():
    import tensorflow as tf

    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 3)
    weight = keras.Variable(np.ones(2, "float32"))
    optimizer.build([weight])

    @tf.function
    def epoch(count):
        for _ in tf.range(count):
            optimizer.apply([tf.ones(2)], [weight])
        optimizer.flush()

    epoch(tf.constant(4))
    assert_close({"w": array(weight)}, {"w": np.full(2, -1.0)})
    assert optimizer.pending == 0
