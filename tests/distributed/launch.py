"""Starts processes that train together, and sees that they end."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


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


def wait(processes, seconds):
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


def succeed(processes, seconds):
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
