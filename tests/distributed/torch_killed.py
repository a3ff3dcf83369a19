"""A process of `torchrun` whose second one is killed in the middle of an update.

Arguments: a folder for backups; whether to kill; a file for the final weights.
"""

import datetime
import os
import sys

import keras
import numpy as np
import torch.distributed as dist
from helpers import Batches
from keras import layers

from gradient_accumulator import accumulate

RANK = int(os.environ["RANK"])
r = np.random.default_rng(RANK)
X = r.normal(size=(24, 6)).astype("float32")
Y = np.tanh(X[:, :3]).astype("float32")
PIECES = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 24, 4)]  # two updates of 3


class Killed(Batches):
    """Ends the process where the second update of the second epoch is half done."""

    drawn = 0

    def __getitem__(self, index):
        self.drawn += 1
        if RANK == 1 and self.drawn == 6 + 1 + 5:  # one was drawn to build the model
            os._exit(9)
        return super().__getitem__(index)


class Remember(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.weights = self.model.get_weights()
        self.updates = int(self.model.optimizer.iterations)


def main(folder, kill, file):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((6,)), layers.Dense(8), layers.Dense(3)])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    accumulate(model, accum_steps=3)
    remember = Remember()
    backup = keras.callbacks.BackupAndRestore(f"{folder}/{RANK}", save_freq="epoch")
    data = Killed(PIECES) if kill == "kill" else Batches(PIECES)
    try:
        model.fit(
            data, epochs=3, shuffle=False, verbose=0, callbacks=[remember, backup]
        )
    except RuntimeError as error:
        assert "did not answer" in str(error), error
        assert kill == "kill"
        # No part of the update at hand was applied: one epoch and an update were.
        assert int(model.optimizer.iterations) == remember.updates == 3
        for a, b in zip(model.get_weights(), remember.weights, strict=True):
            np.testing.assert_array_equal(a, b)
        os._exit(0)
    assert kill != "kill"
    assert int(model.optimizer.iterations) == 6
    np.save(
        f"{file}-{RANK}.npy", np.concatenate([w.ravel() for w in model.get_weights()])
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
