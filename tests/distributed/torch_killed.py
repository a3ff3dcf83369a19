"""One of two processes, the second of which is killed in the middle of an update.

Arguments: a folder for backups, whether to kill, and a file for the final weights.
"""

import datetime
import os
import sys

import keras
import killing
import numpy as np
import torch.distributed as dist
from keras import layers

from gradient_accumulator import accumulate

RANK = int(os.environ["RANK"])


class Remember(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.weights = self.model.get_weights()
        self.updates = int(self.model.optimizer.iterations)


def main(folder, kill, file):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((6,)), layers.Dense(8), layers.Dense(3)])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    accumulate(model, accum_steps=3)
    remember = Remember()
    backup = keras.callbacks.BackupAndRestore(f"{folder}/{RANK}", save_freq="epoch")
    try:
        model.fit(
            killing.data(RANK, kill),
            epochs=3,
            shuffle=False,
            verbose=0,
            callbacks=[remember, backup],
        )
    except RuntimeError as error:
        assert "did not answer" in str(error), error
        assert kill == "kill"
        # Only one epoch and one update were applied, and nothing of the current update.
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
