"""`fit` in `keras.distribution.DataParallel`. See README.md for how to start it."""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, help="virtual processors to use")
    parser.add_argument("--address", help="host:port of the first process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--index", type=int, default=0, help="index of this process")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.devices is not None:
        os.environ["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={arguments.devices}"
        )

    import keras

    if arguments.processes > 1:
        keras.distribution.initialize(
            arguments.address, arguments.processes, arguments.index
        )
    keras.utils.set_random_seed(0)  # the same weights in every process
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(auto_shard_dataset=False)
    )

    import digits

    from gradient_accumulator import accumulate

    training, validation = digits.data()
    # Each device cuts its share of a batch into micro-batches of 4.
    model = accumulate(digits.classifier(), microbatch_size=4)
    x, y = (
        digits.share(array, arguments.processes, arguments.index) for array in training
    )
    model.fit(
        x,
        y,
        batch_size=digits.BATCH // arguments.processes,
        shuffle=False,  # each process would shuffle its share in another order
        epochs=arguments.epochs,
        verbose=2 if arguments.index == 0 else 0,
    )
    # One device validates, because the examples may not divide by the devices.
    weights = model.get_weights()
    keras.distribution.set_distribution(None)
    trained = digits.classifier()
    trained.set_weights(weights)
    digits.report(trained, validation)


if __name__ == "__main__":
    main()
