"""One of two workers, the second of which is killed in the middle of an update.

Arguments: a folder for backups, whether to kill, and a file for the final weights.
"""

import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf
from replicas import workers

STRATEGY, _, RANK = workers()

import keras
import numpy as np
from keras import layers

from gradient_accumulator import accumulate

r = np.random.default_rng(0)
X = r.normal(size=(24, 6)).astype("float32")
Y = np.tanh(X[:, :3]).astype("float32")


class Killed(layers.Layer):
    """Ends the process in micro-batch 2 of 3, in the second update of an epoch."""

    microbatches = 0
    last = None

    def call(self, x, training=False):
        if not training or self.last is None:
            return x
        counted = tf.numpy_function(self.count, [x], x.dtype)
        return tf.ensure_shape(counted, x.shape)

    def count(self, x):
        self.microbatches += 1
        if self.microbatches == self.last:
            os._exit(9)
        return x


class Remember(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.weights = self.model.get_weights()
        self.updates = int(self.model.optimizer.iterations.numpy())


def main(folder, kill, file):
    killed = Killed()
    if kill == "kill" and RANK == 1:
        killed.last = 6 + 3 + 2
    with STRATEGY.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [layers.Input((6,)), killed, layers.Dense(8), layers.Dense(3)]
        )
        model.compile(keras.optimizers.AdamW(0.05, weight_decay=0.1), "mse")
        accumulate(model, microbatch_size=2)
    remember = Remember()
    backup = keras.callbacks.BackupAndRestore(f"{folder}/{RANK}", save_freq="epoch")
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(12)
    try:
        with STRATEGY.scope():  # in which alone Keras restores an optimizer
            model.fit(data, epochs=3, verbose=0, callbacks=[remember, backup])
    except RuntimeError as error:
        assert "did not answer" in str(error), error
        assert kill == "kill"
        # Only one epoch and one update were applied, and nothing of the current update.
        assert int(model.optimizer.iterations.numpy()) == remember.updates == 3
        for a, b in zip(model.get_weights(), remember.weights, strict=True):
            np.testing.assert_array_equal(a, b)
        os._exit(0)
    assert kill != "kill"
    assert int(model.optimizer.iterations.numpy()) == 6
    np.save(
        f"{file}-{RANK}.npy", np.concatenate([w.ravel() for w in model.get_weights()])
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
