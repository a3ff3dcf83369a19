"""Sums over the replicas of a `tf.distribute` strategy."""

from __future__ import annotations

import tensorflow as tf


def total(tensor: tf.Tensor) -> tf.Tensor:
    """A tensor's sum over all replicas; the tensor itself where there is one."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return tensor
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, tensor)
