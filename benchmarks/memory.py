"""Peak memory in micro-batches, whatever their number, against training at a
micro-batch's size.
"""

from __future__ import annotations

import argparse
import sys

from . import report
from .processes import HONEST_MALLOC, started
from .variants import VARIANTS, Spec

DEFAULT = ("convolutions", "transformer")
OURS = ("split", "steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument(
        "--size", type=int, default=16, help="examples a micro-batch (M)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="the least is taken")
    parser.add_argument("--full", action="store_true", help="batches as well")


def run(backend: str, arguments: argparse.Namespace) -> None:
    most = max(arguments.microbatches)
    variants = [*OURS, "full"] if arguments.full else OURS
    measured, about = {}, {}
    for model in arguments.models:
        results = {}
        for variant, microbatches in [
            ("microbatches", most),
            *[
                (variant, microbatches)
                for variant in variants
                for microbatches in arguments.microbatches
            ],
        ]:
            # The same data for all: one of the largest updates.
            spec = Spec(
                backend,
                model,
                variant,
                size=arguments.size,
                microbatches=microbatches,
                updates=most // microbatches,
                seconds=2.0,  # for every way to meet its peak
            )
            found, ready = _measure(spec, arguments.repeat)
            if found is not None:
                name = (
                    variant
                    if variant == "microbatches"
                    else f"{variant} {microbatches}"
                )
                results[name] = {**found, "inputs": ready["inputs"]}
                about = {key: ready[key] for key in ("device", "versions")}
                results["gradients"] = ready["gradients"]
                print(f"{backend}, {model}, {name}: {found}", file=sys.stderr)
        measured[model] = results
    if not about:
        return
    report.save(
        f"memory-{backend}",
        f"Peak memory on {backend}",
        about,
        _text(measured, arguments, variants),
        {"models": measured},
    )


def _measure(spec: Spec, repeat: int) -> tuple[dict | None, dict]:
    """The least of several processes: what is not needed only ever adds."""
    answers, ready = [], {}
    for _ in range(repeat):
        with started({spec.variant: spec}, **HONEST_MALLOC) as running:
            for process in running.values():
                ready = process.ready
                answers.append(process.round())
    if not answers:
        return None, ready
    held = [a["device_peak"] or a["peak"] - a["built"] for a in answers]
    return {"peak": min(held), "temporaries": answers[0]["temporaries"]}, ready


def _ratio(results: dict, name: str) -> float:
    """To plain training at the micro-batch's size plus one set of gradients."""
    return results[name]["peak"] / (
        results["microbatches"]["peak"] + results["gradients"]
    )


def _text(measured: dict, arguments: argparse.Namespace, variants) -> str:
    def mib(value):
        return "-" if value is None else report.number(value / report.MIB)

    rows, temporaries = [], []
    for model, results in measured.items():
        plain = results["microbatches"]["peak"]
        rows.append([model, "an update a micro-batch", mib(plain), "-", "-"])
        bound = plain + results["gradients"]
        rows.append(
            [model, "the same plus one set of gradients", mib(bound), "-", "1.00"]
        )
        temporaries.append([model, mib(results["microbatches"]["temporaries"])])
        for variant in variants:
            for microbatches in arguments.microbatches:
                name = f"{variant} {microbatches}"
                if name not in results:
                    continue
                what = f"{VARIANTS[variant]}, {microbatches} micro-batches"
                held = [mib(results[name][key]) for key in ("peak", "inputs")]
                rows.append([model, what, *held, report.ratio(_ratio(results, name))])
                temporaries[-1].append(mib(results[name]["temporaries"]))
    parts = [
        f"Micro-batches of {arguments.size} examples; Adam; `fit` with its defaults. "
        "Peak while training, from after packages were loaded, and the model and its "
        "data made (of a GPU: the backend's own counter, from the start); the least "
        f"of {arguments.repeat} processes. The ratio is to training with an update a "
        "micro-batch plus one set of gradients in float32.",
        report.table(["model", "way", "MiB", "an update's data", "ratio"], rows),
    ]
    if any(r["microbatches"]["temporaries"] for r in measured.values()):
        heads = [
            f"{VARIANTS[variant]}, {microbatches} micro-batches"
            for variant in variants
            for microbatches in arguments.microbatches
        ]
        parts += [
            "Temporaries of the largest compiled step in MiB (`memory_analysis()`):",
            report.table(["model", "an update a micro-batch", *heads], temporaries),
        ]
    return "\n\n".join(parts)


def summary(backend: str, saved: dict) -> str:
    """A few lines for the README."""
    lines = [
        f"{backend}, peak memory / (plain at the micro-batch + one set of gradients):"
    ]
    for model, results in saved["models"].items():
        ratios = {
            name: f"{_ratio(results, name):.2f}"
            for name in results
            if name not in ("microbatches", "gradients")
        }
        lines.append(f"  {model}: {ratios}")
    return "\n".join(lines)
