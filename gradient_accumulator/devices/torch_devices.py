"""Operations over the processes of `torch.distributed`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import torch
import torch.distributed as dist

from gradient_accumulator.devices.devices_base import NOT_APPLIED, Devices, lost

# Whether processes can wait for each other at this position in an update.
_in_step: ContextVar[bool | None] = ContextVar("in_step", default=None)


def count(group: Any = None) -> int:
    """The number of processes that train the model."""
    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(group)


def totals(numbers: Sequence[float], group: Any = None) -> list[float]:
    """Each number's sum over all processes."""
    if count(group) == 1:
        return list(numbers)
    summed = torch.tensor(numbers, dtype=torch.float64, device=_device(group))
    with _exchange():
        dist.all_reduce(summed, group=group)
    return summed.tolist()


@torch.no_grad()
def reduce(tensors: Iterable[torch.Tensor], largest: bool = False) -> None:
    """Sum tensors over all processes, in place. All tensors of one dtype go at once.

    Args:
        tensors: Tensors, with the same number and shapes in every process.
        largest: Whether to take the largest values instead of sums.
    """
    kinds: dict[tuple, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        # A single tensor needs no copy.
        flat = (
            torch.cat([tensor.reshape(-1) for tensor in alike])
            if len(alike) > 1
            else alike[0].contiguous()
        )
        with _exchange():
            dist.all_reduce(flat, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        parts = flat.split([tensor.numel() for tensor in alike])
        for tensor, part in zip(alike, parts if len(alike) > 1 else [flat]):
            tensor.copy_(part.view(tensor.shape))


@torch.no_grad()
def broadcast(variables: Iterable[keras.Variable]) -> None:
    """Give variables the values that they have in the first process."""
    if count() == 1:
        return
    for variable in variables:
        value = variable.value.detach().to(_device()).contiguous()
        with _exchange():
            dist.broadcast(value, src=0)
        variable.value.copy_(value)


@contextmanager
def in_step(yes: bool = True) -> Iterator[None]:
    """A context whose code all processes run equally often, unless `yes` is False."""
    token = _in_step.set(yes)
    try:
        yield
    finally:
        _in_step.reset(token)


def are_in_step() -> bool | None:
    """Whether all processes run this code equally often; None outside of updates."""
    return _in_step.get()


@contextmanager
def summed(variables: Sequence[keras.Variable]) -> Iterator[None]:
    """A scope in which the value of each variable is its sum over all processes."""
    values = [variable.value.detach().clone() for variable in variables]
    reduce(values)
    with keras.StatelessScope(state_mapping=list(zip(variables, values))):
        yield


def check_in_step(epoch: int, update: int, at_end: bool) -> None:
    """Raise in all processes if they are not at the same position of their training.

    A process alone in an update would wait for the others forever.

    Args:
        epoch: The number of the epoch.
        update: The number of the update.
        at_end: Whether the epoch has no further update.
    """
    if count() == 1:
        return
    mine = torch.tensor([epoch, update, at_end], device=_device())
    everyone = [torch.empty_like(mine) for _ in range(count())]
    with _exchange():
        dist.all_gather(everyone, mine)
    positions = [tuple(each.tolist()) for each in everyone]
    if len(set(positions)) == 1:
        return
    states = [
        f"at {'the end' if at_end else 'an update'} of epoch {epoch}, its update "
        f"{update} of this `fit`"
        for epoch, update, at_end in positions
    ]
    raise ValueError(
        "The processes of `torch.distributed` must make the same updates: give each "
        "its share of every batch, the same number of batches, and callbacks that stop "
        "training in all of them or in none. Received: "
        + ", ".join(f"process {rank} {state}" for rank, state in enumerate(states))
    )


def check_microbatches(microbatches: int) -> None:
    """Raise in all processes if they have different numbers of micro-batches.

    Args:
        microbatches: The number of micro-batches of this process in the update.
    """
    count_, sum_, squares = totals([1, microbatches, microbatches**2])
    if count_ * squares != sum_**2:
        raise ValueError(
            "Processes that normalize by the examples of all processes need equally "
            "many micro-batches: give each an equal share of every batch, or use "
            f"`synchronized=False`. Received: {microbatches} micro-batches in this "
            f"process, {int(sum_)} in all {int(count_)}"
        )


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        who = "A process of `torch.distributed`"
        raise lost(who, error, NOT_APPLIED) from error


def _device(group: Any = None) -> torch.device:
    """The device on which processes can exchange tensors."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class TorchDevices(Devices):
    """The processes of `torch.distributed`."""

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        if count() == 1:
            return tensor
        from torch.distributed.nn.functional import all_reduce  # it has a gradient

        return all_reduce(tensor)

    def several(self, model: Any) -> bool:
        return count() > 1

    def is_first(self, model: Any) -> bool:
        return count() == 1 or dist.get_rank() == 0

    def several_processes(self, model: Any) -> bool:
        return count() > 1

    def dense(self, gradient: Any) -> torch.Tensor:
        gradient = super().dense(gradient)
        return gradient.to_dense() if gradient.is_sparse else gradient

    @torch.no_grad()
    def call_once(self, function, *data):
        return [keras.ops.convert_to_numpy(value) for value in function(*data)]


DEVICES = TorchDevices()
