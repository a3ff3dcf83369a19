"""A process of `jax.distributed`, or the only process, which trains on batches.

Arguments: the number of processes, the number of this process, their address, and a
file for the results of the training.
"""

import sys

import numpy as np

COUNT, RANK = map(int, sys.argv[1:3])

import keras

if COUNT > 1:
    keras.distribution.initialize(sys.argv[3], COUNT, RANK)

from helpers import arrays
from keras import layers

from gradient_accumulator import accumulate

r = np.random.default_rng(0)
X = r.integers(0, 20, (32, 6)).astype("int32")
X[:, 3:] *= r.integers(0, 2, (32, 3))  # these tokens are masked unevenly
Y = r.normal(size=(32, 6, 2)).astype("float32")
FULL = 16


def build():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            layers.Input((6,), dtype="int32"),
            layers.Embedding(20, 4, mask_zero=True),
            layers.Dense(5, activation="tanh"),
            layers.Dense(2),
        ]
    )


def share(array, size):
    """This process's part of every batch."""
    parts = array.reshape(-1, COUNT, size // COUNT, *array.shape[1:])
    return parts[:, RANK].reshape(-1, *array.shape[1:])


def train(**way):
    size = FULL // 4 if "accum_steps" in way else FULL
    model = build()
    before = {f"before {k}": v for k, v in arrays(model.weights).items()}
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 1, 0.7)
    model.compile(
        keras.optimizers.Adam(schedule, epsilon=1e-2, global_clipnorm=0.1),
        keras.losses.MeanSquaredError("mean_with_sample_weight"),
        metrics=["mae"],
    )
    if way:
        accumulate(model, **way)
    history = model.fit(
        share(X, size),
        share(Y, size),
        batch_size=size // COUNT,
        epochs=2,
        shuffle=False,
        verbose=0,
    ).history
    return {
        **before,
        **arrays(model.weights),
        **{f"optimizer {k}": v for k, v in arrays(model.optimizer.variables).items()},
        **{f"history {k}": v for k, v in history.items()},
    }


def main(file):
    if COUNT == 1:
        np.savez(f"{file}-plain.npz", **train())
        return
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(auto_shard_dataset=False)
    )
    for way in ({"microbatch_size": 3}, {"accum_steps": 4}):
        (name,) = way
        np.savez(f"{file}-{name}-{RANK}.npz", **train(**way))


if __name__ == "__main__":
    main(sys.argv[4])
