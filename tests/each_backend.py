"""Runs pytest on one backend after another, and prints a line for each in the end.

`python tests/each_backend.py tensorflow jax torch -- -m core`: the arguments after `--`
go to pytest. All backends run, and the command ends with 1 if one of them failed.
`--coverage` before the `--` records in `.coverage/` which lines each test ran.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

COVERAGE = Path(".coverage")


def run(backend, arguments, measure):
    """Runs pytest on a backend; returns whether it passed, and a line about it."""
    environment = {**os.environ, "KERAS_BACKEND": backend}
    if measure:
        environment.update(_measured(COVERAGE / backend))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", f"--junitxml={file}", *arguments],
            env=environment,
        )
        said = _counts(file) if file.exists() else "did not end as pytest does"
        if measure and file.exists():
            shutil.copy(file, COVERAGE / backend)
    seconds = time.monotonic() - began
    failed = f", FAILED with {ended.returncode}" if ended.returncode else ""
    return not ended.returncode, f"{backend}: {said}{failed} ({seconds:.0f} s)"


def _measured(folder):
    """The environment in which coverage.py measures a process and its children."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {
        "COVERAGE_PROCESS_START": str(Path("pyproject.toml").resolve()),
        "COVERAGE_FILE": str(folder.resolve() / "of"),
    }


def _counts(file):
    (suite,) = ElementTree.parse(file).getroot().iter("testsuite")
    count = {key: int(suite.get(key)) for key in ("failures", "errors", "skipped")}
    passed = int(suite.get("tests")) - sum(count.values())
    words = {
        "passed": passed,
        "failed": count["failures"],
        "errors": count["errors"],
        "skipped": count["skipped"],
    }
    return ", ".join(f"{number} {word}" for word, number in words.items() if number)


def main(arguments):
    split = arguments.index("--")
    backends, pytest = arguments[:split], arguments[split + 1 :]
    measure = "--coverage" in backends
    backends = [backend for backend in backends if backend != "--coverage"]
    lines, passed = [], []
    try:
        for backend in backends:
            print(f"-- {backend}", flush=True)
            ok, line = run(backend, pytest, measure)
            passed.append(ok)
            lines.append(line)
    finally:  # also if a person ends it
        print("", *lines, sep="\n", flush=True)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
