"""`GradientAccumulateOptimizer` with loss scaling inside it or around it."""

import keras
import numpy as np
import problems
import pytest
from helpers import (
    array,
    arrays,
    assert_close,
    assert_same,
    core_on,
    even,
    named,
    train,
    with_optimizer,
)
from helpers.loops import data
from helpers.optimizers import fit, model_of, step

from gradient_accumulator import GradientAccumulateOptimizer

pytestmark = core_on("torch")


def around(optimizer, steps):
    """An optimizer like this `LossScaleOptimizer`, around one that accumulates."""
    config = optimizer.get_config()
    config["inner_optimizer"] = GradientAccumulateOptimizer(
        optimizer.inner_optimizer, steps
    )
    return type(optimizer)(**config)


@pytest.mark.parametrize("name", [p.name for p in problems.here() if p.scaler_around])
@pytest.mark.core
def test_a_loss_scale_optimizer_around(name):
    problem = named(name)
    batch, microbatches = even(problem)
    reference = train(problem, [batch])
    wrapped = with_optimizer(problem, lambda o: around(o, len(microbatches)))
    assert_same(train(wrapped, microbatches), reference)


@pytest.mark.parametrize("order", ["inside", "around"])
@pytest.mark.core
def test_an_overflow_in_one_microbatch_skips_the_update_and_lowers_the_scale_once(
    order,
):
    inner = keras.optimizers.SGD(0.1)
    if order == "inside":
        scaler = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
        optimizer = GradientAccumulateOptimizer(scaler, 3)
    else:
        accumulating = GradientAccumulateOptimizer(inner, 3)
        scaler = optimizer = keras.optimizers.LossScaleOptimizer(
            accumulating, initial_scale=8.0
        )
    weight = keras.Variable(np.ones(2, "float32"))
    optimizer.build([weight])
    for microbatch in [1.0, np.inf, 1.0]:
        step(optimizer, [np.full(2, 8 * microbatch, "float32")], [weight])
    assert_close({"w": array(weight)}, {"w": np.ones(2)})
    assert float(scaler.dynamic_scale.numpy()) == 4
    assert int(array(scaler.iterations)) == 0
    for _ in range(3):
        step(optimizer, [np.full(2, 4.0, "float32")], [weight])
    assert_close({"w": array(weight)}, {"w": np.full(2, 0.9)})
    assert float(scaler.dynamic_scale.numpy()) == 4


@pytest.mark.parametrize("inside", [False, True])
def test_the_policy_mixed_float16_puts_one_around(inside):
    def build():
        keras.utils.set_random_seed(0)
        dtype = keras.DTypePolicy("mixed_float16")
        return keras.Sequential(
            [keras.layers.Input((6,)), keras.layers.Dense(3, dtype=dtype)], name="m"
        )

    def trained(optimizer, size):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = build()
            model.compile(optimizer, "mse")
        finally:
            keras.config.set_dtype_policy("float32")
        x, y = data()
        model.fit(x, y, batch_size=size, shuffle=False, verbose=0, epochs=2)
        return model

    plain = trained(keras.optimizers.SGD(0.5), 12)
    ours = trained(GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), 3), 4)
    assert isinstance(ours.optimizer, keras.optimizers.LossScaleOptimizer)
    assert int(array(ours.optimizer.iterations)) == int(
        array(plain.optimizer.iterations)
    )
    assert int(array(ours.optimizer.step_counter)) == 4
    for a, b in zip(ours.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(a, b, atol=2e-3)  # float16 rounds the gradients


@pytest.mark.parametrize("order", ["around", "both"])
@pytest.mark.core
def test_a_loss_scale_optimizer_around_flushes_and_resets(order):
    inner = keras.optimizers.SGD(1.0)
    if order == "both":
        inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    inner = GradientAccumulateOptimizer(inner, 3)
    scaler = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    weight = keras.Variable(np.ones(2, "float32"))
    scaler.build([weight])
    step(scaler, [np.full(2, 8.0, "float32")], [weight])
    assert scaler.inner_optimizer.pending == 1
    scaler.reset()
    assert scaler.inner_optimizer.pending == 0
    for gradient, worth in (16.0, 1.0), (8.0, 3.0):
        step(scaler, [np.full(2, gradient, "float32")], [weight], weight=worth)
    scaler.flush()
    assert scaler.inner_optimizer.pending == 0
    np.testing.assert_allclose(array(weight), 1 - 1.25)


@pytest.mark.parametrize("scaled", [False, True])
def test_averages_of_the_weights_are_swapped(scaled):
    def trained(size, wrap):
        optimizer = wrap(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5))
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8)
        model = model_of(optimizer)
        callback = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        fit(model, size, epochs=1, callbacks=[callback])
        return arrays(model.weights)

    plain = trained(8, lambda inner: inner)
    ours = trained(2, lambda inner: GradientAccumulateOptimizer(inner, 4))
    assert_close(ours, plain)
