"""One of two processes, the second of which is killed in the middle of an update.

Arguments: the number of this process, the address of both, a folder for backups,
whether to kill, and a file for the final weights.
"""

import sys

import jax
import keras
import numpy as np

RANK = int(sys.argv[1])
# As `keras.distribution.initialize`, except that a process counts as dead sooner.
jax.distributed.initialize(
    sys.argv[2], 2, RANK, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10
)
keras.distribution.set_distribution(
    keras.distribution.DataParallel(auto_shard_dataset=False)
)

import killing
from keras import layers

from gradient_accumulator import accumulate


class Remember(keras.callbacks.Callback):
    """Saves the weights after each epoch, because JAX ends a process that waits."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def on_epoch_end(self, epoch, logs=None):
        updates = int(self.model.optimizer.iterations)
        np.savez(f"{self.file}-{RANK}.npz", *self.model.get_weights(), updates=updates)


def main(folder, kill, file):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((6,)), layers.Dense(8), layers.Dense(3)])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    accumulate(model, accum_steps=3)
    backup = keras.callbacks.BackupAndRestore(f"{folder}/{RANK}", save_freq="epoch")
    callbacks = [backup, Remember(file)]
    model.fit(
        killing.data(RANK, kill),
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )


if __name__ == "__main__":
    main(*sys.argv[3:])
