"""Sums over the replicas of a `tf.distribute` strategy."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def total(tensor: Any) -> Any:
    """A tensor's sum over all replicas, or a list's; itself where there is one."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return tensor
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, tensor)


def mean(strategy: tf.distribute.Strategy, logs: Any) -> Any:
    """The mean over all replicas of nested scalars that a replica returned."""
    if strategy.num_replicas_in_sync == 1:
        return logs
    return tf.nest.map_structure(
        lambda value: strategy.reduce(tf.distribute.ReduceOp.MEAN, value, axis=None),
        logs,
    )
