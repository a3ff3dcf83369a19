"""Several devices and processes give one device's results, and reduce once an update.

The scripts of `distributed/` run as new processes, because a process must know its
devices and addresses before its backend begins.
"""

import json
import sys
from functools import partial
from pathlib import Path

import keras
import numpy as np
import problems
import pytest
from helpers import named
from versions import unless_plain_fails

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import launch

on_jax = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="devices and processes of JAX"
)
on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="processes of torch.distributed"
)
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="strategies of tf.distribute"
)


def check_restart(start, script, folder):
    """One of two processes is killed, and the other fails; then both start again."""

    def run(backups, kill, file):
        return start(script, folder / backups, kill, folder / file)

    launch.succeed(run("uninterrupted", "no", "uninterrupted"))
    survivor, killed = run("backups", "kill", "killed")
    outputs = launch.wait([survivor, killed])
    assert (survivor.returncode, killed.returncode) == (0, 9), outputs
    launch.succeed(run("backups", "no", "restarted"))
    for rank in range(2):
        ours = np.load(folder / f"restarted-{rank}.npy")
        np.testing.assert_array_equal(
            ours, np.load(folder / f"uninterrupted-{rank}.npy")
        )


def checks(script, **fields):
    return pytest.mark.parametrize("name", launch.checks(script, **fields))


def problems_on(place, left_out=lambda problem, way: False):
    """All problems of this backend; only `make test-full` runs those for others."""
    return pytest.mark.parametrize(
        ("way", "name"),
        [
            pytest.param(
                way,
                problem.name,
                marks=[
                    unless_plain_fails(*problem.since),
                    *([] if place in problem.devices else [pytest.mark.full]),
                ],
            )
            for way in problems.WAYS_OF_FIT
            for problem in problems.here()
            if keras.backend.backend() == place and not left_out(problem, way)
        ],
    )


@on_torch
@pytest.mark.xdist_group("torch_fit")
@problems_on("torch", lambda problem, _: problem.per_process)
def test_processes_of_torchrun_give_the_batch(request, way, name):
    launch.one_of(request, partial(launch.torch_processes, "torch_fit.py", way))


@on_torch
@pytest.mark.xdist_group("torch_checks")
@checks("torch_checks.py")
@pytest.mark.core
def test_processes_of_torchrun(request, name):
    launch.one_of(request, partial(launch.torch_processes, "torch_checks.py"))


@on_torch
def test_a_process_of_torchrun_that_is_killed(tmp_path):
    check_restart(launch.torch_processes, "torch_killed.py", tmp_path)


@on_jax
@pytest.mark.xdist_group("jax_fit")
@problems_on("jax")
def test_devices_of_jax_give_the_batch(request, way, name):
    devices = 2 if way == "microbatch_size" else 4
    launch.one_of(request, partial(launch.processes, "jax_fit.py", way, devices))


@on_jax
@pytest.mark.xdist_group("jax_checks")
@checks("jax_checks.py")
def test_devices_of_jax(request, name):
    launch.one_of(request, partial(launch.processes, "jax_checks.py"))


def exchanges(folder, kind, microbatches):
    process = launch.start(
        "jax_collectives.py", folder / f"{microbatches}", kind, microbatches
    )
    (output,) = launch.succeed([process])
    return json.loads(output.splitlines()[-1])


@on_jax
def test_jax_reduces_once_an_update_whatever_the_number_of_microbatches(tmp_path):
    for microbatches in (1, 2, 6):
        found = exchanges(tmp_path, "data", microbatches)
        assert found["microbatch"] == []
        # The gradients, the loss and its denominator, metrics' totals and counts.
        assert found["update"] == [["all-reduce", found["parameters"] + 6]]


@on_jax
@pytest.mark.core
def test_jax_reduces_once_an_update_where_variables_are_sharded(tmp_path):
    one, three = (exchanges(tmp_path, "model", microbatches) for microbatches in (1, 3))
    assert one["sharding"] == "P(None, 'model')"
    assert one["update"] == three["update"] != []
    # In a micro-batch the parts of a layer exchange activations, so that they exchange
    # less in smaller micro-batches.
    reduced = [
        sum(n for kind, n in f["microbatch"] if kind == "all-reduce")
        for f in (one, three)
    ]
    assert reduced[0] == 3 * reduced[1]


