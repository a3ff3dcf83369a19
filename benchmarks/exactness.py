"""What is exact: Keras's own accumulation and ours, against the batch.

Walks the problems of the test suite (`tests/problems/`) with its measure of what is
the same (`tests/helpers/exactness.py`), in one process for each backend, which
`python -m benchmarks.exactness` is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings

from . import meters, report
from .processes import ROOT, environment

WAYS = {
    "keras_even": "Keras's own, even micro-batches",
    "keras": "Keras's own",
    "microbatch_size": "ours, `microbatch_size`",
    "accum_steps": "ours, `accum_steps`",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="problems whose name contains this")


def run(backend: str, arguments: argparse.Namespace) -> None:
    about, problems = {}, {}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.exactness", arguments.only],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment(backend),
            text=True,
        )
        with process:
            for line in process.stdout:
                answer = json.loads(line)
                if "device" in answer:
                    about = answer
                    continue
                print(f"{backend}: {line.strip()}", file=sys.stderr)
                if "full" not in answer:  # else plain Keras itself cannot
                    problems[answer.pop("name")] = answer
        if process.returncode:
            log.seek(0)
            print(log.read().decode(errors="replace")[-2000:], file=sys.stderr)
            raise SystemExit(f"exactness on {backend} ended early")
    report.save(
        f"exactness-{backend}",
        f"Exactness on {backend}",
        about,
        _text(problems),
        {"problems": problems},
    )


def _text(problems: dict) -> str:
    def cell(found: dict) -> str:
        if "error" in found:
            return f"**raises** {found['error']}"
        off = f"{found['off']:.0e}"
        return off if found["same"] else f"**{off}**"

    rows = [
        [name.replace("_", " "), *[cell(found[way]) for way in WAYS]]
        for name, found in problems.items()
    ]
    totals = [f"{passed(problems, way)} of {len(problems)}" for way in WAYS]
    return "\n\n".join(
        [
            "After training in micro-batches: the largest difference of a weight from "
            "plain Keras on the batch, as a part of how far that weight moved. In bold "
            "what is more than rounding (1e-5): in the weights, and for ours also in "
            "the optimizer's variables and the logs. An epoch's last micro-batches are "
            "smaller and its last update has fewer of them, but for the first column, "
            "where all micro-batches of all updates have one size.",
            report.table(["problem", *WAYS.values()], [["**exact**", *totals], *rows]),
        ]
    )


def passed(problems: dict, way: str) -> int:
    return sum(found[way].get("same", False) for found in problems.values())


def summary(backend: str, saved: dict) -> str:
    """One line for the README."""
    problems = saved["problems"]
    counts = [f"{what} {passed(problems, way)}" for way, what in WAYS.items()]
    return f"{backend}, exact of {len(problems)} problems: {', '.join(counts)}"


def main() -> None:
    """In the process of one backend: a line of JSON for each problem."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT / "tests"))
    import helpers
    import keras
    import problems

    def answer(message: dict) -> None:
        print(json.dumps(message), file=out, flush=True)

    backend = keras.backend.backend()
    answer({"device": meters.device(backend), "versions": meters.versions(backend)})
    for problem in problems.here():
        if sys.argv[1] not in problem.name:
            continue
        found = {"name": problem.name}
        # Keras keeps the policy of the first dtype that it was asked for.
        keras.backend.clear_session()
        try:
            full = helpers.train(problem, problem.batches())
        except Exception as error:
            answer({**found, "full": f"{type(error).__name__}: {error}"[:300]})
            continue
        for way in WAYS:
            keras.backend.clear_session()
            try:
                found[way] = _compare(helpers, problem, way, full)
            except Exception as error:  # Keras's own fails in many ways
                found[way] = {"error": type(error).__name__, "says": str(error)[:300]}
        answer(found)


def _compare(helpers, problem, way: str, full) -> dict:
    if way.startswith("keras"):
        data, steps = helpers.microbatches(problem), problem.accum_steps
        if way == "keras_even":
            batch, data = helpers.even(problem)
            full, steps = helpers.train(problem, [batch]), len(data)
        trained = helpers.train(problem, data, gradient_accumulation_steps=steps)
        # Its accumulators are its own affair; the weights say what it does.
        trained.optimizer = full.optimizer
        if [*map(len, trained.history)] == [*map(len, full.history)]:
            trained.history = full.history
    else:
        trained = helpers.in_microbatches(problem, way)
    differences = helpers.differences(trained, full, problem.floatx)
    return {
        "same": not differences,
        "off": _weights_off(trained, full),
        "differences": differences[:5],
    }


def _weights_off(trained, full) -> float:
    """The largest difference of a weight, as a part of how far that weight moved."""
    most = 0.0
    for name, reference in full.weights.items():
        off = abs(trained.weights[name] - reference).max(initial=0)
        moved = abs(reference - full.before[name]).max(initial=0)
        if off:
            most = max(most, off / moved if moved else math.inf)
        if math.isnan(off):
            return math.inf
    return float(most)


if __name__ == "__main__":
    main()
