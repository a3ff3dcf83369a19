"""Exchanges between the replicas and workers of a `tf.distribute` strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import tensorflow as tf

from gradient_accumulator.devices.devices_base import Devices, lost


def mean(strategy: tf.distribute.Strategy, logs: Any) -> Any:
    """The mean over all replicas of nested scalars that a replica returned."""
    if strategy.num_replicas_in_sync == 1:
        return logs
    return tf.nest.map_structure(
        lambda value: strategy.reduce(tf.distribute.ReduceOp.MEAN, value, axis=None),
        logs,
    )


def in_replica() -> bool:
    """Whether this is called in what each of several replicas runs."""
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync > 1


def several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes have some of the replicas."""
    return strategy.extended._in_multi_worker_mode()


def ready(tensors: list) -> AbstractContextManager:
    """Around what no worker does before all have computed these.

    Keras decays weights and counts updates while it waits for gradients of other
    workers, which may have ended.
    """
    if not several_workers(tf.distribute.get_strategy()):
        return nullcontext()
    with tf.control_dependencies(tf.nest.flatten(tensors, expand_composites=True)):
        everyone = DEVICES.total(tf.ones(()))
    return tf.control_dependencies([everyone])


def finite_everywhere(optimizer: Any, gradients: list) -> list:
    """Gradients that no replica finds finite, if one does not.

    A `LossScaleOptimizer` takes one replica's word, and each worker its own.
    """
    several = tf.distribute.get_strategy().num_replicas_in_sync > 1
    # Keras 2's takes the word of all.
    if not several or not hasattr(optimizer, "check_finite"):
        return gradients
    bad = DEVICES.total(tf.cast(~optimizer.check_finite(gradients), "float32"))
    # In a gradient that is not sparse: those slices may be none.
    present = [i for i, gradient in enumerate(gradients) if gradient is not None]
    i = min(present, key=lambda i: isinstance(gradients[i], tf.IndexedSlices))
    spoiled = tf.convert_to_tensor(gradients[i])
    spoiled = tf.where(bad > 0, tf.constant(float("nan"), spoiled.dtype), spoiled)
    return [*gradients[:i], spoiled, *gradients[i + 1 :]]


def check_in_step(
    strategy: tf.distribute.Strategy, epoch: int, update: int, at_end: bool
) -> None:
    """Raise in all workers if they are not at the same position of their training.

    Args:
        strategy: Theirs.
        epoch: The number of the epoch.
        update: The number of the update.
        at_end: Whether no other update will come.
    """
    if not several_workers(strategy):
        return
    own = tf.constant([1, epoch, update, at_end], tf.int64)
    with answering():
        sums, squares = strategy.reduce(
            tf.distribute.ReduceOp.SUM, tf.stack([own, own * own]), axis=None
        ).numpy()
    # This holds for numbers that are all equal, and for no others.
    if (sums[0] * squares == sums * sums).all():
        return
    raise ValueError(
        "The workers of the strategy must make the same updates: give each the same "
        "number of batches and of epochs, or a data set that does not know its length, "
        "of which a worker that has no more batches takes part with none. Received: "
        f"this worker at {'the end' if at_end else 'an update'} of epoch {epoch}, its "
        f"update {update} of this `fit`"
    )


@contextmanager
def answering() -> Iterator[None]:
    """A context of an exchange between workers: explains the error if one is gone."""
    try:
        yield
    except tf.errors.OpError as error:
        if "Collective ops is aborted" not in str(error):
            raise
        raise lost("A worker of the strategy", error, update="") from error


class TensorFlowDevices(Devices):
    """The replicas and workers of a `tf.distribute` strategy."""

    def total(self, tensor: Any) -> Any:
        if not in_replica():
            return tensor
        replica = tf.distribute.get_replica_context()
        # Workers reduce no tensor without a device, such as a variable's.
        tensor = tf.nest.map_structure(tf.identity, tensor)
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, tensor)

    def several(self, model: Any) -> bool:
        return model.distribute_strategy.num_replicas_in_sync > 1

    def is_first(self, model: Any) -> bool:
        strategy = model.distribute_strategy
        return not several_workers(strategy) or not strategy.cluster_resolver.task_id

    def several_processes(self, model: Any) -> bool:
        return several_workers(model.distribute_strategy)

    def dense(self, gradient: Any) -> tf.Tensor:
        return tf.convert_to_tensor(gradient)

    def call_once(self, function, *data):
        with tf.init_scope():  # outside of a graph that is being traced
            return [value.numpy() for value in function(*data)]


DEVICES = TensorFlowDevices()
