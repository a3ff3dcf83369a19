"""Several devices and processes: what one device gives, with one reduction an update.

The scripts of `distributed/` are processes of their own: a process's devices and
addresses are settled before its backend begins.
"""

import sys
from pathlib import Path

import keras
import numpy as np
import problems
import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import launch

SECONDS = 240  # at most, for all processes of a test
on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="processes of torch.distributed"
)
# Of all problems, those that more than one device can break.
SOME = [
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
]
# Counts the examples that a process has seen.
OF_EACH_PROCESS = {"state_travels_from_piece_to_piece"}
ways = pytest.mark.parametrize("way", ["microbatch_size", "accum_steps"])


@on_torch
@ways
def test_processes_of_torchrun_give_the_full_batch(way):
    launch.succeed(launch.torch_processes("torch_fit.py", way, *SOME), SECONDS)


@on_torch
@pytest.mark.full
@ways
def test_processes_of_torchrun_give_the_full_batch_in_every_problem(way):
    names = [p.name for p in problems.here() if p.name not in OF_EACH_PROCESS]
    launch.succeed(launch.torch_processes("torch_fit.py", way, *names), SECONDS)


@on_torch
@pytest.mark.parametrize(
    "check",
    [
        "one_reduction",
        "begins_alike",
        "clipped",
        "overflow",
        "normalization",
        "different_updates",
        "no_share_of_the_last_batch",
        "replicated_loop",
        "sharded_loop",
    ],
)
def test_processes_of_torchrun(check):
    launch.succeed(launch.torch_processes("torch_checks.py", check), SECONDS)


@on_torch
def test_a_process_of_torchrun_that_is_killed(tmp_path):
    def run(backups, kill, file):
        return launch.torch_processes(
            "torch_killed.py", tmp_path / backups, kill, tmp_path / file
        )

    launch.succeed(run("uninterrupted", "no", "uninterrupted"), SECONDS)
    survivor, killed = run("backups", "kill", "killed")
    outputs = launch.wait([survivor, killed], SECONDS)
    assert (survivor.returncode, killed.returncode) == (0, 9), outputs
    launch.succeed(run("backups", "no", "restarted"), SECONDS)
    for rank in range(2):
        ours = np.load(tmp_path / f"restarted-{rank}.npy")
        np.testing.assert_array_equal(
            ours, np.load(tmp_path / f"uninterrupted-{rank}.npy")
        )
