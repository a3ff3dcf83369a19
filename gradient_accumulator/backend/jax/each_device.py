"""An update whose pieces are sharded: each device adds up its own parts of them.

Nothing is exchanged before the end, when all that was added up is reduced at once.
What a device adds up is its entry of a stack, an array with one more axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gradient_accumulator.backend import trainer
from gradient_accumulator.backend.statistics import together


def zeros(zeros, model, replicas):
    """A stack of what each device adds up: as on one device, and the metrics."""
    metrics = [jnp.zeros(v.shape, v.dtype) for v in model.metrics_variables]
    return jax.tree.map(
        lambda array: jnp.zeros((replicas.count, *array.shape), array.dtype),
        (*zeros(), metrics),
    )


def measure(measure, replicas):
    """The denominators of each device's part of a piece."""

    def run(trainable, non_trainable, data):
        return measure(trainable, non_trainable, data)[None]

    return replicas.on_each(run, (False, False, True), True)


def add_piece(
    model,
    add_piece,
    replicas,
    kinds,
    sums,
    trainable,
    non_trainable,
    metrics,
    optimizer,
    data,
    share,
    factors,
):
    """Add a piece, of which each device has its part, to what each adds up.

    Args, returns: As on one device; the share and the factors are of a device's part.
    """
    is_seed = [trainer.is_seed(v) for v in model.non_trainable_variables]

    def run(sums, trainable, non_trainable, optimizer, data, share, factors):
        *sums, own = jax.tree.map(lambda stack: stack[0], sums)
        seeded = [
            _of_device(value, replicas) if seed else value
            for value, seed in zip(non_trainable, is_seed)
        ]
        with together(model):
            sums, moved, own, _ = add_piece(
                kinds,
                tuple(sums),
                trainable,
                seeded,
                own,
                optimizer,
                data,
                share,
                None if factors is None else factors[0],
            )
        moved = [
            old.at[1].set(new[1]) if seed and new is not None else new
            for old, new, seed in zip(non_trainable, moved, is_seed)
        ]
        return jax.tree.map(lambda value: value[None], (*sums, own)), moved

    on_each = replicas.on_each(
        run, (True, False, False, False, True, False, True), (True, False)
    )
    sums, moved = on_each(
        sums, trainable, non_trainable, optimizer, data, share, factors
    )
    return sums, moved, metrics, {}


def reduce(model, sums, metrics):
    """What the devices have added up, reduced, and the metrics with their part."""
    accumulators, loss, own = sums
    with jax.named_scope("reduce_gradients"):
        gradients = [
            jnp.max(stack, axis=0) if trainer.overwrites(v) else jnp.sum(stack, axis=0)
            for stack, v in zip(accumulators, model.trainable_variables)
        ]
        metrics = [
            value + jnp.sum(stack, axis=0).astype(value.dtype)
            for value, stack in zip(metrics, own)
        ]
        return (gradients, jnp.sum(loss, axis=0)), metrics


def _of_device(seed, replicas):
    """A seed of the device's own, so that devices draw different masks."""
    stride = _STRIDE.astype(seed.dtype)
    return seed.at[0].add(jax.lax.axis_index(replicas.axis).astype(seed.dtype) * stride)


_STRIDE = np.uint32(0x9E3779B1)  # odd, so that no two devices have the same
