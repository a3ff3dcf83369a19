"""On Keras 2: time and peak memory against gradient-accumulator 0.5.2."""

from __future__ import annotations

import argparse
import os
import sys

from . import report
from .models import FIVE
from .processes import HONEST_MALLOC, started
from .speed import add_timing_arguments, measure_times
from .variants import RELEASED, VARIANTS, Spec

BACKENDS = ["tensorflow"]
DEFAULT = FIVE
OURS = ("steps", "split")
WAYS = ("microbatches", "released", *OURS)


add_arguments = add_timing_arguments


def run(backend: str, arguments: argparse.Namespace) -> None:
    if RELEASED not in os.environ:
        raise SystemExit(
            f"Name the folder with gradient-accumulator 0.5.2 in {RELEASED}: "
            "pip install --no-deps --target FOLDER gradient-accumulator==0.5.2"
        )
    measured, about = {}, {}
    for model in arguments.models:
        specs = {
            way: Spec(
                backend,
                model,
                way,
                size=arguments.size,
                microbatches=arguments.microbatches,
            )
            for way in WAYS
        }
        measured[model], about = measure_times(specs, arguments.rounds)
        for way, spec in specs.items():
            measured[model][way]["memory"] = _memory(way, spec)
        found = {way: _ratio(measured[model], way, "time") for way in OURS}
        print(f"{model}: {found}", file=sys.stderr)
    report.save(
        "keras2-tensorflow",
        "Against gradient-accumulator 0.5.2, on Keras 2",
        about,
        _text(measured, arguments),
        {"models": measured},
    )


def _memory(way: str, spec: Spec) -> int:
    held = []
    for _ in range(2):  # the least: what is not needed only ever adds
        with started({way: spec}, **HONEST_MALLOC) as running:
            answer = running[way].round()
            held.append(answer["device_peak"] or answer["peak"] - answer["built"])
    return min(held)


def _ratio(results: dict, way: str, key: str) -> float:
    """Ours to version 0.5.2."""
    return results[way][key] / results["released"][key]


def _text(measured: dict, arguments: argparse.Namespace) -> str:
    def rows(key, scale):
        found = [
            [
                model,
                *[report.number(results[way][key] * scale) for way in WAYS],
                *[report.ratio(_ratio(results, way, key)) for way in OURS],
            ]
            for model, results in measured.items()
        ]
        means = [
            report.ratio(
                report.geometric_mean(_ratio(r, way, key) for r in measured.values())
            )
            for way in OURS
        ]
        return [*found, ["geometric mean", *["" for _ in WAYS], *means]]

    head = [
        "model",
        *[VARIANTS[way] for way in WAYS],
        *[f"{VARIANTS[way]} / 0.5.2" for way in OURS],
    ]
    return "\n\n".join(
        [
            f"An update is {arguments.microbatches} micro-batches of {arguments.size} "
            "examples; Adam; `fit` with its defaults. Each column is a process of its "
            f"own. Of {arguments.rounds} interleaved rounds of epochs the best, of "
            "each round the median. Microseconds per example:",
            report.table(head, rows("time", 1e6)),
            "Peak memory in MiB, from after packages were loaded and the model built, "
            "the least of two processes:",
            report.table(head, rows("memory", 1 / report.MIB)),
        ]
    )


def summary(backend: str, saved: dict) -> str:
    """Two lines for the README."""
    lines = []
    for key in ("time", "memory"):
        for way in OURS:
            found = [_ratio(r, way, key) for r in saved["models"].values()]
            lines.append(
                f"Keras 2, {key}, {VARIANTS[way]} / 0.5.2: geometric mean "
                f"{report.geometric_mean(found):.2f}, at most {max(found):.2f}"
            )
    return "\n".join(lines)
