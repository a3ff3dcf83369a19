"""Trains problems on replicas of one machine, in micro-batches and by plain Keras.

Arguments: the way to give the data, the number of replicas, the names of problems.
Prints the problems on which plain Keras fails.
"""

import functools
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf
from replicas import replicated

REPLICAS = int(sys.argv[2])
STRATEGY = replicated(REPLICAS)

import helpers
import keras
import numpy as np
import problems
from checks import run
from helpers import assert_same, named, train

from gradient_accumulator import accumulate

FULL = 12  # examples of a batch, for all replicas


def cut_by_keras(problem):
    """A data set of which Keras gives each replica its share."""
    together = keras.tree.map_structure(
        lambda *arrays: np.concatenate(arrays), *problem.batches()
    )
    data = tf.data.Dataset.from_tensor_slices(together).batch(FULL)
    # The shares of the last batch are 6 examples and 1: 3 micro-batches, and 1.
    return data, data, {"microbatch_size": 2}


def in_order(problem):
    """Micro-batches, and batches in an order in which a replica has equal examples."""
    full, in_microbatches = [], []
    for batch in problem.batches():
        microbatches = problem.cut(batch)
        in_microbatches += microbatches
        sizes = [len(keras.tree.flatten(microbatch)[0]) for microbatch in microbatches]
        replica = np.concatenate([np.arange(n) // -(-n // REPLICAS) for n in sizes])
        order = np.argsort(replica, kind="stable")
        full.append(keras.tree.map_structure(lambda a, i=order: a[i], batch))
    return (
        of_batches(full),
        of_batches(in_microbatches),
        {"accum_steps": problem.accum_steps},
    )


def of_batches(batches):
    """A data set of batches of different sizes."""
    sets = [tf.data.Dataset.from_tensors(batch) for batch in batches]
    return functools.reduce(lambda a, b: a.concatenate(b), sets)


WAYS = {"microbatch_size": cut_by_keras, "accum_steps": in_order}


def main(way, _, *names):
    helpers.exactness.Batches = lambda data: data
    problems.problem.MICROBATCH = 4  # examples, of which both replicas have as many

    def compare(name):
        problem = named(name)
        full, data, size = WAYS[way](problem)
        with STRATEGY.scope():
            try:
                reference = train(problem, full)
            except Exception as error:
                return f"plain Keras fails: {type(error).__name__}"
            trained = train(problem, data, lambda model: accumulate(model, **size))
        assert_same(trained, reference)
        keras.backend.clear_session()
        return None

    run(names, compare)


if __name__ == "__main__":
    main(*sys.argv[1:])
