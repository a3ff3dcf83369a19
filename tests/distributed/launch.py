"""Starts processes that train one model, and makes sure that they end.

The checks of a script are tests. One launch runs all checks that are selected.
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
SECONDS = 240  # the time limit of all processes of a launch
SECONDS_OF_A_CHECK = 20  # each check adds this to the limit
AT_ONCE = 40  # the largest number of checks in a launch


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script, *arguments, **environment):
    """Starts a script of this folder, with Keras on the backend of this process."""
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
    """Starts one process; returns a list, as for several processes."""
    return [start(script, *arguments)]


def wait(processes, seconds=SECONDS):
    """Waits for processes, or kills them at the time limit; returns their outputs."""
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
    """Waits for processes, and asserts that all succeed; returns their outputs."""
    outputs = wait(processes, seconds)
    for rank, (process, output) in enumerate(zip(processes, outputs)):
        assert process.returncode == 0, f"process {rank}:\n{output[-6000:]}"
    return outputs


def torch_processes(script, *arguments, count=2):
    """Starts the processes that `torchrun` would start."""
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
    """Starts the workers of a `MultiWorkerMirroredStrategy`."""
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
        **fields: Keywords that the `@check` of each must have. Without them, the names
            of all checks are returned.
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
    """Launches all selected checks of a test function at once.

    Args:
        request: The pytest request of a test with the parameter `name`. One launch
            serves all tests that differ only in this parameter.
        start: A function of names that starts the processes for these checks.

    Returns:
        The result of this test's check, which the first process printed.
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
    """The test function, and its parameters except for the name."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    others = {key: value for key, value in parameters.items() if key != "name"}
    return item.path, item.originalname, repr(others)


def _is_skipped(item):
    return any(mark.args[0] for mark in item.iter_markers("skipif"))


def outcomes(start, names):
    """For each name, the failure (or None), and the result that was printed."""
    found = {}
    while left := [name for name in names if name not in found]:
        processes = start(*left)
        outputs = wait(processes, SECONDS + SECONDS_OF_A_CHECK * len(left))
        said = [dict(re.findall("^passed\t(.*)\t(.*)$", o, re.M)) for o in outputs]
        passed = [name for name in left if all(name in each for each in said)]
        found.update({name: (None, said[0][name]) for name in passed})
        if passed != left or any(process.returncode for process in processes):
            # The first check that did not pass in all processes has failed. If all
            # passed, the end of a process has failed, which counts for the last check.
            failed = next((n for n in left if n not in passed), left[-1])
            found[failed] = (_failure(processes, outputs), None)
    return found


def _failure(processes, outputs):
    return "\n".join(
        f"process {rank} ended with {process.returncode}:\n{output[-6000:]}"
        for rank, (process, output) in enumerate(zip(processes, outputs))
    )
