"""Trains problems on devices of one process, in micro-batches and by plain Keras.

Arguments: the way to give the data, the number of devices, the names of problems.
"""

import sys

import quickly

quickly.add_flags(f"--xla_force_host_platform_device_count={sys.argv[2]}")

import keras
from checks import run
from helpers import assert_same, named, train
from problems import cut

from gradient_accumulator import accumulate

MICROBATCH = 4  # examples, which are divided equally among the devices


def divisible(batches):
    """Data that the devices divide equally, which Keras requires."""
    return [
        keras.tree.map_structure(lambda array: array[: len(array) // 4 * 4], batch)
        for batch in batches
    ]


def main(way, count, *names):
    keras.distribution.set_distribution(keras.distribution.DataParallel())

    def compare(name):
        problem = named(name)
        batches = divisible(problem.batches())
        microbatches = [
            microbatch for batch in batches for microbatch in cut(batch, MICROBATCH)
        ]
        reference = train(problem, batches)
        if way == "microbatch_size":
            # Each device has up to 6 examples, so that its last micro-batch is smaller.
            size, data = MICROBATCH, batches
        else:
            size, data = (
                max(len(cut(batch, MICROBATCH)) for batch in batches),
                microbatches,
            )
        trained = train(problem, data, lambda model: accumulate(model, **{way: size}))
        assert_same(trained, reference)
        keras.backend.clear_session()

    run(names, compare)


if __name__ == "__main__":
    main(*sys.argv[1:])
