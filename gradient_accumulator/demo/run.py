"""The demonstration from beginning to end: data, three training runs, report."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from gradient_accumulator.demo import report
from gradient_accumulator.demo.data import Arrays, Size, load, load_brain, prepare, save

# Each run by the name that train.py knows it by, in the order of the report.
RUNS = {
    "full": "Full batch",
    "pieces": "In pieces",
    "keras": "Keras's own",
}


def console() -> Console:
    """Where it prints; without escape codes if the user wants none (no-color.org)."""
    # Of itself Rich leaves colours out, and bold and dim in.
    return Console(color_system=None if os.environ.get("NO_COLOR") else "auto")


def run_demo(backend: str, size: Size, epochs: int, output: Path) -> None:
    """Trains the three ways, prints the table and writes the picture."""
    brain = load_brain()
    results = {}
    out = console()
    with tempfile.TemporaryDirectory(prefix="gradient-accumulator-") as name:
        folder = Path(name)
        save(prepare(brain, size), folder / "data.npz")
        for run, title in RUNS.items():
            out.rule(f"[bold]{title}")
            out.print(_how(run, size), style="dim", highlight=False)
            results[title] = train_in_process(run, folder, backend, size, epochs)
    out.print(report.table(results))
    out.print(report.summary(results), highlight=False)
    report.draw(brain, results, output)
    out.print(f"Picture: {output}", soft_wrap=True, highlight=False)


def train_in_process(
    run: str, folder: Path, backend: str, size: Size, epochs: int
) -> Arrays:
    """Trains in a process of its own, which ends before this function does.

    Raises:
        RuntimeError: If the process fails; the message ends with what it said.
    """
    log = folder / f"{run}.log"
    with log.open("w+b") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "gradient_accumulator.demo.train"]
            + [str(folder), run]
            + [str(n) for n in (epochs, size.batch_size, size.microbatch_size)],
            env={
                **os.environ,
                "KERAS_BACKEND": backend,
                # A GPU's memory is taken as it is needed, so that its peak tells.
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },
            stderr=stderr,  # the libraries are talkative
            # Ctrl-C reaches this process only, which then ends the other one.
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    if code:
        end = log.read_text(errors="replace").splitlines()[-15:]
        raise RuntimeError(
            "\n".join(
                [f"The training run {run!r} ended with exit status {code}:", *end]
            )
        )
    return load(folder / f"{run}.npz")


def _how(run: str, size: Size) -> str:
    steps = size.batch_size // size.microbatch_size
    return {
        "full": f"{size.batch_size} patches at once",
        "pieces": f"batches of {size.batch_size} patches, "
        f"accumulate(model, microbatch_size={size.microbatch_size})",
        "keras": f"batches of {size.microbatch_size} patches, "
        f"gradient_accumulation_steps={steps}",
    }[run]
