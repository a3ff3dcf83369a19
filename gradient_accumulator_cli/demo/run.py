"""Runs the demonstration: it prepares data, trains in four ways, and reports."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from gradient_accumulator_cli.demo import report, sentences
from gradient_accumulator_cli.demo.data import (
    Arrays,
    Settings,
    Size,
    load,
    load_brain,
    prepare,
    save,
)


def console() -> Console:
    """Returns the console, without escape codes if NO_COLOR is set (no-color.org)."""
    # Rich itself then leaves out colours, but neither bold nor dim text.
    return Console(color_system=None if os.environ.get("NO_COLOR") else "auto")


def run_demo(
    backend: str, size: Size, text: sentences.Size, epochs: int, output: Path
) -> None:
    """Trains in four ways, prints the tables and writes the picture."""
    brain = load_brain()
    settings = {
        "brain": Settings(epochs, size.batch_size, size.microbatch_size),
        "sentences": Settings(text.epochs, text.batch_size, text.microbatch_size),
    }
    results: dict[str, dict[str, Arrays]] = {name: {} for name in settings}
    out = console()
    with tempfile.TemporaryDirectory(prefix="gradient-accumulator-") as name:
        folder = Path(name)
        save(prepare(brain, size), folder / "brain.npz")
        save(sentences.prepare(text), folder / "sentences.npz")
        for run, title in report.TITLES.items():
            out.rule(f"[bold]{title}")
            out.print(_how(run, settings), style="dim", highlight=False)
            train_in_process(run, folder, backend, settings)
            for name in settings:
                results[name][run] = load(folder / f"{name}-{run}.npz")
    report.print_to(out, results, settings)
    report.draw(backend, brain, size, results, settings, output)
    out.print(f"Picture: {output}", soft_wrap=True, highlight=False)


def train_in_process(
    run: str, folder: Path, backend: str, settings: dict[str, Settings]
) -> None:
    """Trains each model in one new process, which ends before this function does.

    Raises:
        RuntimeError: If the process fails. The message ends with the process's errors.
    """
    log = folder / f"{run}.log"
    with log.open("w+b") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "gradient_accumulator_cli.demo.train"]
            + [str(folder), run]
            + [str(part) for name in settings for part in (name, *settings[name])],
            env={
                **os.environ,
                "KERAS_BACKEND": backend,
                # JAX allocates GPU memory as it needs it: the peak is then meaningful.
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },
            stderr=stderr,  # the libraries are talkative
            # Ctrl-C reaches the parent process only, which then ends the child.
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


def _how(run: str, settings: dict[str, Settings]) -> str:
    """Returns a description of a run."""
    return "; ".join(
        {
            "batch": f"{batch} {of} at once",
            "microbatches": f"batches of {batch} {of}, "
            f"accumulate(model, microbatch_size={microbatch})",
            "keras": f"batches of {microbatch} {of}, "
            f"gradient_accumulation_steps={batch // microbatch}",
            "reordered": f"{batch} {of} at once, in another order",
        }[run]
        for of, (_, batch, microbatch) in zip(
            ("patches", "sentences"), settings.values()
        )
    )
