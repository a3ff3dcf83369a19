"""Starts processes that train together, and sees that they end.

A script's checks are tests; one launch runs all of them that are selected.
"""

import ast
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import covered
import pytest

HERE = Path(__file__).parent
SECONDS = 240  # at most, for all processes of a launch
SECONDS_OF_A_CHECK = 20  # more, for each
AT_ONCE = 40  # checks of a launch, at most


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script, *arguments, **environment):
    """A process of `script` in this folder, with Keras on the same backend."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        **{key: str(value) for key, value in environment.items()},
    }
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes(script, *arguments):
    """One process, as a list as of several."""
    return [start(script, *arguments)]


def wait(processes, seconds=SECONDS):
    """What each printed, when all have ended; none outlives the time limit."""
    end = time.monotonic() + seconds
    outputs = []
    for process in processes:
        try:
            outputs.append(
                process.communicate(timeout=max(end - time.monotonic(), 1))[0]
            )
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0] + f"\n(killed after {seconds} s)")
    return outputs


def succeed(processes, seconds=SECONDS):
    """The same, and all have succeeded."""
    outputs = wait(processes, seconds)
    for rank, (process, output) in enumerate(zip(processes, outputs)):
        assert process.returncode == 0, f"process {rank}:\n{output[-6000:]}"
    return outputs


def torch_processes(script, *arguments, count=2):
    """As many processes as `torchrun` would start on this machine."""
    port = free_port()
    return [
        start(
            script,
            *arguments,
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=count,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(count)
    ]


def tensorflow_workers(script, *arguments, count=2):
    """The workers of a `MultiWorkerMirroredStrategy`."""
    workers = [f"127.0.0.1:{free_port()}" for _ in range(count)]
    return [
        start(
            script,
            *arguments,
            TF_CONFIG=json.dumps(
                {
                    "cluster": {"worker": workers},
                    "task": {"type": "worker", "index": rank},
                }
            ),
        )
        for rank in range(count)
    ]


def checks(script, **fields):
    """The names of a script's checks, which this process cannot import.

    Args:
        script: A file in this folder.
        **fields: What the `@check` of each has to say; all checks without.
    """
    names = []
    for node in ast.parse((HERE / script).read_text()).body:
        for decorator in getattr(node, "decorator_list", ()):
            is_call = isinstance(decorator, ast.Call)
            if ast.unparse(decorator.func if is_call else decorator) == "check":
                given = decorator.keywords if is_call else ()
                said = {each.arg: ast.literal_eval(each.value) for each in given}
                if fields.items() <= said.items():
                    names.append(node.name)
    return names


def one_of(request, start):
    """Launches the checks of a test that are selected, all at once.

    Args:
        request: Pytest's, of a test that has the parameter `name`: those that differ in
            nothing else are launched together.
        start: Starts processes for the names that it is given.

    Returns:
        What the processes said of the check that this test is about.
    """
    test, name = _test(request.node), request.node.callspec.params["name"]
    found = request.session.stash.setdefault(_OUTCOMES, {}).setdefault(test, {})
    if name not in found:
        selected = {
            item.callspec.params["name"]: item
            for item in request.session.items
            if _test(item) == test and not _is_skipped(item)
        }
        following = list(selected)[list(selected).index(name) :][:AT_ONCE]
        with pytest.MonkeyPatch.context() as patch:
            for key, value in covered.for_checks(selected).items():
                patch.setenv(key, value)
            found.update(outcomes(start, following))
    failure, said = found[name]
    assert not failure, failure
    return said


_OUTCOMES = pytest.StashKey[dict]()


def _test(item):
    """The test function, and its parameters but the name."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    others = {key: value for key, value in parameters.items() if key != "name"}
    return item.path, item.originalname, repr(others)


def _is_skipped(item):
    return any(mark.args[0] for mark in item.iter_markers("skipif"))


def outcomes(start, names):
    """For each name what failed, if anything, and what was said of it."""
    found = {}
    while left := [name for name in names if name not in found]:
        processes = start(*left)
        outputs = wait(processes, SECONDS + SECONDS_OF_A_CHECK * len(left))
        said = [dict(re.findall("^passed\t(.*)\t(.*)$", o, re.M)) for o in outputs]
        passed = [name for name in left if all(name in each for each in said)]
        found.update({name: (None, said[0][name]) for name in passed})
        if passed != left or any(process.returncode for process in processes):
            # The first that did not pass in all, or what is after the last.
            failed = next((n for n in left if n not in passed), left[-1])
            found[failed] = (_failure(processes, outputs), None)
    return found


def _failure(processes, outputs):
    return "\n".join(
        f"process {rank} ended with {process.returncode}:\n{output[-6000:]}"
        for rank, (process, output) in enumerate(zip(processes, outputs))
    )
