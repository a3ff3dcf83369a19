"""Runs checks on replicas. Arguments: the number of replicas, the names of checks."""

import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf
from replicas import replicated

REPLICAS = int(sys.argv[1])
STRATEGY = replicated(REPLICAS)

import keras
import numpy as np
import reductions
from checks import check, run
from keras import layers

from gradient_accumulator import (
    GradientAccumulateOptimizer,
    accumulate,
    accumulated_value_and_grad,
)

r = np.random.default_rng(0)
X = r.normal(size=(24, 6)).astype("float32")
Y = np.tanh(X[:, :3]).astype("float32")


def build():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [layers.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(3)]
    )


def adam():
    return keras.optimizers.Adam(0.05, epsilon=1e-2)


def weights(model):
    return np.concatenate([w.ravel() for w in model.get_weights()])


def fit(x, y, batch, *, optimizer=adam, loss="mse", jit_compile=False, **size):
    with STRATEGY.scope():
        model = build()
        if size:
            accumulate(model, **size)
        model.compile(optimizer(), loss, jit_compile=jit_compile)
        model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0)
    return model


def compare(name, ours, reference):
    before = weights(build())
    off = np.abs(ours - reference).max() / np.abs(reference - before).max()
    assert off < 1e-5, f"{name}: off by {off}"


@check
def one_reduction():
    """An update reduces its gradients once, and nothing in a loop, for any number of
    micro-batches.
    """
    counts = []
    for microbatches in (1, 2, 6):
        model = fit(X, Y, 12, microbatch_size=12 // REPLICAS // microbatches)
        sizes, inside = reductions.of(model)
        assert sizes.count(model.count_params()) == 1, sizes
        assert sum(sizes) < model.count_params() + 10, sizes
        assert inside == 0
        counts.append(sizes)
    assert counts[0] == counts[1] == counts[2], counts


@check(four_replicas=True)
def no_share_of_the_last_batch():
    """The last batch has one example, and only the first replica has it."""
    plain = weights(fit(X[:13], Y[:13], 12))
    for batch, size in ((12, {"microbatch_size": 2}), (4, {"accum_steps": 3})):
        ours = fit(X[:13], Y[:13], batch, **size)
        compare(str(size), weights(ours), plain)


@check(four_replicas=True)
def overflow():
    """An overflow on one replica skips the update on all, and halves the scale once."""

    def scaled():
        sgd = keras.optimizers.SGD(0.1)
        return keras.optimizers.LossScaleOptimizer(sgd, initial_scale=2.0**15)

    def inside():
        return GradientAccumulateOptimizer(scaled(), 2)

    def around():
        wrapped = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 2)
        return keras.optimizers.LossScaleOptimizer(wrapped, initial_scale=2.0**15)

    for replica in range(REPLICAS):
        x = X.copy()
        x[replica * 24 // REPLICAS, 0] = 1e36
        # Plain Keras checks the first replica only.
        ways = {
            "microbatch_size": (scaled, 24, {"microbatch_size": 2}),
            "accum_steps": (scaled, 12, {"accum_steps": 2}),
            "inside": (inside, 12, {}),
            "around": (around, 12, {}),
        }
        for name, (optimizer, batch, size) in ways.items():
            with STRATEGY.scope():
                model = keras.Sequential([layers.Input((6,)), layers.Dense(3)])
                if size:
                    accumulate(model, **size)
                model.compile(optimizer(), "mae")
                before = weights(model)
                model.fit(x, Y, batch_size=batch, shuffle=False, verbose=0)
            np.testing.assert_array_equal(weights(model), before, name)
            optimizer = model.optimizer
            scaler = getattr(optimizer, "dynamic_scale", None)
            if scaler is None:
                scaler = optimizer.inner_optimizer.dynamic_scale
            # All replicas have equal values.
            values = STRATEGY.experimental_local_results(scaler.value)
            assert [float(value) for value in values] == [2.0**14] * REPLICAS, name
            assert optimizer.iterations.numpy() == 0, name


@check(four_replicas=True)
def compiled():
    """XLA compiles the update, as TPUs need it. Plain Keras fails with XLA here, and
    runs without it.
    """
    plain = weights(fit(X, Y, 12))
    for size, batch in (({"microbatch_size": 2}, 12), ({"accum_steps": 3}, 4)):
        ours = fit(X, Y, batch, jit_compile=True, **size)
        compare(str(size), weights(ours), plain)


@check
def clipped():
    """Clipping acts on the sum over replicas, as on one device."""
    clip = {"use_agc": True, "clip_factor": 0.02, "eps": 1e-2}
    unclipped = weights(fit(X, Y, 12))
    model = accumulate(build(), microbatch_size=12, **clip)
    model.compile(adam(), "mse")
    model.fit(X, Y, batch_size=12, epochs=2, shuffle=False, verbose=0)
    reference = weights(model)
    moved = np.abs(unclipped - weights(build())).max()
    assert np.abs(reference - unclipped).max() > 0.1 * moved
    ours = fit(X, Y, 12, microbatch_size=2, **clip)
    compare("clipped", weights(ours), reference)


@check
def own_loop():
    """With `strategy.run`: a loop on each replica, or an optimizer that accumulates."""
    reference = weights(fit(X, Y, 12))

    def trained(batch_size, make_optimizer, gradients_of):
        with STRATEGY.scope():
            model = build()
            optimizer = make_optimizer()
            optimizer.build(model.trainable_variables)
        gradients = gradients_of(model)

        def on_replica(batch):
            optimizer.apply(gradients(batch), model.trainable_variables)

        @tf.function
        def step(batch):
            STRATEGY.run(on_replica, args=(batch,))

        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(batch_size)
        for batch in STRATEGY.experimental_distribute_dataset(data.repeat(2)):
            step(batch)
        return weights(model)

    def loss_of(model):
        # The optimizer sums the gradients of replicas.
        return lambda x, y: keras.ops.mean((model(x) - y) ** 2) / REPLICAS

    def in_a_loop(model):
        loss = loss_of(model)
        accumulated = accumulated_value_and_grad(
            lambda microbatch: loss(*microbatch), microbatch_size=2
        )
        return lambda batch: accumulated(model.trainable_variables, batch)[1]

    def of_a_microbatch(model):
        def gradients(microbatch):
            with tf.GradientTape() as tape:
                loss = loss_of(model)(*microbatch)
            return tape.gradient(loss, [v.value for v in model.trainable_variables])

        return gradients

    compare("loop", trained(12, adam, in_a_loop), reference)
    wrapped = trained(
        4, lambda: GradientAccumulateOptimizer(adam(), 3), of_a_microbatch
    )
    compare("optimizer", wrapped, reference)


if __name__ == "__main__":
    run(sys.argv[2:])
