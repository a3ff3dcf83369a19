"""A process of `torchrun`: runs the checks that the arguments name."""

import datetime
import functools
import itertools
import math
import os
import sys

import keras
import numpy as np
import torch
import torch.distributed as dist
from checks import CHECKS, check, run
from helpers import differences, named, train
from keras import layers
from torch.nn.parallel import DistributedDataParallel

from gradient_accumulator import (
    AccumBatchNormalization,
    accumulate,
    accumulated_value_and_grad,
)

r = np.random.default_rng(0)
X = r.normal(size=(48, 6)).astype("float32")
Y = np.tanh(X[:, :3]).astype("float32")
RANK, COUNT = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
TIMEOUT = datetime.timedelta(seconds=120)
GROUPS = itertools.count()


@functools.cache
def store():
    """The store in which processes meet. All checks share it.

    Another store for each check would have the address of the last one, so that a
    process could connect to a store that is about to end.
    """
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        COUNT,
        is_master=RANK == 0,
        timeout=TIMEOUT,
    )


def begin():
    own = dist.PrefixStore(str(next(GROUPS)), store())
    dist.init_process_group(
        "gloo", store=own, rank=RANK, world_size=COUNT, timeout=TIMEOUT
    )


def build(normalization=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((6,)), layers.Dense(8, activation="tanh")])
    if normalization is not None:
        model.add(normalization)
    model.add(layers.Dense(3))
    return model


def own(array, batch):
    """The share of this process: every other example of every batch."""
    full = [array[i : i + batch] for i in range(0, len(array), batch)]
    return np.concatenate([each[RANK::COUNT] for each in full])


def weights(model):
    return np.concatenate([w.ravel() for w in model.get_weights()])


def compare(name, ours, reference, before):
    off = np.abs(ours - reference).max() / np.abs(reference - before).max()
    assert off < 1e-5, f"{name}: off by {off}"


def fit(model, batch, *, optimizer=None, **arguments):
    """Trains on batches of `batch` examples, of which each process has a share."""
    model.compile(optimizer or keras.optimizers.Adam(0.05, epsilon=1e-2), "mse")
    x, y, size = X, Y, batch
    if dist.is_initialized():
        x, y, size = own(X, batch), own(Y, batch), batch // COUNT
    model.fit(x, y, batch_size=size, shuffle=False, verbose=0, **arguments)
    return model


# ----------------------------------------------------------------------------- checks


