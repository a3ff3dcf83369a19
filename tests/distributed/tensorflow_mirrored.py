"""Two replicas give what one device gives: wrapped optimizers, clipping, statistics."""

import os
import warnings

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

from replicas import replicated

STRATEGY = replicated(2)

import keras
import numpy as np
import tensorflow as tf
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
    # Not clipped: Keras clips each replica's gradient before it sums them.
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


def check(name, ours, reference, before):
    off = np.abs(ours - reference).max() / np.abs(reference - before).max()
    assert off < 1e-5, f"{name}: off by {off}"


def around(steps):
    inner = GradientAccumulateOptimizer(adam(), steps)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)


def inside(steps):
    scaler = keras.optimizers.LossScaleOptimizer(adam(), initial_scale=8.0)
    return GradientAccumulateOptimizer(scaler, steps)


one = tf.distribute.get_strategy()
before, reference, _, _ = trained(adam, 16, one)  # 16, 16 and 8 examples
for name, wrapped in {
    "wrapped": lambda: GradientAccumulateOptimizer(adam(), 4),
    "scaled inside": lambda: inside(4),
    "scaled around": lambda: around(4),
}.items():
    _, ours, model, history = trained(
        wrapped, 4, STRATEGY, callbacks=[FlushGradients()]
    )
    check(name, ours, reference, before)

# A save in the middle of an accumulation holds the replicas' sum.
_, _, model, _ = trained(lambda: GradientAccumulateOptimizer(adam(), 8), 4, STRATEGY)
optimizer = model.optimizer
assert optimizer.pending == 4, optimizer.pending
store: dict = {}
optimizer.save_own_variables(store)
_, _, single, _ = trained(lambda: GradientAccumulateOptimizer(adam(), 8), 4, one)
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


# It goes on with any number of replicas, also where a variable has no gradient.
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
    piece = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(x[start:stop], y[start:stop], **piece, **arguments)


warnings.filterwarnings("ignore", "Gradients do not exist")
uninterrupted = compiled(one)
start = np.concatenate([w.ravel() for w in uninterrupted.get_weights()])
go_on(uninterrupted, 0, 40)
assert uninterrupted.optimizer.pending == 2
uninterrupted.optimizer.flush()
reference = np.concatenate([w.ravel() for w in uninterrupted.get_weights()])
assert np.array_equal(reference[-3:], start[-3:])
for saved_on, loaded_on in (STRATEGY, one), (one, STRATEGY), (STRATEGY, STRATEGY):
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
    check(f"saved and loaded on {counts} replicas", ours, reference, start)
    assert np.array_equal(ours[-3:], start[-3:])

# Clipped is the sum over replicas, once.
clip = {"use_agc": True, "clip_factor": 0.02, "eps": 1e-2}


def in_pieces(way, size, strategy, **settings):
    with strategy.scope():
        model = accumulate(build(), **{way: size}, **settings)
        model.compile(adam(), "mse")
    batch = 16 if way == "microbatch_size" else 8
    model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0)
    return np.concatenate([w.ravel() for w in model.get_weights()])


unclipped = in_pieces("microbatch_size", 4, one)
clipped = in_pieces("microbatch_size", 4, one, **clip)
assert np.abs(clipped - unclipped).max() > 0.1 * np.abs(unclipped - before).max()
for way, size in (("microbatch_size", 4), ("accum_steps", 2)):
    check(f"clipped, {way}", in_pieces(way, size, STRATEGY, **clip), clipped, before)
_, ours, _, _ = trained(
    lambda: GradientAccumulateOptimizer(adam(), 4, **clip),
    4,
    STRATEGY,
    callbacks=[FlushGradients()],
)
check("clipped by the optimizer", ours, clipped, before)


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


def compare(name, model, reference, count):
    pairs = list(zip(model.weights, reference.weights, strict=True))[:count]
    for a, b in pairs:
        off = np.abs(np.asarray(a) - np.asarray(b)).max()
        assert off < 1e-6, f"{name}, {a.path}: off by {off}"


def statistics_first(model):
    (layer,) = (x for x in model.layers if isinstance(x, layers.BatchNormalization))
    return layer.moving_mean, layer.moving_variance


reference = normalized(layers.BatchNormalization(momentum=0.5), None, None, one)
for synchronized in (False, True):
    for way, size in (("microbatch_size", 4), ("accum_steps", 2)):
        layer = AccumBatchNormalization(momentum=0.5, synchronized=synchronized)
        model = normalized(layer, way, size, STRATEGY)
        for a, b in zip(statistics_first(model), statistics_first(reference)):
            # Pooled over pieces and replicas, and the same on every replica.
            values = STRATEGY.experimental_local_results(a.value)
            assert len(values) == 2
            for value in values:
                off = np.abs(value.numpy() - np.asarray(b)).max()
                assert off < 1e-6, f"synchronized={synchronized}, {way}: off by {off}"
# Flushed are the pools of all replicas: of 24 examples the first 16 are an update.
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

# With a piece for each replica, all that is normalized together is the full batch.
for normalization in (layers.BatchNormalization, AccumBatchNormalization):
    layer = normalization(momentum=0.5, synchronized=True)
    model = normalized(layer, "microbatch_size", 8, STRATEGY)
    compare(f"{normalization.__name__}, synchronized", model, reference, None)
