"""A worker of a `MultiWorkerMirroredStrategy`: runs checks and problems by name.

Plain Keras fails on workers, so that the reference is plain Keras on equally many
replicas in one process.
"""

import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf
from replicas import workers

TOGETHER, ALONE, RANK = workers()

import helpers
import keras
import numpy as np
import reductions
from checks import CHECKS, check, run
from helpers import assert_same, named, train
from keras import layers

from gradient_accumulator import AccumBatchNormalization, accumulate

r = np.random.default_rng(0)
X = r.normal(size=(24, 6)).astype("float32")
Y = np.tanh(X[:, :3]).astype("float32")


def build(*normalization):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [layers.Input((6,)), layers.Dense(8), *normalization, layers.Dense(3)]
    )


def compiled(*normalization, **size):
    with TOGETHER.scope():
        model = accumulate(build(*normalization), **size)
        model.compile(keras.optimizers.Adam(0.05, epsilon=1e-2), "mse")
    return model


def batches(*sizes):
    """The batches of one worker, in a data set that knows its length."""
    starts = np.cumsum((0, *sizes))
    rows = [slice(start, start + size) for start, size in zip(starts, sizes)]
    sets = [tf.data.Dataset.from_tensors((X[row], Y[row])) for row in rows]
    data = sets[0]
    for following in sets[1:]:
        data = data.concatenate(following)
    return data


def own(data):
    return TOGETHER.distribute_datasets_from_function(lambda _: data)


def exact(name):
    """Workers give the results of two replicas: masks, clipping, ragged batches."""
    problem = named(name)
    together = keras.tree.map_structure(
        lambda *arrays: np.concatenate(arrays), *problem.batches()
    )
    examples = tf.data.Dataset.from_tensor_slices(together)
    with ALONE.scope():
        reference = train(problem, examples.batch(12))
    with TOGETHER.scope():
        trained = train(
            problem,
            examples.batch(12),
            lambda model: accumulate(model, microbatch_size=2),
        )
    assert_same(trained, reference)


@check
def overflow():
    """An overflow in one worker skips the update in both, and halves the scale once."""
    x = np.ones((8, 6), "float32")
    x[4 * RANK, 0] = 1e36 if RANK == 1 else 1
    data = tf.data.Dataset.from_tensors((x[4 * RANK : 4 * RANK + 4], Y[:4]))
    for size in ({"microbatch_size": 2}, {"accum_steps": 2}):
        with TOGETHER.scope():
            model = accumulate(build(), **size)
            optimizer = keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.1), initial_scale=2.0**15
            )
            model.compile(optimizer, "mae")
        before = model.get_weights()
        model.fit(own(data.repeat(size.get("accum_steps", 1))), verbose=0)
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
        assert optimizer.dynamic_scale.numpy() == 2.0**14
        assert optimizer.iterations.numpy() == 0


@check
def normalization():
    """Statistics are pooled over micro-batches and workers."""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(12)
    for synchronized in (False, True):
        layer = AccumBatchNormalization(momentum=0.5, synchronized=synchronized)
        model = compiled(layer, microbatch_size=3)
        with tf.device("CPU:0"):
            hidden = build().layers[0](X[:12]).numpy()
        model.fit(data.take(1), verbose=0)
        for got, statistic, start in (
            (layer.moving_mean, hidden.mean(0), 0),
            (layer.moving_variance, hidden.var(0), 1),
        ):
            wanted = (start + statistic) / 2
            np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-6)


@check
def one_reduction():
    """An update reduces its gradients once, and nothing in a loop, for any number of
    micro-batches.
    """
    counts = []
    for microbatches in (1, 2, 6):
        model = compiled(microbatch_size=6 // microbatches)
        model.fit(own(batches(6, 6)), verbose=0)
        sizes, inside = reductions.of(model)
        assert sizes.count(model.count_params()) == 1, sizes
        assert sum(sizes) < model.count_params() + 10, sizes
        assert inside == 0
        counts.append(sizes)
    assert counts[0] == counts[1] == counts[2], counts


@check
def uneven():
    """A worker whose data ends earlier takes part without examples."""
    sizes = (6, 6, 6) if RANK == 0 else (4, 2)
    for way in ({"microbatch_size": 2}, {"accum_steps": 2}):
        model = compiled(**way)
        data = batches(*sizes).filter(lambda x, y: True)  # hides the length
        model.fit(own(data), epochs=2, verbose=0)
        updates = 3 if "microbatch_size" in way else 2
        assert model.optimizer.iterations.numpy() == 2 * updates
        assert np.isfinite(
            np.concatenate([w.ravel() for w in model.get_weights()])
        ).all()


@check
def different_updates():
    """Different batches or epochs raise in both workers, and none waits."""
    for sizes, epochs in (((6,) * (3 - RANK), 2), ((6, 6), 2 + RANK)):
        model = compiled(microbatch_size=2)
        try:
            model.fit(own(batches(*sizes)), epochs=epochs, verbose=0)
        except ValueError as error:
            assert "must make the same updates" in str(error), error
        else:
            raise AssertionError("did not raise")


if __name__ == "__main__":
    helpers.exactness.Batches = lambda data: data
    run(sys.argv[1:], lambda name: CHECKS[name]() if name in CHECKS else exact(name))
