"""Time per example of the optimizer wrapper and of the function, against peers."""

from __future__ import annotations

import argparse
import math
import sys

from . import report, speed
from .models import FIVE
from .variants import VARIANTS, Spec

PAIRS = (("optimizer", "keras"), ("function", "peer"), ("host", "peer"))
PEERS = {"jax": "optax.microbatching", "torch": "Accelerate"}
# XLA runs convolutions inside a loop about 40 times slower on processors: an update
# of theirs takes most of a minute, ours and the peer's.
SLOW_IN_A_LOOP = ("convolutions",)
DEFAULT = FIVE


add_arguments = speed.add_timing_arguments


def run(backend: str, arguments: argparse.Namespace) -> None:
    pairs = [
        (ours, other)
        for ours, other in PAIRS
        if (other != "peer" or backend in PEERS)
        and (ours != "host" or backend == "jax")
    ]
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
            for variant in dict.fromkeys(
                ("microbatches", *[v for p in pairs for v in p])
            )
            if not (
                backend == "jax"
                and model in SLOW_IN_A_LOOP
                and variant in ("function", "peer")
            )
        }
        results, about = speed.measure_times(specs, arguments.rounds)
        measured[model] = {v: r["time"] for v, r in results.items()}
        times = {v: report.number(t * 1e6) for v, t in measured[model].items()}
        print(f"{backend}, {model}: {times}", file=sys.stderr)
    if not about:
        return
    names = {**VARIANTS, "peer": PEERS.get(backend, "")}
    rows = [
        [
            model,
            report.number(times.get("microbatches", math.nan) * 1e6),
            *[
                cell
                for pair in pairs
                for cell in (
                    *[report.number(times.get(v, math.nan) * 1e6) for v in pair],
                    report.ratio(ratio(times, *pair)),
                )
            ],
        ]
        for model, times in measured.items()
    ]
    means = ["geometric mean", ""]
    for pair in pairs:
        found = [ratio(times, *pair) for times in measured.values()]
        found = [each for each in found if each == each]
        means += ["", "", report.ratio(report.geometric_mean(found))]
    heads = [h for a, b in pairs for h in (names[a], names[b], "ratio")]
    report.save(
        f"loops-{backend}",
        f"Speed of loops of one's own on {backend}",
        about,
        "\n\n".join(
            [
                f"Microseconds per example. An update is {arguments.microbatches} "
                f"micro-batches of {arguments.size} examples; Adam. The optimizers in "
                "`fit` with its defaults, the functions in a loop by hand with the "
                f"optimizer that belongs to the peer. Of {arguments.rounds} "
                "interleaved rounds of epochs the best, of each round the median.",
                report.table(
                    ["model", VARIANTS["microbatches"], *heads], [*rows, means]
                ),
            ]
        ),
        {"models": measured},
    )


def ratio(times: dict[str, float], ours: str, other: str) -> float:
    return times.get(ours, math.nan) / times.get(other, math.nan)


def summary(backend: str, saved: dict) -> str:
    """A few lines for the README."""
    lines = [f"{backend}, loops of one's own ({saved['device']}):"]
    for pair in PAIRS:
        found = {m: ratio(times, *pair) for m, times in saved["models"].items()}
        found = {m: r for m, r in found.items() if r == r}
        if found:
            worst = max(found, key=found.get)
            lines.append(
                f"  {VARIANTS[pair[0]]}: geometric mean "
                f"{report.geometric_mean(found.values()):.2f}, at most "
                f"{found[worst]:.2f} ({worst})"
            )
    return "\n".join(lines)
