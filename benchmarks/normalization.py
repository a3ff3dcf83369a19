"""Batch normalization and clipping in micro-batches: what they cost."""

from __future__ import annotations

import argparse
import math

from . import loops, report, speed
from .variants import VARIANTS, Spec

DEFAULT = ["normalized convolutions"]
TIMED = ("split", "accumulating", "clipped")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    speed.add_timing_arguments(parser)


def run(backend: str, arguments: argparse.Namespace) -> None:
    measured, about = {}, {}
    for model in arguments.models:
        specs = {
            variant: Spec(
                backend,
                model,
                variant,
                size=arguments.size,
                microbatches=arguments.microbatches,
            )
            for variant in TIMED
        }
        results, about = speed.measure_times(specs, arguments.rounds)
        measured[model] = {v: r["time"] for v, r in results.items()}
    rows = [
        [model, *[report.number(times.get(v, math.nan) * 1e6) for v in TIMED]]
        + [report.ratio(loops.ratio(times, v, "split")) for v in TIMED[1:]]
        for model, times in measured.items()
    ]
    names = [VARIANTS[v] for v in TIMED]
    text = "\n\n".join(
        [
            "Microseconds per example in training with `microbatch_size`, "
            f"{arguments.microbatches} micro-batches of {arguments.size} examples an "
            "update; Adam. The ratios are to `BatchNormalization` without clipping.",
            report.table(
                ["model", "ours, `BatchNormalization`", *names[1:], "ratio", "ratio"],
                rows,
            ),
        ]
    )
    report.save(
        f"normalization-{backend}",
        f"Batch normalization and clipping on {backend}",
        about,
        text,
        {"times": measured},
    )


def summary(backend: str, saved: dict) -> str:
    ratios = ", ".join(
        f"{VARIANTS[v]} {report.ratio(loops.ratio(times, v, 'split'))}"
        for times in saved["times"].values()
        for v in TIMED[1:]
    )
    return f"{backend}, normalization: {ratios}"
