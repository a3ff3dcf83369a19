"""Modules of `torch.distributed`, which reduce gradients over processes themselves.

They reduce once an update, in the backward pass of the last micro-batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gradient_accumulator.devices import torch_devices as replicas
from gradient_accumulator.received import described


class Alone:
    """Replaces the module if a loop over micro-batches has none."""

    count = 1  # the number of processes that gradients are averaged over

    def dtype(self, parameter: torch.Tensor) -> str | None:
        """The dtype in which the module sums gradients; None if it sums none."""
        return None

    def totals(self, numbers: list[float]) -> list[float]:
        """Each number's sum over the processes."""
        return numbers

    def check(self, microbatches: int, parameters: list) -> None:
        """Raise if the module cannot use the parameters, or so many micro-batches."""

    def microbatch(self, last: bool) -> AbstractContextManager:
        """A context of a micro-batch's forward and backward pass."""
        return nullcontext()

    def backward(self, loss: torch.Tensor, parameters: list) -> None:
        """Add the gradients of a loss to the parameters' `grad`."""
        # With `inputs`, other parameters of the loss keep their `grad`.
        loss.backward(inputs=parameters)


class _Reducing(Alone):
    """The base class of modules that reduce gradients.

    Args:
        module: The module.
        group: The processes that have the module, None for all.
    """

    def __init__(self, module: Any, group: Any = None):
        self.module = module
        self.group = group
        self.count = replicas.count(group)

    def dtype(self, parameter):
        return str(parameter.dtype).removeprefix("torch.")

    def totals(self, numbers):
        return replicas.totals(numbers, self.group)


class Replicated(_Reducing):
    """`DistributedDataParallel`: each process has the whole module."""

    def check(self, microbatches, parameters):
        given = {id(parameter) for parameter in parameters}
        trained = [p for p in self.module.parameters() if p.requires_grad]
        missing = sum(id(parameter) not in given for parameter in trained)
        if missing:
            raise ValueError(
                "A `DistributedDataParallel` reduces when all of its parameters have a "
                "gradient: give all of them, or set `requires_grad=False` before it is "
                f"made. Received: variables without {missing} of {len(trained)}"
            )

    def microbatch(self, last):
        return nullcontext() if last else self.module.no_sync()


class Sharded(_Reducing):
    """FSDP2: each process has a part of each parameter."""

    def check(self, microbatches, parameters):
        (everyone,) = replicas.totals([microbatches])
        (squares,) = replicas.totals([microbatches**2])
        if everyone**2 != squares * self.count:
            raise ValueError(
                "The processes of a sharded module gather its parameters for every "
                "micro-batch: give each equally many micro-batches, for example by "
                f"equally many examples. Received: {microbatches} micro-batches of "
                f"{int(everyone)} in all {self.count} processes"
            )

    def microbatch(self, last):
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss, parameters):
        # It has no `inputs`, because the forward pass uses other, gathered parameters.
        loss.backward()


def reducing(module: Any) -> Alone:
    """The loop's adapter for the user's argument `module`.

    Raises:
        TypeError: If the argument is no module that reduces gradients.
    """
    if module is None:
        return Alone()
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return Replicated(module, module.process_group)
    if hasattr(module, "set_requires_gradient_sync"):
        return Sharded(module)
    raise TypeError(
        "Argument `module` must be a `DistributedDataParallel`, or a module that "
        f"`fully_shard` returned. Received: module={described(module)}"
    )
