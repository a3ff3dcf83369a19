"""`fit` in a `tf.distribute` strategy. See README.md for how to start it."""

import argparse
import json
import os

os.environ["KERAS_BACKEND"] = "tensorflow"


def strategy(arguments):
    import tensorflow as tf

    if arguments.workers:
        workers = arguments.workers.split(",")
        os.environ["TF_CONFIG"] = json.dumps(
            {
                "cluster": {"worker": workers},
                "task": {"type": "worker", "index": arguments.index},
            }
        )
        return tf.distribute.MultiWorkerMirroredStrategy()
    if arguments.devices is None:
        return tf.distribute.MirroredStrategy()
    (processor,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        processor, [tf.config.LogicalDeviceConfiguration()] * arguments.devices
    )
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(arguments.devices)]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, help="logical processors to use")
    parser.add_argument("--workers", default="", help="host:port of each worker")
    parser.add_argument("--index", type=int, default=0, help="index of this worker")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    distribution = strategy(arguments)  # before Keras uses a device

    import digits
    import keras
    import tensorflow as tf

    from gradient_accumulator import accumulate

    keras.utils.set_random_seed(0)
    training, validation = digits.data()
    with distribution.scope():
        # Each replica cuts its share of a batch into micro-batches of 4.
        model = accumulate(digits.classifier(), microbatch_size=4)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    batches = tf.data.Dataset.from_tensor_slices(training).batch(digits.BATCH)
    model.fit(
        batches.with_options(options),
        epochs=arguments.epochs,
        verbose=2 if arguments.index == 0 else 0,
    )
    # Each worker validates by itself, because Keras cannot evaluate over several.
    trained = digits.classifier()
    trained.set_weights(model.get_weights())
    digits.report(trained, validation)


if __name__ == "__main__":
    main()