@check
def one_reduction():
    """An update reduces its gradients once, for any number of micro-batches."""
    begin()
    for microbatches in (1, 2, 6):
        model = accumulate(build(), microbatch_size=12 // microbatches)
        parameters = model.count_params()
        fit(model, 24)
        with torch.profiler.profile(record_shapes=True) as profile:
            model.fit(own(X, 24), own(Y, 24), batch_size=12, verbose=0)  # two updates
        sizes = [
            max((math.prod(shape) for shape in event.input_shapes if shape), default=0)
            for event in profile.events()
            if event.name == "gloo:all_reduce"
        ]
        large = [size for size in sizes if size >= parameters]
        assert len(large) == 2, (microbatches, sizes)
        assert sum(sizes) < 2 * (parameters + 50), (microbatches, sizes)


@check
def begins_alike():
    """If weights differ between processes, all take those of the first process."""
    before = weights(build())
    reference = weights(fit(build(), 24))
    begin()
    model = build()
    if RANK == 1:
        model.set_weights([w + 1 for w in model.get_weights()])
    model = fit(accumulate(model, microbatch_size=5), 24)
    compare("weights", weights(model), reference, before)


@check
def clipped():
    """Clipping acts on the sum over processes."""
    clip = {"use_agc": True, "clip_factor": 0.02, "eps": 1e-2}
    before = weights(build())
    clipped = accumulate(build(), microbatch_size=24, **clip)
    reference = weights(fit(clipped, 24))
    unclipped = weights(fit(build(), 24))
    assert np.abs(reference - unclipped).max() > 0.1 * np.abs(unclipped - before).max()
    begin()
    ours = fit(accumulate(build(), microbatch_size=5, **clip), 24)
    compare("clipped", weights(ours), reference, before)


@check
def overflow():
    """An overflow in one process skips the update in all, and halves the scale once."""
    reference = train(named("loss_scale_skips_an_overflow"), full := data())
    begin()
    share = [tuple(array[RANK::COUNT] for array in batch) for batch in full]
    bad = any((np.abs(array) > 1e30).any() for batch in share for array in batch)
    planted = torch.tensor(float(bad))
    dist.all_reduce(planted)
    assert planted == 1  # only one process has the overflow
    trained = train(
        named("loss_scale_skips_an_overflow"),
        share,
        lambda model: accumulate(model, microbatch_size=3),
    )
    found = differences(trained, reference)
    assert not found, "\n".join(found)


def data():
    return named("loss_scale_skips_an_overflow").batches()


@check
def normalization():
    """Statistics are pooled over micro-batches and processes, also if synchronized."""
    plain = fit(build(layers.BatchNormalization(momentum=0.5)), 24)
    begin()
    synchronized = AccumBatchNormalization(momentum=0.5, synchronized=True)
    model = fit(accumulate(build(synchronized), microbatch_size=12), 24)
    compare(
        "synchronized",
        weights(model),
        weights(plain),
        weights(build(layers.BatchNormalization(momentum=0.5))),
    )
    for layer in (
        AccumBatchNormalization(momentum=0.5),
        layers.BatchNormalization(momentum=0.5),
    ):
        model = fit(accumulate(build(layer), microbatch_size=5), 24)
        mine = torch.tensor(weights(model))
        everyone = [torch.empty_like(mine) for _ in range(COUNT)]
        dist.all_gather(everyone, mine)
        assert all(torch.equal(mine, each) for each in everyone), layer


@check
def different_updates():
    """Different updates raise in all processes, and no process waits."""
    begin()
    model = accumulate(build(), microbatch_size=5)
    model.compile("sgd", "mse")
    count = 24 if RANK == 0 else 12
    try:
        model.fit(X[:count], Y[:count], batch_size=6, epochs=2, verbose=0)
    except ValueError as error:
        assert "must make the same updates" in str(error), error
        assert "process 0" in str(error) and "process 1" in str(error), error
        return
    raise AssertionError("did not raise")


@check
def no_share_of_the_last_batch():
    before = weights(build())
    reference = weights(fit(build(), 24, epochs=1))
    begin()
    batches = [(X[:24], Y[:24]), (X[24:], Y[24:])]
    # Process 1 has no examples of the second batch.
    mine = [
        tuple(a[RANK::COUNT] for a in batches[0]),
        tuple(a[:24] if RANK == 0 else a[:0] for a in batches[1]),
    ]
    model = accumulate(build(), microbatch_size=5)
    model.compile(keras.optimizers.Adam(0.05, epsilon=1e-2), "mse")
    model.fit((batch for batch in mine), verbose=0)
    compare("weights", weights(model), reference, before)


@check
def uneven_normalization():
    """Synchronized processes raise if they have different numbers of micro-batches."""
    begin()
    layer = AccumBatchNormalization(synchronized=True)
    model = accumulate(build(layer), microbatch_size=5)
    model.compile("sgd", "mse")
    own = slice(0, 12) if RANK == 0 else slice(12, 20)
    try:
        model.fit(X[own], Y[own], batch_size=12, verbose=0)
    except ValueError as error:
        assert "equally many micro-batches" in str(error), error
        return
    raise AssertionError("did not raise")


@check
def different_epochs():
    """One process continues from a later backup than the other, and both raise."""
    begin()
    model = accumulate(build(), microbatch_size=5)
    model.compile("sgd", "mse")
    try:
        model.fit(X, Y, batch_size=12, epochs=3, initial_epoch=RANK, verbose=0)
    except ValueError as error:
        assert "must make the same updates" in str(error), error
        return
    raise AssertionError("did not raise")


# ------------------------------------------------------------------- loops of one's own


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    )


