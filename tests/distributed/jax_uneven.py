"""One of two processes, which have different numbers of batches or micro-batches.

Arguments: the number of this process, the address of both, the data that differs, and a
loss.
"""

import sys

import jax
import keras
import numpy as np

RANK = int(sys.argv[1])
jax.distributed.initialize(
    sys.argv[2], 2, RANK, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10
)
keras.distribution.set_distribution(
    keras.distribution.DataParallel(auto_shard_dataset=False)
)

from helpers import Batches
from keras import layers

from gradient_accumulator import accumulate


def main(more, reduction):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((6,)), layers.Dense(3)])
    model.compile("sgd", keras.losses.MeanSquaredError(reduction))
    accumulate(model, accum_steps=3)
    microbatch = np.ones((4, 6), "float32"), np.ones((4, 3), "float32")
    count = (6 if RANK == 0 else 3) if more == "batches" else (6 if RANK == 0 else 5)
    try:
        model.fit(Batches([microbatch] * count), epochs=2, verbose=0)
    except ValueError as error:
        assert "must make the same updates" in str(error), error
        assert "process 0" in str(error) and "process 1" in str(error), error
        return
    raise AssertionError("did not raise")


if __name__ == "__main__":
    main(*sys.argv[3:])
