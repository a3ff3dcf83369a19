"""Two replicas give one device's results: wrapped optimizers, clipping, statistics.

The arguments name the checks.
"""

import os
import sys
import warnings

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf
from replicas import replicated

STRATEGY = replicated(2)
ONE = tf.distribute.get_strategy()

import keras
import numpy as np
from checks import check, run
from keras import layers

from gradient_accumulator import (
    AccumBatchNormalization,
    FlushGradients,
    GradientAccumulateOptimizer,
    accumulate,
)

r = np.random.default_rng(0)
x = r.normal(size=(40, 6)).astype("float32")
y = np.tanh(x[:, :3])


def build():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [layers.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(3)]
    )


def adam():
    # No clipping, because Keras clips each replica's gradient before it sums them.
    return keras.optimizers.Adam(0.05, epsilon=1e-2)


def trained(optimizer, size, strategy, **arguments):
    with strategy.scope():
        model = build()
        before = np.concatenate([w.ravel() for w in model.get_weights()])
        model.compile(optimizer(), "mse", metrics=["mae"])
    history = model.fit(
        x, y, batch_size=size, epochs=2, shuffle=False, verbose=0, **arguments
    ).history
    after = np.concatenate([w.ravel() for w in model.get_weights()])
    return before, after, model, history


def compare(name, ours, reference, before):
    off = np.abs(ours - reference).max() / np.abs(reference - before).max()
    assert off < 1e-5, f"{name}: off by {off}"


def around(steps):
    inner = GradientAccumulateOptimizer(adam(), steps)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)


def inside(steps):
    scaler = keras.optimizers.LossScaleOptimizer(adam(), initial_scale=8.0)
    return GradientAccumulateOptimizer(scaler, steps)


@check
def optimizers():
    """At the end of an epoch, the remaining micro-batches are flushed."""
    before, reference, _, _ = trained(adam, 16, ONE)  # 16, 16 and 8 examples
    for name, wrapped in {
        "wrapped": lambda: GradientAccumulateOptimizer(adam(), 4),
        "scaled inside": lambda: inside(4),
        "scaled around": lambda: around(4),
    }.items():
        _, ours, _, _ = trained(wrapped, 4, STRATEGY, callbacks=[FlushGradients()])
        compare(name, ours, reference, before)


@check
def saved_in_the_middle():
    """In the middle of an update, the sum over replicas is saved."""

    def eighth(strategy):
        return trained(lambda: GradientAccumulateOptimizer(adam(), 8), 4, strategy)

    _, _, model, _ = eighth(STRATEGY)
    optimizer = model.optimizer
    assert optimizer.pending == 4, optimizer.pending
    store: dict = {}
    optimizer.save_own_variables(store)
    _, _, single, _ = eighth(ONE)
    sums = [
        np.asarray(v)
        for v in single.optimizer.variables
        if "gradient_accumulator" in v.path
    ]
    saved = [
        store[str(i)]
        for i, v in enumerate(optimizer.variables)
        if "gradient_accumulator" in v.path
    ]
    for a, b in zip(saved, sums, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


class UnusedWeight(layers.Layer):
    def build(self, shape):
        self.unused = self.add_weight(shape=(3,), initializer="ones", name="unused")

    def call(self, x):
        return x


def decayed():
    inner = keras.optimizers.SGD(0.5, weight_decay=0.1)
    return GradientAccumulateOptimizer(inner, 4)


def compiled(strategy):
    with strategy.scope():
        model = keras.Sequential([*build().layers, UnusedWeight()])
        model.build((None, 6))
        model.compile(decayed(), "mse")
        model.optimizer.build(model.trainable_variables)
    return model


def go_on(model, start, stop, **arguments):
    microbatch = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(x[start:stop], y[start:stop], **microbatch, **arguments)


@check
def loaded_by_any_number_of_replicas():
    """They continue the saved update, even if a variable has no gradient."""
    warnings.filterwarnings("ignore", "Gradients do not exist")
    uninterrupted = compiled(ONE)
    start = np.concatenate([w.ravel() for w in uninterrupted.get_weights()])
    go_on(uninterrupted, 0, 40)
    assert uninterrupted.optimizer.pending == 2
    uninterrupted.optimizer.flush()
    reference = np.concatenate([w.ravel() for w in uninterrupted.get_weights()])
    assert np.array_equal(reference[-3:], start[-3:])
    for saved_on, loaded_on in (STRATEGY, ONE), (ONE, STRATEGY), (STRATEGY, STRATEGY):
        model = compiled(saved_on)
        go_on(model, 0, 24)
        model.optimizer.save_own_variables(store := {})
        loaded = compiled(loaded_on)
        loaded.set_weights(model.get_weights())
        loaded.optimizer.load_own_variables(store)
        assert loaded.optimizer.pending == 2
        go_on(loaded, 24, 40)
        loaded.optimizer.flush()
        ours = np.concatenate([w.ravel() for w in loaded.get_weights()])
        counts = [s.num_replicas_in_sync for s in (saved_on, loaded_on)]
        compare(f"saved and loaded on {counts} replicas", ours, reference, start)
        assert np.array_equal(ours[-3:], start[-3:])


CLIP = {"use_agc": True, "clip_factor": 0.02, "eps": 1e-2}


def in_microbatches(way, size, strategy, **settings):
    with strategy.scope():
        model = accumulate(build(), **{way: size}, **settings)
        model.compile(adam(), "mse")
    batch = 16 if way == "microbatch_size" else 8
    model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0)
    return np.concatenate([w.ravel() for w in model.get_weights()])