def pair_of(module):
    def loss_fn(microbatch):
        x, y, weight = microbatch
        return ((module(x) - y).square().mean(-1) * weight).sum(), weight.sum()

    return loss_fn


def mean_of(module):
    return lambda microbatch: (module(microbatch[0]) - microbatch[1]).square().mean()


def tensors(count=48):
    weight = np.random.default_rng(1).uniform(0, 2, 48).astype("float32")
    return [torch.tensor(array[:count]) for array in (X, Y, weight)]


def expected(loss_of, count=48):
    module = network()
    batch = tensors(count)
    result = loss_of(module)(batch)
    loss = result[0] / result[1] if isinstance(result, tuple) else result
    loss.backward()
    return loss.item(), [p.grad for p in module.parameters()]


def agree(value, gradients, reference):
    loss, wanted = reference
    assert abs(value.item() - loss) < 1e-6 * abs(loss), (value.item(), loss)
    for a, b in zip(gradients, wanted, strict=True):
        a = a.full_tensor() if hasattr(a, "full_tensor") else a
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), (a - b).abs().max()


@check
def replicated_loop():
    """`DistributedDataParallel` reduces once, with the last micro-batch; shares are
    uneven.
    """
    begin()
    reduced = []

    def hook(_, bucket):
        reduced.append(bucket.buffer().numel())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / COUNT)

    for loss_of in (mean_of, pair_of):
        reference = expected(loss_of)
        module = DistributedDataParallel(network())
        module.register_comm_hook(None, hook)
        value_and_grad = accumulated_value_and_grad(
            loss_of(module), microbatch_size=5, module=module
        )
        share = slice(0, 30) if RANK == 0 else slice(30, 48)  # 6 and 4 micro-batches
        mine = [tensor[share] for tensor in tensors()]
        for _ in range(2):  # the reducer rebuilds its buckets after the first time
            reduced.clear()
            value, gradients = value_and_grad(module.parameters(), mine)
            agree(value, gradients, reference)
            assert sum(reduced) == sum(p.numel() for p in module.parameters())


@check
def some_of_the_parameters():
    """`DistributedDataParallel` cannot reduce some parameters: it waits for all."""
    begin()
    module = DistributedDataParallel(network())
    value_and_grad = accumulated_value_and_grad(
        mean_of(module), microbatch_size=5, module=module
    )
    try:
        value_and_grad(list(module.parameters())[2:], tensors())
    except ValueError as error:
        assert "give all of them" in str(error), error
        return
    raise AssertionError("did not raise")


@check
def sharded_loop():
    """With FSDP2 each process has a part of each parameter."""
    from torch.distributed.fsdp import fully_shard

    begin()
    mesh = dist.init_device_mesh("cpu", (COUNT,))
    for loss_of in (mean_of, pair_of):
        reference = expected(loss_of)
        module = network()
        for layer in module:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        value_and_grad = accumulated_value_and_grad(
            loss_of(module), microbatch_size=5, module=module
        )
        mine = [tensor[RANK::COUNT] for tensor in tensors()]
        for _ in range(2):
            with torch.profiler.profile() as profile:
                value, gradients = value_and_grad(list(module.parameters()), mine)
            agree(value, gradients, reference)
            reductions = [e for e in profile.events() if "reduce_scatter" in e.name]
            assert len({e.name for e in reductions}) > 0
            names = [e.name for e in reductions if e.name.startswith("gloo")]
            assert len(names) <= 2, names  # one for each group of parameters
    uneven = [tensor[: 30 if RANK == 0 else 10] for tensor in tensors()]
    try:
        value_and_grad(list(module.parameters()), uneven)
    except ValueError as error:
        assert "equally many micro-batches" in str(error), error
        return
    raise AssertionError("did not raise")


def alone(name):
    CHECKS[name]()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1:], alone)
