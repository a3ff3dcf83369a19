"""Exchanges between the replicas and workers of a `tf.distribute` strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import tensorflow as tf

from gradient_accumulator.devices.devices_base import Devices, lost


def mean(strategy: tf.distribute.Strategy, logs: Any) -> Any:
    """The mean over all replicas of the nested scalars that each one returned."""
    if strategy.num_replicas_in_sync == 1:
        return logs
    return tf.nest.map_structure(
        lambda value: strategy.reduce(tf.distribute.ReduceOp.MEAN, value, axis=None),
        logs,
    )


def in_replica() -> bool:
    """Whether this call is in code that each of several replicas runs."""
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync > 1


def several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes have some of the replicas."""
    return strategy.extended._in_multi_worker_mode()


def ready(tensors: list) -> AbstractContextManager:
    """A context whose operations wait until all workers have computed these tensors.

    Otherwise Keras would decay weights and count the update while it waits for the
    gradients of other workers, which may have ended.
    """
    if not several_workers(tf.distribute.get_strategy()):
        return nullcontext()
    with tf.control_dependencies(tf.nest.flatten(tensors, expand_composites=True)):
        everyone = DEVICES.total(tf.ones(()))
    return tf.control_dependencies([everyone])


def finite_everywhere(optimizer: Any, gradients: list) -> list:
    """The gradients, with a NaN in all replicas if one has a value that is not finite.

    A `LossScaleOptimizer` checks the gradients of one replica only, and each worker
    checks its own.
    """
    several = tf.distribute.get_strategy().num_replicas_in_sync > 1
    # Keras 2's checks those of all replicas.
    if not several or not hasattr(optimizer, "check_finite"):
        return gradients
    bad = DEVICES.total(tf.cast(~optimizer.check_finite(gradients), "float32"))
    # NaN goes into a dense gradient if there is one, for a sparse one may be empty.
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
        strategy: The strategy of the workers.
        epoch: The number of the epoch.
        update: The number of the update.
        at_end: Whether the epoch has no further update.
    """
    if not several_workers(strategy):
        return
    own = tf.constant([1, epoch, update, at_end], tf.int64)
    with answering():
        sums, squares = strategy.reduce(
            tf.distribute.ReduceOp.SUM, tf.stack([own, own * own]), axis=None
        ).numpy()
    # N times the sum of squares is the square of the sum only if all numbers are equal.
    if (sums[0] * squares == sums * sums).all():
        return
    raise ValueError(
        "The workers of the strategy must make the same updates: give each worker the "
        "same number of batches and of epochs, or a data set that does not know its "
        "length, with which a worker takes part even without batches. Received: "
        f"this worker at {'the end' if at_end else 'an update'} of epoch {epoch}, its "
        f"update {update} of this `fit`"
    )


@contextmanager
def answering() -> Iterator[None]:
    """A context of an exchange between workers. It explains the error if one ends."""
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
        # Workers cannot reduce a tensor without a device, such as a variable's.
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
