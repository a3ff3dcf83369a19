"""Trains in one way, in a process of its own, so that its peak memory can be measured.

The command is `python -m gradient_accumulator_cli.demo.train FOLDER RUN`, with four
more arguments for each model: its name (`brain` or `sentences`), the number of epochs,
the batch size and the micro-batch size. It reads FOLDER/NAME.npz and writes
FOLDER/NAME-RUN.npz. RUN is one of these:

- `batch`: the whole batch at once
- `microbatches`: micro-batches, by this package
- `keras`: micro-batches, by Keras's own gradient accumulation
- `reordered`: the whole batch at once, its examples in another order. Its difference
  from `batch` is due to rounding.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import keras
import numpy as np

from gradient_accumulator_cli.demo.data import Arrays, load, save
from gradient_accumulator_cli.demo.language import compiled_language_model
from gradient_accumulator_cli.demo.memory import watch_peak
from gradient_accumulator_cli.demo.record import EpochClock, Recorder
from gradient_accumulator_cli.demo.unet import compiled_unet

MODELS = {"brain": compiled_unet, "sentences": compiled_language_model}


def train(
    name: str,
    folder: Path,
    run: str,
    epochs: int,
    batch_size: int,
    microbatch_size: int,
) -> Arrays:
    """Trains a model, and returns the measurements for the report."""
    data = load(folder / f"{name}.npz")
    if run == "reordered":
        data = reordered(data, batch_size)
    updates = math.ceil(len(data["train_x"]) / batch_size)  # in an epoch
    keras.utils.set_random_seed(0)  # the same weights for every run
    model = MODELS[name](
        batch_size // microbatch_size if run == "keras" else None, epochs * updates
    )
    if run == "microbatches":
        from gradient_accumulator import accumulate

        model = accumulate(model, microbatch_size=microbatch_size)
    clock = EpochClock()
    recorder = Recorder(folder / f"{name}-{run}.weights")
    peak = watch_peak()
    history = model.fit(
        data["train_x"],
        data["train_y"],
        sample_weight=data.get("train_weight"),
        batch_size=microbatch_size if run == "keras" else batch_size,
        epochs=epochs,
        shuffle=False,  # the examples are random, in the same order for every run
        validation_data=tuple(
            data[key] for key in ("val_x", "val_y", "val_weight") if key in data
        ),
        validation_batch_size=microbatch_size,
        callbacks=[clock, recorder],
        verbose=1 if sys.stdout.isatty() else 2,  # a bar, or one line for each epoch
    ).history
    result = {
        "peak": np.array(peak()),
        "weights": recorder.weights(),
        "learning_rate": np.array(recorder.learning_rates),
        "val_score": np.array(history.get("val_dice", history["val_loss"])[-1]),
        "seconds": np.array(clock.seconds() / updates),
        "bytes_of_weights": np.array(bytes_of(model.trainable_variables)),
    }
    if name == "brain":
        at_once = microbatch_size if run in ("microbatches", "keras") else batch_size
        shape = (at_once, *data["train_x"].shape[1:])
        result["bytes_of_outputs"] = np.array(bytes_of(outputs(model, shape)))
        if run == "microbatches":  # the picture shows its prediction
            classes = model.predict(data["slab"], verbose=0)[0]
            result["prediction"] = np.argmax(classes, axis=-1)
    return result


def reordered(data: Arrays, batch_size: int) -> Arrays:
    """Returns the same batches, with the examples of each in another order."""
    rng = np.random.default_rng(1)
    count = len(data["train_x"])
    order = np.concatenate(
        [
            rng.permutation(np.arange(start, min(start + batch_size, count)))
            for start in range(0, count, batch_size)
        ]
    )
    return {
        key: array[order] if key.startswith("train_") else array
        for key, array in data.items()
    }


def outputs(model: keras.Model, shape: tuple[int, ...]) -> list:
    """Returns symbolic outputs of all layers, for an input of a shape."""
    inputs = keras.Input(batch_shape=shape)
    every = keras.Model(model.input, [layer.output for layer in model.layers[1:]])
    return every(inputs)


def bytes_of(tensors: list) -> int:
    """Returns the number of bytes in some float32 tensors."""
    return sum(4 * math.prod(tensor.shape) for tensor in tensors)


def main(arguments: list[str]) -> None:
    """Runs the command that the module describes."""
    folder, run = Path(arguments[0]), arguments[1]
    for i in range(2, len(arguments), 4):
        name, *numbers = arguments[i : i + 4]
        epochs, batch_size, microbatch_size = map(int, numbers)
        result = train(name, folder, run, epochs, batch_size, microbatch_size)
        save(result, folder / f"{name}-{run}.npz")


if __name__ == "__main__":
    main(sys.argv[1:])
