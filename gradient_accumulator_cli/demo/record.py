"""Callbacks that record a training: weights after each update, and times."""

from __future__ import annotations

import time
from pathlib import Path

import keras
import numpy as np


class Recorder(keras.callbacks.Callback):
    """Records the weights at the start and after each update.

    It writes them to a file, because the memory of the process is measured.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.updates = 0
        self.learning_rates: list[float] = []

    def weights(self) -> np.ndarray:
        """Returns all weights, in one row for the start and one for each update."""
        return np.fromfile(self.path, "float32").reshape(self.updates + 1, -1)

    def on_train_begin(self, logs=None):
        self.path.write_bytes(flat_weights(self.model).tobytes())

    def on_train_batch_end(self, batch, logs=None):
        if keras.backend.backend() == "jax":  # variables do not hold the state in `fit`
            self.model.jax_state_sync()
        # With Keras's own accumulation, an update takes several batches.
        updates = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        if updates == self.updates:
            return
        self.updates = updates
        with self.path.open("ab") as file:
            file.write(flat_weights(self.model).tobytes())
        rate = keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
        self.learning_rates.append(float(rate))


class EpochClock(keras.callbacks.Callback):
    """Measures the time of training in each epoch, without its validation."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.started: float | None = None

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_test_begin(self, logs=None):
        if self.started is not None:
            # JAX and GPUs run asynchronously: this waits for the last update.
            keras.ops.convert_to_numpy(self.model.trainable_variables[0])
            self.times.append(time.perf_counter() - self.started)
            self.started = None

    def seconds(self) -> float:
        """Returns the median of an epoch, without the first one, which compiles."""
        return float(np.median(self.times[1:] or self.times))


def flat_weights(model: keras.Model) -> np.ndarray:
    """Returns all weights of a model in one array without further axes."""
    return np.concatenate([weight.ravel() for weight in model.get_weights()])
