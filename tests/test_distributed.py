"""Several devices and processes: what one device gives, with one reduction an update.

The scripts of `distributed/` are processes of their own: a process's devices and
addresses are settled before its backend begins.
"""

import json
import re
import sys
from pathlib import Path

import keras
import numpy as np
import problems
import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import launch

SECONDS = 240  # at most, for all processes of a test
on_jax = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="devices and processes of JAX"
)
on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="processes of torch.distributed"
)
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="strategies of tf.distribute"
)
# Of all problems, those that more than one device can break.
SOME = {
    "optimizer_adam",
    "schedule_exponential_decay",
    "global_clipnorm",
    "loss_scale_skips_an_overflow",
    "reduction_sum_masked_weighted",
    "reduction_sum_over_batch_size_masked",
    "reduction_mean_with_sample_weight_masked_weighted",
    "fully_masked_full_batch_sum_over_batch_size",
    "class_weight_mean_with_sample_weight",
    "pieces_of_different_length_mean_with_sample_weight",
    "outputs_metrics_of_each",
    "outputs_sum_and_mean_with_sample_weight",
    "regularizers_of_both",
    "add_loss_in_a_layer",
    "gradient_none_on_some_pieces",
    "float8_overwrite_with_gradient",
    "policy_mixed_bfloat16",
    "subclass_compute_metrics",
    "metrics_masked",
}
# Of these, those of different kinds, for here a graph is made for each training.
ON_REPLICAS = [
    "optimizer_adam",
    "global_clipnorm",
    "reduction_sum_over_batch_size_masked",
    "reduction_mean_with_sample_weight_masked_weighted",
    "metrics_masked",
]
# What plain Keras itself cannot train there: branches of replicas that wait for each
# other, gradients that are there in one update and not in the next, booleans to sum.
PLAIN_FAILS = {
    "ema_overwrite_every_2",
    "gradient_none_on_some_pieces",
    "gradient_none_on_all_pieces_of_one_update",
    "weights_bool",
}
# Pieces that are a third of a replica's batch, which half precision rounds.
THIRDS = {"policy_mixed_bfloat16", "policy_mixed_float16"}
# Counts the examples that a process has seen.
OF_EACH_PROCESS = {"state_travels_from_piece_to_piece"}
on_devices = pytest.mark.parametrize(
    ("way", "devices"), [("microbatch_size", 2), ("accum_steps", 4)]
)
ways = pytest.mark.parametrize("way", ["microbatch_size", "accum_steps"])


def check_restart(start, script, folder):
    """One of two processes is killed, the other fails; started again they go on."""

    def run(backups, kill, file):
        return start(script, folder / backups, kill, folder / file)

    launch.succeed(run("uninterrupted", "no", "uninterrupted"), SECONDS)
    survivor, killed = run("backups", "kill", "killed")
    outputs = launch.wait([survivor, killed], SECONDS)
    assert (survivor.returncode, killed.returncode) == (0, 9), outputs
    launch.succeed(run("backups", "no", "restarted"), SECONDS)
    for rank in range(2):
        ours = np.load(folder / f"restarted-{rank}.npy")
        np.testing.assert_array_equal(
            ours, np.load(folder / f"uninterrupted-{rank}.npy")
        )


def some():
    return [p.name for p in problems.here() if p.name in SOME]


@on_torch
@ways
def test_processes_of_torchrun_give_the_full_batch(way):
    launch.succeed(launch.torch_processes("torch_fit.py", way, *some()), SECONDS)


@on_torch
@pytest.mark.full
@ways
def test_processes_of_torchrun_give_the_full_batch_in_every_problem(way):
    names = [p.name for p in problems.here() if p.name not in OF_EACH_PROCESS]
    launch.succeed(launch.torch_processes("torch_fit.py", way, *names), SECONDS)


@on_torch
def test_processes_of_torchrun():
    checks = (
        "one_reduction",
        "begins_alike",
        "clipped",
        "overflow",
        "normalization",
        "different_updates",
        "no_share_of_the_last_batch",
        "uneven_normalization",
        "different_epochs",
        "replicated_loop",
        "some_of_the_parameters",
        "sharded_loop",
    )
    launch.succeed(launch.torch_processes("torch_checks.py", *checks), SECONDS)


@on_torch
def test_a_process_of_torchrun_that_is_killed(tmp_path):
    check_restart(launch.torch_processes, "torch_killed.py", tmp_path)


@on_jax
@on_devices
def test_devices_of_jax_give_the_full_batch(way, devices):
    launch.succeed([launch.start("jax_fit.py", way, devices, *some())], SECONDS)


@on_jax
@pytest.mark.full
@on_devices
def test_devices_of_jax_give_the_full_batch_in_every_problem(way, devices):
    names = [p.name for p in problems.here()]
    launch.succeed([launch.start("jax_fit.py", way, devices, *names)], 4 * SECONDS)


@on_jax
def test_devices_of_jax():
    checks = (
        "model_parallel",
        "accumulators",
        "clipped",
        "normalization",
        "dropout",
        "own_metric",
    )
    launch.succeed([launch.start("jax_checks.py", *checks)], SECONDS)


