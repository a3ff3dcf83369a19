"""One process of a benchmark: one model, trained one way.

`python -m benchmarks.variants SPEC` (the parent does this) builds the model, trains
until nothing compiles any more, and then answers every line on its standard input
with a round of training: one line of JSON. The end of its input ends it.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from . import floor, meters, peers
from .models import MODELS

VARIANTS = {
    "full": "batch",
    "microbatches": "an update a micro-batch",
    "keras": "Keras's own accumulation",
    "split": "ours, `microbatch_size`",
    "steps": "ours, `accum_steps`",
    "accumulating": "ours, `AccumBatchNormalization`",
    "clipped": "ours, `use_agc=True`",
    "optimizer": "ours, `GradientAccumulateOptimizer`",
    "floor": "floor",
    "function": "ours, `accumulated_value_and_grad`",
    "host": "ours, the same outside of `jax.jit`",
    "peer": "peer",
    "replicated": "`DistributedDataParallel`, an update a micro-batch",
    "released": "gradient-accumulator 0.5.2",
}
# The environment variable with the folder that version 0.5.2 is in.
RELEASED = "GRADIENT_ACCUMULATOR_0_5_2"
# Given batches, to be cut.
SPLIT = ("split", "accumulating", "clipped")
# Written by hand, without `fit`.
BY_HAND = {
    "floor": floor.update_function,
    "function": peers.function,
    "host": peers.host,
    "peer": peers.peer,
    "replicated": peers.replicated,
}


@dataclass(frozen=True)
class Spec:
    """What one process runs: so many micro-batches of `size` examples an update."""

    backend: str
    model: str
    variant: str
    size: int = 8
    microbatches: int = 8
    updates: int = 0  # an epoch; 0 takes the model's own number
    seconds: float = 1.0  # a round
    replicas: int = 1  # in one process, each with such micro-batches

    def dumps(self) -> str:
        return json.dumps(asdict(self))


def trainer(spec: Spec, model, x, y) -> Callable[[int], list[float]]:
    """A function that trains so many epochs and returns the seconds of each."""
    import keras

    settings = {}
    if spec.variant == "keras":
        settings["gradient_accumulation_steps"] = spec.microbatches
    optimizer = keras.optimizers.Adam(1e-4, **settings)
    if spec.variant == "optimizer":
        from gradient_accumulator import GradientAccumulateOptimizer

        optimizer = GradientAccumulateOptimizer(optimizer, spec.microbatches)
    if spec.variant == "released":
        model = _released(model, spec.microbatches)
    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.optimizer.build(model.trainable_variables)
    last = model.trainable_variables[-1]
    batch = spec.size * spec.microbatches

    def finish() -> float:
        # Waits for the device.
        last.numpy() if _is_keras_2() else keras.ops.convert_to_numpy(last)
        return time.perf_counter()

    if spec.variant in BY_HAND:
        update = BY_HAND[spec.variant](model, spec.size)

        def train(epochs: int) -> list[float]:
            seconds = []
            for _ in range(epochs):
                start = time.perf_counter()
                for i in range(0, len(x), batch):
                    update(x[i : i + batch], y[i : i + batch])
                seconds.append(finish() - start)
            return seconds

        return train

    if spec.variant in SPLIT or spec.variant == "steps":
        from gradient_accumulator import accumulate

        if spec.variant == "steps":
            accumulate(model, accum_steps=spec.microbatches, warn=False)
        else:
            clip = spec.variant == "clipped"
            accumulate(model, microbatch_size=spec.size, use_agc=clip, warn=False)
    handed = batch if spec.variant in ("full", *SPLIT) else spec.size
    handed *= spec.replicas

    class Clock(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seconds: list[float] = []

        def on_epoch_begin(self, epoch, logs=None):
            self.start = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            self.seconds.append(finish() - self.start)

    def train(epochs: int) -> list[float]:
        clock = Clock()
        model.fit(x, y, batch_size=handed, epochs=epochs, verbose=0, callbacks=[clock])
        return clock.seconds

    return train


def _is_keras_2() -> bool:
    import keras

    return keras.__version__.startswith("2.")


def _released(model, microbatches: int):
    """What version 0.5.2 makes of a model."""
    from gradient_accumulator import GradientAccumulateModel

    return GradientAccumulateModel(
        accum_steps=microbatches, inputs=model.input, outputs=model.output
    )


def run(spec: Spec, commands, answer: Callable[[dict], None]) -> None:
    """Build, warm up, then train one round for each line of `commands`."""
    import keras

    keras.utils.set_random_seed(0)
    problem = MODELS[spec.model]
    updates = spec.updates or problem.updates
    x, y = problem.data(updates * spec.size * spec.microbatches)
    model = problem.build()
    if spec.variant == "accumulating":
        from gradient_accumulator import replace_batchnorm_layers

        model = replace_batchnorm_layers(model)
    weights = sum(math.prod(v.shape) for v in model.trainable_variables)
    # Code is no memory that training takes.
    if spec.variant == "released":
        sys.path.insert(0, os.environ[RELEASED])  # which has this package's name
        importlib.import_module("gradient_accumulator")
    else:
        importlib.import_module("gradient_accumulator.engine").new_engine()
    gc.collect()
    built = meters.resident()
    train = trainer(spec, model, x, y)
    epoch = min(train(3))
    epochs = 1 + max(1, round(spec.seconds / epoch))
    answer(
        {
            "gradients": 4 * weights,  # bytes of one set in float32
            "inputs": (x.nbytes + y.nbytes) // updates,  # of one update
            "device": meters.device(spec.backend),
            "versions": meters.versions(spec.backend),
        }
    )
    for _ in commands:
        gc.collect()
        meters.reset_peak(spec.backend)
        seconds = train(epochs)[1:]  # the first may still fill caches
        answer(
            {
                "seconds": [s / updates for s in seconds],
                "examples": spec.size * spec.microbatches,
                "peak": meters.peak(),
                "built": built,
                "device_peak": meters.device_peak(spec.backend),
                "temporaries": meters.temporaries(spec.backend),
            }
        )


def main() -> None:
    # What libraries print must not end up between the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict) -> None:
        print(json.dumps(message), file=out, flush=True)

    run(Spec(**json.loads(sys.argv[1])), sys.stdin, answer)


if __name__ == "__main__":
    main()
