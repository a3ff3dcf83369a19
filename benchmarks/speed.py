"""Time per example and peak memory of every way to train, against Keras's own."""

from __future__ import annotations

import argparse
import math
import statistics
import sys

from . import report
from .models import FIVE
from .processes import HONEST_MALLOC, started
from .variants import VARIANTS, Spec

OURS = ("split", "steps")
DEFAULT_VARIANTS = ("full", "microbatches", "keras", *OURS, "floor")
DEFAULT = FIVE


def add_timing_arguments(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--microbatches", type=int, default=8, help="micro-batches an update (K)"
    )
    parser.add_argument(
        "--size", type=int, default=8, help="examples a micro-batch (M)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_timing_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS
    )
    parser.add_argument(
        "--no-memory",
        dest="memory",
        action="store_false",
        help="do not measure it, which takes as many processes again",
    )


def run(backend: str, arguments: argparse.Namespace) -> None:
    rounds = 1 if arguments.quick else arguments.rounds
    seconds = 0.2 if arguments.quick else 1.0
    measured, about = {}, {}
    for model in arguments.models:
        specs = {
            variant: Spec(
                backend,
                model,
                variant,
                size=arguments.size,
                microbatches=arguments.microbatches,
                seconds=seconds,
            )
            for variant in arguments.variants
        }
        measured[model], about = measure_times(specs, rounds)
        if arguments.memory:
            _measure_memory(specs, measured[model])
        times = {v: report.number(r["time"] * 1e6) for v, r in measured[model].items()}
        print(f"{backend}, {model}: {times}", file=sys.stderr)
    if not about:
        return
    report.save(
        f"speed-{backend}",
        f"Speed on {backend}",
        about,
        _text(measured, arguments, rounds),
        {"models": measured},
    )


def measure_times(specs: dict[str, Spec], rounds: int) -> tuple[dict, dict]:
    """All variants of a model, round about, so that a machine's moods hit all."""
    results: dict[str, dict] = {}
    about = {}
    with started(specs) as running:
        for round_ in range(rounds):
            # Nobody is always the first.
            names = [*running]
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                answer = running[name].round()
                seconds = [s / answer["examples"] for s in answer["seconds"]]
                results.setdefault(name, {"seconds": []})["seconds"].append(seconds)
        for process in running.values():
            about = {key: process.ready[key] for key in ("device", "versions")}
    for result in results.values():
        result["time"] = min(statistics.median(s) for s in result["seconds"])
    return {name: results[name] for name in specs if name in results}, about


def _measure_memory(specs: dict[str, Spec], results: dict[str, dict]) -> None:
    # Apart from time: see HONEST_MALLOC.
    for name, spec in specs.items():
        with started({name: spec}, **HONEST_MALLOC) as running:
            for process in running.values():
                answer = process.round()
                results[name]["memory"] = answer["device_peak"] or (
                    answer["peak"] - answer["built"]
                )
                results[name]["temporaries"] = answer["temporaries"]


def ratios(results: dict, ours: str) -> dict[str, float]:
    """Ours to Keras's own accumulation, and to the floor."""
    time = {name: result["time"] for name, result in results.items()}
    return {
        other: time[ours] / time[other] if {ours, other} <= time.keys() else math.nan
        for other in ("keras", "floor")
    }


def _text(measured: dict, arguments: argparse.Namespace, rounds: int) -> str:
    names = [*arguments.variants]
    heads = [VARIANTS[name] for name in names]
    microbatches, size = arguments.microbatches, arguments.size

    def each(value):
        return [
            [model, *[value(results.get(name, {})) for name in names]]
            for model, results in measured.items()
        ]

    def mib(key):
        def value(result):
            held = result.get(key)
            return "-" if held is None else report.number(held / report.MIB)

        return value

    times = each(lambda r: report.number(r["time"] * 1e6 if r else None))
    columns = [(ours, other) for other in ("keras", "floor") for ours in OURS]
    found = {m: {o: ratios(r, o) for o in OURS} for m, r in measured.items()}
    rows = [
        [model, *[report.ratio(found[model][o][other]) for o, other in columns]]
        for model in measured
    ]
    means = [
        report.geometric_mean(
            value for r in found.values() if (value := r[o][other]) == value
        )
        for o, other in columns
    ]
    rows.append(["geometric mean", *[report.ratio(mean) for mean in means]])
    ratio_heads = [f"{VARIANTS[o]} / {VARIANTS[other]}" for o, other in columns]
    parts = [
        f"An update is {microbatches} micro-batches of {size} examples; Adam; `fit` "
        f"with its defaults. Each column is a process of its own. Of {rounds} "
        "interleaved rounds of epochs the best, of each round the median.",
        "Microseconds per example:",
        report.table(["model", *heads], times),
        "Ratios of these times:",
        report.table(["model", *ratio_heads], rows),
    ]
    if arguments.memory:
        parts += [
            "Peak memory in MiB, from after packages were loaded and the model built "
            "(of a GPU: the backend's own counter, from the start):",
            report.table(["model", *heads], each(mib("memory"))),
        ]
    if any(r.get("temporaries") for m in measured.values() for r in m.values()):
        parts += [
            "Temporaries of the largest compiled step in MiB (`memory_analysis()`):",
            report.table(["model", *heads], each(mib("temporaries"))),
        ]
    return "\n\n".join(parts)


def summary(backend: str, saved: dict) -> str:
    """One paragraph for the README."""
    lines = [f"{backend}, time ({saved['device']}):"]
    for ours in OURS:
        found = {m: ratios(r, ours) for m, r in saved["models"].items()}
        for other in ("keras", "floor"):
            values = {m: r[other] for m, r in found.items() if r[other] == r[other]}
            if not values:
                continue
            worst = max(values, key=values.get)
            lines.append(
                f"  {VARIANTS[ours]} / {VARIANTS[other]}: geometric mean "
                f"{report.geometric_mean(values.values()):.2f}, at most "
                f"{values[worst]:.2f} ({worst})"
            )
    return "\n".join(lines)
