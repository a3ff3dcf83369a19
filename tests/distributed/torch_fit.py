"""A process of `torchrun`: trains problems on its share of every batch.

Arguments: the way to give the data, the names of problems.
"""

import datetime
import sys

import keras
import problems
import torch.distributed as dist
from checks import run
from helpers import assert_same, named, train

from gradient_accumulator import accumulate

WAYS = {
    # Uneven shares: process 0 has 7 of 12 examples, in two micro-batches, process 1 has
    # 5.
    "microbatch_size": lambda batch, rank: share(batch, 7, rank),
    # Uneven micro-batches: every other example of each.
    "accum_steps": lambda batch, rank: each_other(batch, rank),
}


def examples(batch):
    return len(keras.tree.flatten(batch)[0])


def share(batch, of_12, rank):
    first = -(-examples(batch) * of_12 // 12)
    own = slice(0, first) if rank == 0 else slice(first, None)
    return keras.tree.map_structure(lambda array: array[own], batch)


def each_other(batch, rank):
    return keras.tree.map_structure(lambda array: array[rank::2], batch)


def own_data(problem, way, rank):
    if way == "microbatch_size":
        return [
            WAYS[way](batch, rank) for batch in problem.batches()
        ], problems.MICROBATCH
    microbatches = [
        microbatch for batch in problem.batches() for microbatch in problem.cut(batch)
    ]
    return [
        WAYS[way](microbatch, rank) for microbatch in microbatches
    ], problem.accum_steps


def main(way, *names):
    # Plain Keras trains before the processes connect, and so as a single process.
    references = {name: train(named(name), named(name).batches()) for name in names}
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))

    def compare(name):
        problem = named(name)
        data, size = own_data(problem, way, dist.get_rank())
        trained = train(problem, data, lambda model: accumulate(model, **{way: size}))
        assert_same(trained, references[name])

    run(names, compare)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