def jax_processes(script, *arguments):
    """Starts two processes of JAX, which get their numbers and their address."""
    address = f"127.0.0.1:{launch.free_port()}"
    return [launch.start(script, rank, address, *arguments) for rank in range(2)]


@on_jax
def test_processes_of_jax_give_the_batch(tmp_path):
    file = tmp_path / "trained"
    launch.succeed([launch.start("jax_processes.py", 1, 0, "alone", file)])
    address = f"127.0.0.1:{launch.free_port()}"
    launch.succeed(
        [launch.start("jax_processes.py", 2, rank, address, file) for rank in range(2)],
    )
    reference = np.load(f"{file}-plain.npz")
    for way in ("microbatch_size", "accum_steps"):
        for rank in range(2):
            ours = np.load(f"{file}-{way}-{rank}.npz")
            assert ours.keys() == reference.keys()
            for name, values in reference.items():
                scale = np.abs(values - reference.get(f"before {name}", 0)).max()
                np.testing.assert_allclose(
                    ours[name], values, rtol=0, atol=1e-5 * scale, err_msg=name
                )


@on_jax
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
@pytest.mark.parametrize("more", ["batches", "microbatches"])
def test_processes_of_jax_that_have_more_than_others(more, reduction):
    launch.succeed(jax_processes("jax_uneven.py", more, reduction))


@on_jax
def test_a_process_of_jax_that_is_killed(tmp_path):
    def run(backups, kill, file):
        return jax_processes("jax_killed.py", tmp_path / backups, kill, tmp_path / file)

    launch.succeed(run("uninterrupted", "no", "uninterrupted"))
    survivor, killed = run("backups", "kill", "killed")
    outputs = launch.wait([survivor, killed])
    assert killed.returncode == 9, outputs[1]
    # JAX ends a process if it loses another one.
    assert survivor.returncode not in (0, None), outputs[0]
    assert "A process of `jax.distributed` did not answer" in outputs[0]
    assert np.load(tmp_path / "killed-0.npz")["updates"] == 2
    launch.succeed(run("backups", "no", "restarted"))
    for rank in range(2):
        ours = np.load(tmp_path / f"restarted-{rank}.npz")
        reference = np.load(tmp_path / f"uninterrupted-{rank}.npz")
        for name, values in reference.items():
            np.testing.assert_array_equal(ours[name], values)


@on_tensorflow
@pytest.mark.xdist_group("tensorflow_fit")
@problems_on(
    "tensorflow",
    lambda problem, way: (
        problem.per_process or (way == "microbatch_size" and not problem.thirds)
    ),
)
def test_replicas_of_tensorflow_give_the_batch(request, way, name):
    start = partial(launch.processes, "tensorflow_fit.py", way, 2)
    plain_failed = launch.one_of(request, start)
    assert bool(plain_failed) is not named(name).plain_replicas, plain_failed


@on_tensorflow
@pytest.mark.xdist_group("tensorflow_checks")
@checks("tensorflow_checks.py")
def test_replicas_of_tensorflow(request, name):
    launch.one_of(request, partial(launch.processes, "tensorflow_checks.py", 2))


@on_tensorflow
@pytest.mark.full
@pytest.mark.xdist_group("tensorflow_checks_4")
@checks("tensorflow_checks.py", four_replicas=True)
def test_four_replicas_of_tensorflow(request, name):
    """Three of them have no examples of the last batch."""
    launch.one_of(request, partial(launch.processes, "tensorflow_checks.py", 4))


@on_tensorflow
@pytest.mark.xdist_group("tensorflow_mirrored")
@checks("tensorflow_mirrored.py")
def test_optimizer_and_normalization_on_replicas_of_tensorflow(request, name):
    launch.one_of(request, partial(launch.processes, "tensorflow_mirrored.py"))


@on_tensorflow
@pytest.mark.xdist_group("tensorflow_workers")
@pytest.mark.parametrize(
    "name",
    [
        *(p.name for p in problems.here() if "workers" in p.devices),
        *launch.checks("tensorflow_workers.py"),
    ],
)
def test_workers_of_tensorflow(request, name):
    launch.one_of(request, partial(launch.tensorflow_workers, "tensorflow_workers.py"))


@on_tensorflow
def test_a_worker_of_tensorflow_that_is_killed(tmp_path):
    check_restart(launch.tensorflow_workers, "tensorflow_killed.py", tmp_path)
