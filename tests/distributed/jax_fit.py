"""Devices of one process: trains problems in micro-batches and as plain Keras does
there.

Arguments: how data is handed in, the number of devices, then the names of problems.
"""

import sys

import quickly

quickly.add_flags(f"--xla_force_host_platform_device_count={sys.argv[2]}")

import keras
from checks import run
from helpers import assert_same, named, train
from problems import cut

from gradient_accumulator import accumulate

MICROBATCH = 4  # examples, of which each device has as many


def divisible(batches):
    """Keras shards a batch over devices in equal parts only."""
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
            # Of each device's examples: the last micro-batch of 6 of them is smaller.
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
