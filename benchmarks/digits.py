"""Validation accuracy on real digits, normalized by the statistics of 2 examples.

Each training is a process, which `python -m benchmarks.digits WAY SEED` is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from . import meters, report
from .processes import ROOT, environment

WAYS = {
    "full": "batch, `BatchNormalization`",
    "plain": "in micro-batches, `BatchNormalization`",
    "pooled": "in micro-batches, `AccumBatchNormalization`",
    "renorm": "in micro-batches, `renorm=True`",
    "paper": "in micro-batches, `renorm=True, rmax=3, dmax=5`",
}
TRAINED, BATCH, MICROBATCH, EPOCHS, LEARNING_RATE, MOMENTUM = 1280, 64, 2, 25, 3e-3, 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=4, help="trainings of each way")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])


def run(backend: str, arguments: argparse.Namespace) -> None:
    accuracies: dict[str, list[float]] = {}
    about = {}
    for way in arguments.ways:
        for seed in range(arguments.seeds):
            about = _train(backend, way, seed)
            accuracies.setdefault(way, []).append(about.pop("accuracy"))
    text = "\n\n".join(
        [
            f"Validation accuracy on scikit-learn's digits after {EPOCHS} epochs, two "
            f"normalized dense layers, updates from {BATCH} examples, in micro-batches "
            f"of {MICROBATCH}; momentum {MOMENTUM}, Adam.",
            report.table(
                ["", "mean", "of each seed"],
                [
                    [
                        WAYS[way],
                        f"{100 * statistics.mean(found):.1f} %",
                        ", ".join(f"{100 * a:.1f}" for a in found),
                    ]
                    for way, found in accuracies.items()
                ],
            ),
        ]
    )
    report.save(
        f"digits-{backend}",
        f"Digits, normalized in micro-batches of {MICROBATCH}, on {backend}",
        about,
        text,
        {"accuracies": accuracies},
    )


def _train(backend: str, way: str, seed: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.digits", way, str(seed)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(backend),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(backend: str, saved: dict) -> str:
    digits = ", ".join(
        f"{WAYS[way]} {100 * statistics.mean(found):.1f} %"
        for way, found in saved["accuracies"].items()
    )
    return f"{backend}, digits: {digits}"


def accuracy(way: str, seed: int) -> float:
    """Of the 517 digits that were not trained on."""
    import keras
    import numpy as np
    from keras import layers
    from sklearn.datasets import load_digits

    from gradient_accumulator import AccumBatchNormalization, accumulate

    def normalization():
        if way in ("full", "plain"):
            return layers.BatchNormalization(momentum=MOMENTUM)
        bounds = {"rmax": 3.0, "dmax": 5.0} if way == "paper" else {}
        renorm = way in ("renorm", "paper")
        return AccumBatchNormalization(momentum=MOMENTUM, renorm=renorm, **bounds)

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = (digits.data[order] / 16).astype("float32")
    y = digits.target[order].astype("int32")
    # All epochs in one, each in another order: with a seed, Keras on TensorFlow repeats
    # the first epoch's, and so what is normalized together.
    rng = np.random.default_rng(seed)
    epochs = np.concatenate([rng.permutation(TRAINED) for _ in range(EPOCHS)])
    keras.utils.set_random_seed(seed)
    body = [
        layer
        for _ in range(2)
        for layer in (
            layers.Dense(64, use_bias=False),
            normalization(),
            layers.ReLU(),
        )
    ]
    model = keras.Sequential([layers.Input((64,)), *body, layers.Dense(10)])
    if way != "full":
        accumulate(model, microbatch_size=MICROBATCH, warn=False)
    model.compile(
        keras.optimizers.Adam(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x[epochs], y[epochs], batch_size=BATCH, shuffle=False, verbose=0)
    return model.evaluate(x[TRAINED:], y[TRAINED:], verbose=0)[1]


def main(way: str, seed: int) -> None:
    import keras

    backend = keras.backend.backend()
    answer = {
        "accuracy": accuracy(way, seed),
        "device": meters.device(backend),
        "versions": meters.versions(backend),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
