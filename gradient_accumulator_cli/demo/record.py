"""What is written down while a model trains: weights after each update, and times."""

from __future__ import annotations

import time
from pathlib import Path

import keras
import numpy as np


class Recorder(keras.callbacks.Callback):
    """Writes down the weights at the start and after each update.

    To a file, so that they do not add to the memory that is measured.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.updates = 0
        self.learning_rates: list[float] = []

    def weights(self) -> np.ndarray:
        """A row for the start and for each update, with all weights in it."""
        return np.fromfile(self.path, "float32").reshape(self.updates + 1, -1)

    def on_train_begin(self, logs=None):
        self.path.write_bytes(flat_weights(self.model).tobytes())

    def on_train_batch_end(self, batch, logs=None):
        if keras.backend.backend() == "jax":  # whose state is elsewhere during `fit`
            self.model.jax_state_sync()
        # With Keras's own accumulation a batch is a part of an update.
        updates = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        if updates == self.updates:
            return
        self.updates = updates
        with self.path.open("ab") as file:
            file.write(flat_weights(self.model).tobytes())
        rate = keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
        self.learning_rates.append(float(rate))


class EpochClock(keras.callbacks.Callback):
    """Times the training part of every epoch: the first compiles, so it is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.started: float | None = None

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_test_begin(self, logs=None):
        if self.started is not None:
            # JAX and GPUs work behind Python's back: wait for the last update.
            keras.ops.convert_to_numpy(self.model.trainable_variables[0])
            self.times.append(time.perf_counter() - self.started)
            self.started = None

    def seconds(self) -> float:
        return float(np.median(self.times[1:] or self.times))


def flat_weights(model: keras.Model) -> np.ndarray:
    return np.concatenate([weight.ravel() for weight in model.get_weights()])
