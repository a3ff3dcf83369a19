"""One training run, in a process of its own so that its peak memory is its own.

Run as `python -m gradient_accumulator.demo.train FOLDER RUN EPOCHS BATCH PIECE`; reads
FOLDER/data.npz and writes FOLDER/RUN.npz. RUN is `full` (the batch at once), `pieces`
(this package) or `keras` (Keras's own gradient accumulation).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import keras
import numpy as np

from gradient_accumulator.demo.data import Arrays, load, save
from gradient_accumulator.demo.memory import watch_peak
from gradient_accumulator.demo.unet import Dice, build_unet


def compiled_unet(run: str, batch_size: int, microbatch_size: int) -> keras.Model:
    """The same network from the same weights, trained the way that `run` names."""
    keras.utils.set_random_seed(0)
    model = build_unet()
    steps = batch_size // microbatch_size if run == "keras" else None
    model.compile(
        # With Adam's usual epsilon, weights whose gradient is about 0 take full steps
        # in a direction that rounding decides.
        keras.optimizers.Adam(3e-3, epsilon=1e-4, gradient_accumulation_steps=steps),
        # The mean over the brain's voxels, however many of them a patch holds.
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[Dice()],
    )
    if run == "pieces":
        from gradient_accumulator import accumulate

        model = accumulate(model, microbatch_size=microbatch_size)
    return model


def train(
    data: Arrays, run: str, epochs: int, batch_size: int, microbatch_size: int
) -> Arrays:
    """Trains, and gives what the report shows of it."""
    model = compiled_unet(run, batch_size, microbatch_size)
    initial = flat_weights(model)
    clock = EpochClock()
    peak = watch_peak()
    history = model.fit(
        data["train_x"],
        data["train_y"],
        sample_weight=data["train_weight"],
        batch_size=microbatch_size if run == "keras" else batch_size,
        epochs=epochs,
        shuffle=False,  # drawn at random already; the same order for every run
        validation_data=(data["val_x"], data["val_y"], data["val_weight"]),
        validation_batch_size=microbatch_size,
        callbacks=[clock],
        verbose=1 if sys.stdout.isatty() else 2,  # a bar, or a line an epoch
    ).history
    megabytes = peak()
    updates = len(data["train_x"]) // batch_size
    return {
        "weights": flat_weights(model),
        "moved": np.abs(flat_weights(model) - initial).max(),
        "loss": np.array(history["loss"]),
        "val_loss": np.array(history["val_loss"]),
        "val_dice": np.array(history["val_dice"][-1]),
        "peak": np.array(megabytes),
        "seconds": np.array(clock.seconds() / updates),
        "prediction": np.argmax(model.predict(data["slab"], verbose=0)[0], axis=-1),
    }


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


def main(arguments: list[str]) -> None:
    folder, run = Path(arguments[0]), arguments[1]
    epochs, batch_size, microbatch_size = map(int, arguments[2:])
    data = load(folder / "data.npz")
    save(train(data, run, epochs, batch_size, microbatch_size), folder / f"{run}.npz")


if __name__ == "__main__":
    main(sys.argv[1:])
