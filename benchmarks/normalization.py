"""Batch normalization and clipping in pieces: what they cost, and what they keep."""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys

from . import loops, report, speed
from .digits import BATCH, EPOCHS, PIECE, WAYS
from .processes import ROOT, environment
from .variants import VARIANTS, Spec

DEFAULT = ["normalized convolutions"]
TIMED = ("split", "accumulating", "clipped")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pieces", type=int, default=8, help="pieces an update (K)")
    parser.add_argument("--size", type=int, default=8, help="examples a piece (M)")
    parser.add_argument(
        "--seeds", type=int, default=4, help="trainings on digits, or 0"
    )


def run(backend: str, arguments: argparse.Namespace) -> None:
    measured, about = {}, {}
    for model in arguments.models:
        specs = {
            variant: Spec(
                backend, model, variant, size=arguments.size, pieces=arguments.pieces
            )
            for variant in TIMED
        }
        results, about = speed.measure_times(specs, arguments.rounds)
        measured[model] = {v: r["time"] for v, r in results.items()}
    accuracies = {
        way: [_accuracy(backend, way, seed) for seed in range(arguments.seeds)]
        for way in (WAYS if arguments.seeds else ())
    }
    rows = [
        [model, *[report.number(times.get(v, math.nan) * 1e6) for v in TIMED]]
        + [report.ratio(loops.ratio(times, v, "split")) for v in TIMED[1:]]
        for model, times in measured.items()
    ]
    names = [VARIANTS[v] for v in TIMED]
    text = "\n\n".join(
        [
            f"Microseconds per example in training with `microbatch_size`, "
            f"{arguments.pieces} pieces of {arguments.size} examples an update; Adam. "
            "The ratios are to `BatchNormalization` without clipping.",
            report.table(
                ["model", "ours, `BatchNormalization`", *names[1:], "ratio", "ratio"],
                rows,
            ),
            *_digits(accuracies, arguments.seeds),
        ]
    )
    report.save(
        f"normalization-{backend}",
        f"Batch normalization and clipping on {backend}",
        about,
        text,
        {"times": measured, "accuracies": accuracies},
    )


def _digits(accuracies: dict, seeds: int) -> list[str]:
    if not accuracies:
        return []
    return [
        f"Validation accuracy on scikit-learn's digits after {EPOCHS} epochs, two "
        f"normalized dense layers, updates from {BATCH} examples, in pieces of "
        f"{PIECE} ({seeds} seeds):",
        report.table(
            ["", "mean", "of each seed"],
            [
                [
                    name,
                    f"{100 * statistics.mean(accuracies[way]):.1f} %",
                    ", ".join(f"{100 * a:.1f}" for a in accuracies[way]),
                ]
                for way, name in WAYS.items()
            ],
        ),
    ]


def _accuracy(backend: str, way: str, seed: int) -> float:
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
    return float(done.stdout.split()[-1])


def summary(backend: str, saved: dict) -> str:
    ratios = ", ".join(
        f"{VARIANTS[v]} {report.ratio(loops.ratio(times, v, 'split'))}"
        for times in saved["times"].values()
        for v in TIMED[1:]
    )
    digits = ", ".join(
        f"{WAYS[way]} {100 * statistics.mean(found):.1f} %"
        for way, found in saved["accuracies"].items()
    )
    return f"{backend}, normalization: {ratios}; digits: {digits}"