def exchanges(folder, kind, pieces):
    process = launch.start("jax_collectives.py", folder / f"{pieces}", kind, pieces)
    (output,) = launch.succeed([process], SECONDS)
    return json.loads(output.splitlines()[-1])


@on_jax
def test_jax_reduces_once_an_update_whatever_the_number_of_pieces(tmp_path):
    for pieces in (1, 2, 6):
        found = exchanges(tmp_path, "data", pieces)
        assert found["piece"] == []
        # The gradients, and with them the loss and the metrics' totals and counts.
        assert found["update"] == [["all-reduce", found["parameters"] + 5]]


@on_jax
def test_jax_reduces_once_an_update_where_variables_are_sharded(tmp_path):
    one, three = (exchanges(tmp_path, "model", pieces) for pieces in (1, 3))
    assert one["sharding"] == "P(None, 'model')"
    assert one["update"] == three["update"] != []
    # What a layer's parts exchange in a piece is activations: less in smaller pieces.
    reduced = [
        sum(n for kind, n in f["piece"] if kind == "all-reduce") for f in (one, three)
    ]
    assert reduced[0] == 3 * reduced[1]


def jax_processes(script, *arguments):
    """Two of them, with their numbers and their address."""
    address = f"127.0.0.1:{launch.free_port()}"
    return [launch.start(script, rank, address, *arguments) for rank in range(2)]


@on_jax
def test_processes_of_jax_give_the_full_batch(tmp_path):
    file = tmp_path / "trained"
    launch.succeed([launch.start("jax_processes.py", 1, 0, "alone", file)], SECONDS)
    address = f"127.0.0.1:{launch.free_port()}"
    launch.succeed(
        [launch.start("jax_processes.py", 2, rank, address, file) for rank in range(2)],
        SECONDS,
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
@pytest.mark.parametrize("more", ["batches", "pieces"])
def test_processes_of_jax_that_have_more_than_others(more):
    for reduction in ("sum_over_batch_size", "sum"):
        launch.succeed(jax_processes("jax_uneven.py", more, reduction), SECONDS)


@on_jax
def test_a_process_of_jax_that_is_killed(tmp_path):
    def run(backups, kill, file):
        return jax_processes("jax_killed.py", tmp_path / backups, kill, tmp_path / file)

    launch.succeed(run("uninterrupted", "no", "uninterrupted"), SECONDS)
    survivor, killed = run("backups", "kill", "killed")
    outputs = launch.wait([survivor, killed], SECONDS)
    assert killed.returncode == 9, outputs[1]
    # JAX ends a process that has lost another.
    assert survivor.returncode not in (0, None), outputs[0]
    assert "A process of `jax.distributed` did not answer" in outputs[0]
    assert np.load(tmp_path / "killed-0.npz")["updates"] == 2
    launch.succeed(run("backups", "no", "restarted"), SECONDS)
    for rank in range(2):
        ours = np.load(tmp_path / f"restarted-{rank}.npz")
        reference = np.load(tmp_path / f"uninterrupted-{rank}.npz")
        for name, values in reference.items():
            np.testing.assert_array_equal(ours[name], values)


@on_tensorflow
@ways
def test_replicas_of_tensorflow_give_the_full_batch(way):
    (output,) = launch.succeed(
        [launch.start("tensorflow_fit.py", way, 2, *ON_REPLICAS)], SECONDS
    )
    assert "plain Keras fails" not in output


@on_tensorflow
@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
@ways
def test_replicas_of_tensorflow_give_the_full_batch_in_every_problem(way, part):
    left_out = OF_EACH_PROCESS | (THIRDS if way == "microbatch_size" else set())
    names = [p.name for p in problems.here() if p.name not in left_out][part::4]
    (output,) = launch.succeed(
        [launch.start("tensorflow_fit.py", way, 2, *names)], 4 * SECONDS
    )
    fails = set(re.findall("plain Keras fails: (.*):", output))
    assert fails == PLAIN_FAILS & set(names)


@on_tensorflow
def test_replicas_of_tensorflow():
    checks = (
        "one_reduction",
        "no_share_of_the_last_batch",
        "overflow",
        "compiled",
        "clipped",
        "own_loop",
    )
    launch.succeed([launch.start("tensorflow_checks.py", 2, *checks)], SECONDS)


@on_tensorflow
@pytest.mark.full
def test_four_replicas_of_tensorflow():
    """Of the last batch three have nothing."""
    checks = "no_share_of_the_last_batch", "overflow", "compiled"
    launch.succeed([launch.start("tensorflow_checks.py", 4, *checks)], SECONDS)


@on_tensorflow
def test_optimizer_and_normalization_on_replicas_of_tensorflow():
    launch.succeed([launch.start("tensorflow_mirrored.py")], SECONDS)


@on_tensorflow
def test_workers_of_tensorflow():
    checks = (
        "exact",
        "overflow",
        "normalization",
        "one_reduction",
        "uneven",
        "different_updates",
    )
    launch.succeed(launch.tensorflow_workers("tensorflow_workers.py", *checks), SECONDS)


@on_tensorflow
def test_a_worker_of_tensorflow_that_is_killed(tmp_path):
    check_restart(launch.tensorflow_workers, "tensorflow_killed.py", tmp_path)
