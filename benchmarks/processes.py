"""Start the processes of a benchmark and talk to them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import meters
from .variants import Spec

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds that one answer may take

# Freed memory goes back to the system at once, so that the resident set is what is
# in use. It costs time, so the clock runs without it.
HONEST_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


class Failed(RuntimeError):
    """A variant ended before it answered; the message is the end of its output."""


def environment(backend: str, **extra: str) -> dict[str, str]:
    """The same number of threads for everyone, and GPU memory taken as needed."""
    threads = str(meters.cores())
    return {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        ),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TF_NUM_INTRAOP_THREADS": threads,
        "TF_NUM_INTEROP_THREADS": threads,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **extra,
    }


class Process:
    """A `variants` process, or one like it; `ready` is its first answer."""

    def __init__(self, spec: Spec, module: str = "variants", **extra: str):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  `end` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", spec.dumps()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(spec.backend, **extra),
            text=True,
        )
        self.ready: dict = {}

    def wait(self) -> Process:
        self.ready = self.answer()
        return self

    def round(self) -> dict:
        self.ask()
        return self.answer()

    def ask(self, command: str = "") -> None:
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def answer(self) -> dict:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT):
                raise Failed(f"No answer in {TIMEOUT} seconds.")
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise Failed(self._log.read().decode(errors="replace")[-2000:])
        return json.loads(line)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


@contextlib.contextmanager
def started(specs: dict[str, Spec], **extra: str) -> Iterator[dict[str, Process]]:
    """The processes that come up, one after the other; the rest are reported."""
    running = {}
    try:
        for name, spec in specs.items():
            process = Process(spec, **extra)
            try:
                running[name] = process.wait()
            except Failed as failure:
                process.end()
                print(f"{spec.model}, {name} failed:\n{failure}", file=sys.stderr)
        yield running
    finally:
        for process in running.values():
            process.end()
