"""Makes logical processors for TensorFlow's replicas, before Keras uses a processor."""

import json
import os

import tensorflow as tf


def _processors(count):
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )


def replicated(count):
    _processors(count)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])


def workers():
    """The strategy of `TF_CONFIG`'s workers, and one of as many local replicas."""
    config = json.loads(os.environ["TF_CONFIG"])
    count, rank = len(config["cluster"]["worker"]), config["task"]["index"]
    _processors(count)
    together = tf.distribute.MultiWorkerMirroredStrategy()
    alone = tf.distribute.MirroredStrategy(
        [f"/job:worker/replica:0/task:{rank}/device:CPU:{i}" for i in range(count)],
        # The local one does not use the operations that reduce over workers.
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )
    return together, alone, rank
