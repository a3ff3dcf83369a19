"""The devices that a batch is sharded over. Each has a part of every micro-batch.

They compute in `jax.shard_map`, because XLA itself would gather a batch to cut it into
micro-batches, and would reduce the gradients of every micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradient_accumulator.devices.devices_base import NOT_APPLIED, Devices, lost
from gradient_accumulator.microbatches import leaves

# The mesh axis of the devices that run the traced function, each on its own part.
_axis: ContextVar[str | None] = ContextVar("axis", default=None)


@dataclass(frozen=True)
class Replicas:
    """The devices along the axis of a mesh that batches are sharded over."""

    mesh: Mesh
    axis: str

    @property
    def count(self) -> int:
        return self.mesh.shape[self.axis]

    def stacked(self, sharding: Any = None) -> NamedSharding:
        """The sharding of a stack of arrays, one for each device.

        Args:
            sharding: The sharding of one array, along the mesh's other axes.
        """
        spec = getattr(sharding, "spec", PartitionSpec())
        return NamedSharding(self.mesh, PartitionSpec(self.axis, *spec))

    def on_each(self, function: Callable, sharded: tuple, sharded_out: Any) -> Callable:
        """A function that runs `function` on each device, on its part of the arguments.

        Args:
            function: A function whose arguments and results are nested arrays.
            sharded: For each argument, whether it is sharded along its first axis.
            sharded_out: Whether each result is sharded so, nested as the results are.
        """

        def run(*args):
            token = _axis.set(self.axis)
            try:
                return function(*args)
            finally:
                _axis.reset(token)

        def spec(is_sharded):
            return PartitionSpec(self.axis) if is_sharded else PartitionSpec()

        return _shard_map(
            run,
            self.mesh,
            self.axis,
            tuple(map(spec, sharded)),
            jax.tree.map(spec, sharded_out),
        )

    def take(self, array: jax.Array, start: int, stop: int) -> jax.Array:
        """The examples from `start` to `stop` of each device's part."""
        return _taking(self, stop - start)(array, start)


@lru_cache
def _taking(replicas, length):
    def take(array, start):
        return jax.lax.dynamic_slice_in_dim(array, start, length)

    # `start` is an operand, so that one program serves all micro-batches.
    return jax.jit(replicas.on_each(take, (True, False), True))


# What JAX's collectives say when a process does not answer.
_LOST = ("gloo", "connection", "coordination", "unavailable", "heartbeat", "nccl")


def waited_for(function: Callable) -> Callable:
    """The function, changed to wait for its results, and to raise if a process fails.

    JAX itself would not wait, and callbacks would save values that never arrive.
    """

    def run(*args):
        try:
            return jax.block_until_ready(function(*args))
        except (RuntimeError, ValueError) as error:
            if not any(word in str(error).lower() for word in _LOST):
                raise
            who = "A process of `jax.distributed`"
            raise lost(who, error, NOT_APPLIED) from error

    return run


def check_in_step(epoch: int, update: int, microbatches: int) -> None:
    """Raise in all processes if they are not at the same place in their training.

    A process alone in an update would wait for the others forever.

    Args:
        epoch: The number of the epoch.
        update: The number of the update.
        microbatches: The number of its micro-batches, 0 at the end of an epoch.
    """
    if jax.process_count() == 1:
        return
    mine = np.array([epoch, update, microbatches])
    everyone = waited_for(multihost_utils.process_allgather)(mine)
    if (everyone == mine).all():
        return
    states = [
        f"at update {update} of this `fit`, in epoch {epoch}, of {microbatches} "
        "micro-batches"
        if microbatches
        else f"at the end of epoch {epoch}, after update {update}"
        for epoch, update, microbatches in everyone.tolist()
    ]
    raise ValueError(
        "The processes of `jax.distributed` must make the same updates, with equally "
        "many micro-batches in each: give each process its share of every batch, and "
        "the same number of batches. Received: "
        + ", ".join(f"process {rank} {state}" for rank, state in enumerate(states))
    )


def has_layout(path: str) -> bool:
    """Whether Keras's distribution says how the tensor of this path is sharded."""
    return keras.distribution.distribution().get_tensor_layout(path) is not None


def state_shardings(model: keras.Model) -> tuple | None:
    """The shardings of the four lists of `fit`'s state; None without a distribution."""
    if keras.distribution.distribution() is None:
        return None
    state = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    return tuple([v.value.sharding for v in variables] for variables in state)


def active_replicas(batch: Any) -> Replicas | None:
    """The devices of Keras's distribution; None if the batch is on one device.

    Args:
        batch: Nested arrays, as Keras distributed them.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    sharding = leaves(batch)[0].sharding
    found = Replicas(sharding.mesh, distribution.batch_dim_name)
    return found if found.count > 1 else None


def _shard_map(function, mesh, axis, in_specs, out_specs):
    # XLA handles the mesh's other axes, which variables may be sharded over.
    if hasattr(jax, "shard_map"):
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={axis},
            check_vma=False,
        )
    from jax.experimental.shard_map import shard_map

    others = frozenset(mesh.axis_names) - {axis}
    return shard_map(function, mesh, in_specs, out_specs, check_rep=False, auto=others)


class JaxDevices(Devices):
    """The devices of Keras's distribution."""

    def total(self, tensor: jax.Array) -> jax.Array:
        # Outside of `Replicas.on_each` a sharded array has the data of all devices.
        axis = _axis.get()
        return tensor if axis is None else jax.lax.psum(tensor, axis)

    def several(self, model: keras.Model) -> bool:
        distribution = keras.distribution.distribution()
        if distribution is None:
            return False
        return math.prod(distribution.device_mesh.shape) > 1

    def is_first(self, model: keras.Model) -> bool:
        return jax.process_index() == 0

    def several_processes(self, model: keras.Model) -> bool:
        return jax.process_count() > 1

    def call_once(self, function, *data):
        # Without `jax.jit`, JAX would compile each operation separately.
        return [np.asarray(value) for value in jax.jit(function)(*data)]


DEVICES = JaxDevices()
