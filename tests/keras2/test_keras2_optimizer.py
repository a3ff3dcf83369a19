"""On Keras 2: the optimizer wrapper as the documentation of version 0.5.2 shows it."""

import re

import numpy as np
import pytest
import tensorflow as tf
from api import KERAS_2

if not KERAS_2:
    pytest.skip("of Keras 2 only", allow_module_level=True)

from helpers import Batches
from helpers.keras2 import (
    EXAMPLES,
    HDF5_IS_OLD,
    LEGACY,
    K,
    assert_same,
    compiled,
    data,
    fit,
    network,
    values,
    wrapped,
)
from problems import cut

from gradient_accumulator import FlushGradients, GradientAccumulateOptimizer, accumulate

layers, optimizers = tf.keras.layers, tf.keras.optimizers

OPTIMIZERS = {
    "name": lambda: "Adam",
    "adam": lambda: optimizers.Adam(0.1, clipnorm=0.1),
    "schedule": lambda: optimizers.SGD(
        optimizers.schedules.ExponentialDecay(0.4, 1, 0.6), momentum=0.9
    ),
    "averages": lambda: optimizers.AdamW(0.1, use_ema=True),
    "legacy_adam": lambda: LEGACY.Adam(0.1, clipvalue=0.01),
    "legacy_sgd": lambda: LEGACY.SGD(0.1, momentum=0.9, global_clipnorm=0.1),
    "legacy_decay": lambda: LEGACY.RMSprop(0.01, decay=0.3, epsilon=1e-2),
    "legacy_schedule": lambda: LEGACY.Adagrad(
        optimizers.schedules.PiecewiseConstantDecay([1, 2], [0.4, 0.2, 0.1])
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_wrapper(name):
    reference = fit(compiled(network(), OPTIMIZERS[name]()))
    optimizer = GradientAccumulateOptimizer(optimizer=OPTIMIZERS[name](), accum_steps=K)
    model = fit(compiled(network(), optimizer), EXAMPLES // K)
    assert_same(model, reference)
    assert int(optimizer.iterations) == int(reference.optimizer.iterations) == 3


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_loss_scaling(legacy, around):
    def scaled(optimizer):
        return tf.keras.mixed_precision.LossScaleOptimizer(optimizer)

    def adam():
        return (LEGACY if legacy else optimizers).Adam(0.1)

    reference = fit(compiled(network(), scaled(adam())))
    if around:
        optimizer = scaled(GradientAccumulateOptimizer(adam(), K))
    else:
        optimizer = GradientAccumulateOptimizer(scaled(adam()), K)
    model = fit(compiled(network(), optimizer), EXAMPLES // K)
    assert_same(model, reference)
    # If one micro-batch is not finite, the update is skipped and the scale is halved.
    scaler = optimizer if around else optimizer.inner_optimizer
    before, scale = values(model), float(scaler.loss_scale)
    x, y = data()
    y[5] = np.inf
    model.fit(x, y, batch_size=EXAMPLES // K, shuffle=False, verbose=0)
    for a, b in zip(values(model), before):
        np.testing.assert_array_equal(a, b)
    assert float(scaler.loss_scale) == scale / 2


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("wrapper", ["model", "optimizer"])
def test_mixed_precision(policy, wrapper):
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        head = {"dtype": "float32"}
        reference = compiled(network(**head), optimizers.Adam(0.01, epsilon=1e-3))
        if wrapper == "model":
            model = compiled(
                wrapped(network(**head), mixed_precision=True),
                optimizers.Adam(0.01, epsilon=1e-3),
            )
        else:
            adam = optimizers.Adam(0.01, epsilon=1e-3)
            if policy == "mixed_float16":
                adam = tf.keras.mixed_precision.LossScaleOptimizer(adam)
            model = compiled(
                network(**head), GradientAccumulateOptimizer(adam, accum_steps=K)
            )
    finally:
        tf.keras.mixed_precision.set_global_policy(None)  # the policy is `floatx` again
    # In half precision, sums of micro-batches are rounded in another way.
    assert_same(fit(model, EXAMPLES // K), fit(reference), tolerance=0.1)


def test_a_loss_scale_optimizer_around_flushes_and_resets():
    inner = GradientAccumulateOptimizer(optimizers.SGD(1.0), 3)
    scaler = tf.keras.mixed_precision.LossScaleOptimizer(inner)
    weight = tf.Variable(tf.ones(2))
    for finish, expected in (scaler.reset, 1), (scaler.flush, 0):
        scaler.apply_gradients([(tf.ones(2), weight)])
        assert inner.pending == 1
        finish()
        assert inner.pending == 0
        np.testing.assert_allclose(weight, expected)


@HDF5_IS_OLD
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("legacy", [False, True])
def test_saving_in_the_middle_of_an_accumulation(suffix, legacy, tmp_path):
    adam = (LEGACY if legacy else optimizers).Adam(0.1)
    model = compiled(network(), GradientAccumulateOptimizer(adam, K))
    x, y = data(4)
    model.fit(x, y, verbose=0)
    assert model.optimizer.pending == 1
    model.save(tmp_path / f"model{suffix}")
    loaded = tf.keras.models.load_model(tmp_path / f"model{suffix}", compile=True)
    assert type(loaded.optimizer.inner_optimizer) is type(adam)
    assert loaded.optimizer.pending == 1
    for each in (loaded, model):
        each.fit(*data(8), batch_size=4, shuffle=False, verbose=0)
    assert_same(loaded, model, tolerance=0)


def test_the_last_microbatches_of_an_epoch():
    x, y = data(10)  # 4, 4 and 2
    reference = compiled(network(), optimizers.Adam(0.1))
    reference.fit(x, y, batch_size=10, epochs=2, verbose=0)
    model = compiled(wrapped(accum_steps=5, warn=False), optimizers.Adam(0.1))
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert_same(model, reference)
    optimizer = GradientAccumulateOptimizer(optimizers.Adam(0.1), 5)
    model = compiled(network(), optimizer)
    microbatches = cut((x[:8], y[:8]), 4)
    model.fit(Batches(microbatches), epochs=2, verbose=0, callbacks=[FlushGradients()])
    assert int(optimizer.iterations) == 2
    assert optimizer.pending == 0


def test_flush_gradients_of_optimizers_that_a_model_holds():
    class Both(tf.keras.Model):
        """A model with its own `train_step`, and an optimizer for each layer."""

        def __init__(self, *optimizers):
            super().__init__()
            tf.keras.utils.set_random_seed(0)
            self.parts = [layers.Dense(3), layers.Dense(3)]
            self.own = optimizers

        def call(self, x):
            return sum(part(x) for part in self.parts)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = tf.reduce_mean(tf.square(self(x) - y))
            gradients = [tape.gradient(loss, p.trainable_variables) for p in self.parts]
            for optimizer, part, each in zip(self.own, self.parts, gradients):
                optimizer.apply_gradients(zip(each, part.trainable_variables))
            return {"loss": loss}

    def trained(size, wrap, flush):
        own = [wrap(optimizers.Adam(0.1)) for _ in range(2)]
        model = Both(*own)
        model(data()[0])
        for optimizer, part in zip(own, model.parts):
            optimizer.build(part.trainable_variables)
        model.compile()
        x, y = data(10)  # 6 and 4, in micro-batches of 2
        model.fit(
            x, y, batch_size=size, epochs=2, verbose=0, shuffle=False,
            callbacks=flush(own),
        )  # fmt: skip
        return values(model), own

    expected, _ = trained(6, lambda optimizer: optimizer, lambda own: [])
    got, own = trained(
        2,
        lambda optimizer: GradientAccumulateOptimizer(optimizer, 3),
        lambda own: [FlushGradients(*own)],
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert [int(o.iterations) for o in own] == [4, 4]
    with pytest.raises(ValueError, match=r"FlushGradients\(g_optimizer, .*Received: "):
        trained(2, lambda o: GradientAccumulateOptimizer(o, 3), lambda own: [
            FlushGradients()
        ])  # fmt: skip
    with pytest.raises(ValueError, match=r"takes optimizers.*Received: "):
        FlushGradients(optimizers.legacy.SGD(0.1))


@pytest.mark.parametrize("legacy", [False, True])
def test_repr(legacy):
    inner = (optimizers.legacy if legacy else optimizers).SGD(0.1)
    optimizer = GradientAccumulateOptimizer(inner, K)
    expected = "<GradientAccumulateOptimizer optimizer=SGD, accum_steps=3>"
    assert repr(optimizer) == expected
    optimizer.build(network().trainable_variables)
    assert repr(optimizer) == expected
    scaled = tf.keras.mixed_precision.LossScaleOptimizer(optimizers.SGD(0.1))
    text = repr(GradientAccumulateOptimizer(scaled, K))
    assert re.search(r"optimizer=LossScaleOptimizer\w*\(SGD\), accum_steps=3", text)


def test_generators_of_variables():
    def trained(kind):
        model = network()
        optimizer = GradientAccumulateOptimizer(optimizers.SGD(0.1, use_ema=True), 1)
        optimizer.build(kind(model.trainable_variables))
        x, y = data()
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        pairs = optimizer.compute_gradients(loss, kind(model.trainable_variables), tape)
        assert len(pairs) == len(model.trainable_variables)
        optimizer.apply_gradients(kind(pairs))
        optimizer.finalize_variable_values(kind(model.trainable_variables))
        return values(model)

    for a, b in zip(trained(iter), trained(list), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_learning_rate_is_found():
    """Version 0.5.2 failed: "Optimizer must have a lr attribute"."""
    optimizer = GradientAccumulateOptimizer(optimizers.SGD(0.5), K)
    scheduler = tf.keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    model = compiled(network(), optimizer)
    fit(model, EXAMPLES // K, callbacks=[scheduler])
    assert float(optimizer.lr) == float(optimizer.learning_rate) == 0.5 / 8
    plateau = tf.keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=9.0)
    fit(model, EXAMPLES // K, callbacks=[plateau])
    assert float(optimizer.learning_rate) < 0.5 / 8


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_mean_over_nothing_counts_for_nothing(steps, sparse):
    weight = tf.Variable(tf.ones((1, 2)))
    optimizer = GradientAccumulateOptimizer(optimizers.SGD(1.0), steps)
    for value, worth in [(1.0, 2.0), (np.nan, tf.constant(0.0))][-steps:]:
        gradient = tf.fill((1, 2), value)
        if sparse:
            gradient = tf.IndexedSlices(gradient, tf.constant([0]), (1, 2))
        optimizer.apply_gradients([(gradient, weight)], weight=worth)
    np.testing.assert_array_equal(weight, tf.ones((1, 2)) if steps == 1 else [[0, 0]])


@pytest.mark.parametrize("optimizer", [3, None, tf.keras.layers.Dense])
def test_what_is_no_optimizer(optimizer):
    with pytest.raises(TypeError, match=r"`optimizer`.* Received: optimizer="):
        GradientAccumulateOptimizer(optimizer, K)


def test_an_optimizer_that_accumulates_already():
    with pytest.raises(ValueError, match=r"accumulates already.* Received: "):
        GradientAccumulateOptimizer(GradientAccumulateOptimizer("SGD", 2), 2)
    model = compiled(network(), GradientAccumulateOptimizer("SGD", 2))
    accumulate(model, microbatch_size=2)
    with pytest.raises(ValueError, match=r"so does its optimizer.* Received: "):
        fit(model)
