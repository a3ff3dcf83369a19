"""Replicas on one machine: trains problems in pieces and as plain Keras does there.

Arguments: how data is handed in, the number of replicas, then the names of problems.
"""

import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf
from replicas import replicated

STRATEGY = replicated(int(sys.argv[2]))

import helpers
import keras
import numpy as np
from helpers import differences, named, train

from gradient_accumulator import accumulate

FULL, PIECE = 12, 4  # examples, of which a replica has its share


def dataset(batches, size):
    """All examples of the batches, in batches of `size`, the last smaller."""
    together = keras.tree.map_structure(
        lambda *arrays: np.concatenate(arrays), *batches
    )
    return tf.data.Dataset.from_tensor_slices(together).batch(size)


def main(way, _, *names):
    helpers.Batches = lambda data: data
    size = (
        {"accum_steps": FULL // PIECE}
        if way == "accum_steps"
        # On each replica; its share of the last full batch is another number of pieces.
        else {"microbatch_size": 2}
    )
    found = []
    for name in names:
        print(name, flush=True)
        problem = named(name)
        batches = problem.batches()
        with STRATEGY.scope():
            reference = train(problem, dataset(batches, FULL))
            trained = train(
                problem,
                dataset(batches, PIECE if way == "accum_steps" else FULL),
                lambda model: accumulate(model, **size),
            )
        found += [f"{name}: {d}" for d in differences(trained, reference)]
        keras.backend.clear_session()
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