@check
def clipped():
    """Clipping acts on the sum over replicas, once."""
    before = np.concatenate([w.ravel() for w in build().get_weights()])
    unclipped = in_microbatches("microbatch_size", 4, ONE)
    clipped = in_microbatches("microbatch_size", 4, ONE, **CLIP)
    assert np.abs(clipped - unclipped).max() > 0.1 * np.abs(unclipped - before).max()
    for way, size in (("microbatch_size", 4), ("accum_steps", 2)):
        compare(
            f"clipped, {way}",
            in_microbatches(way, size, STRATEGY, **CLIP),
            clipped,
            before,
        )
    _, ours, _, _ = trained(
        lambda: GradientAccumulateOptimizer(adam(), 4, **CLIP),
        4,
        STRATEGY,
        callbacks=[FlushGradients()],
    )
    compare("clipped by the optimizer", ours, clipped, before)


def normalized(normalization, way, size, strategy):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([layers.Input((6,)), normalization, layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
    if way is not None:
        accumulate(model, **{way: size})
    batch = 8 if way == "accum_steps" else 16
    model.fit(x + 1, y, batch_size=batch, epochs=2, shuffle=False, verbose=0)
    return model


def statistics_first(model):
    (layer,) = (x for x in model.layers if isinstance(x, layers.BatchNormalization))
    return layer.moving_mean, layer.moving_variance


@check
def statistics():
    """Statistics are pooled over micro-batches and replicas, and equal on each."""
    reference = normalized(layers.BatchNormalization(momentum=0.5), None, None, ONE)
    for synchronized in (False, True):
        for way, size in (("microbatch_size", 4), ("accum_steps", 2)):
            layer = AccumBatchNormalization(momentum=0.5, synchronized=synchronized)
            model = normalized(layer, way, size, STRATEGY)
            for a, b in zip(statistics_first(model), statistics_first(reference)):
                values = STRATEGY.experimental_local_results(a.value)
                assert len(values) == 2
                for value in values:
                    off = np.abs(value.numpy() - np.asarray(b)).max()
                    assert off < 1e-6, (
                        f"synchronized={synchronized}, {way}: off by {off}"
                    )


@check
def flushed_statistics():
    """A flush joins the pools of all replicas; 16 of 24 examples are an update."""
    for callbacks in [], [FlushGradients()]:
        with STRATEGY.scope():
            keras.utils.set_random_seed(0)
            layer = AccumBatchNormalization(accum_steps=4, momentum=0.5)
            model = keras.Sequential([layers.Input((6,)), layer, layers.Dense(3)])
            inner = keras.optimizers.SGD(0.1)
            model.compile(GradientAccumulateOptimizer(inner, 4), "mse")
        go_on(model, 0, 24, callbacks=callbacks)
        model.optimizer.flush()
        assert (model.optimizer.pending, layer.pending) == (0, 0)
        expected = (x[:16].mean(axis=0) / 2 + x[16:24].mean(axis=0)) / 2
        for value in STRATEGY.experimental_local_results(layer.moving_mean.value):
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-6)


@check
def synchronized():
    """Each replica has one micro-batch, so that the batch is normalized at once."""
    reference = normalized(layers.BatchNormalization(momentum=0.5), None, None, ONE)
    for normalization in (layers.BatchNormalization, AccumBatchNormalization):
        layer = normalization(momentum=0.5, synchronized=True)
        model = normalized(layer, "microbatch_size", 8, STRATEGY)
        for a, b in zip(model.weights, reference.weights, strict=True):
            off = np.abs(np.asarray(a) - np.asarray(b)).max()
            assert off < 1e-6, f"{normalization.__name__}, {a.path}: off by {off}"


if __name__ == "__main__":
    run(sys.argv[1:])
