"""An update of sharded micro-batches: each device sums over its parts of them.

All sums are reduced at once, at the end of the update. Until then they are in stacks: a
stack is an array with one more axis, along which each device has one entry. Here the
sums of a carry are a pair: the gradients' and the metrics'.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gradient_accumulator.compat import internals
from gradient_accumulator.statistics import over_devices


def zeros(zeros, model, replicas):
    """The carry for the first micro-batch: stacks of zeros."""
    carry = zeros()
    metrics = [jnp.zeros(v.shape, v.dtype) for v in model.metrics_variables]
    return jax.tree.map(
        lambda array: jnp.zeros((replicas.count, *array.shape), array.dtype),
        carry._replace(sums=(carry.sums, metrics)),
    )


def measure(model, measure, replicas, trainable, non_trainable, data):
    """The denominators of each device's part of a micro-batch, and the moved state.

    Arguments and results are those of one device's `measure`, except that each device
    has a row of denominators.
    """

    def run(trainable, non_trainable, data):
        with over_devices(model):
            denominators, moved = measure(
                trainable, _seeded(model, non_trainable, replicas), data
            )
        return denominators[None], _of_all(model, non_trainable, moved)

    on_each = replicas.on_each(run, (False, False, True), (True, False))
    return on_each(trainable, non_trainable, data)


def add(model, add, replicas, carry, state, kinds, *microbatch):
    """Add each device's part of a micro-batch to the device's sums.

    Arguments and results are those of one device's `add`, except that share and factors
    are those of a device's part, and that the sums contain what the metrics add.
    """

    def run(carry, state, data, share, factors):
        carry = jax.tree.map(lambda stack: stack[0], carry)
        sums, own = carry.sums
        with over_devices(model):
            carry, moved, own = add(
                carry._replace(sums=sums),
                state._replace(
                    non_trainable=_seeded(model, state.non_trainable, replicas),
                    metrics=own,
                ),
                kinds,
                data,
                share,
                None if factors is None else factors[0],
            )
        carry = carry._replace(sums=(carry.sums, own))
        moved = _of_all(model, state.non_trainable, moved)
        return jax.tree.map(lambda value: value[None], carry), moved

    on_each = replicas.on_each(run, (True, False, True, False, True), (True, False))
    state = state._replace(metrics=())  # each device has its own sums of metrics
    carry, moved = on_each(carry, state, *microbatch)
    return carry, moved, None


def reduce(model, carry, metrics):
    """The carry, reduced over all devices, and the metrics with all devices' sums."""
    stacks, own = carry.sums
    with jax.named_scope("reduce_gradients"):
        gradients = [
            jnp.max(stack, axis=0)
            if internals.overwrites(v)
            else jnp.sum(stack, axis=0)
            for stack, v in zip(stacks, model.trainable_variables)
        ]
        metrics = [
            value + jnp.sum(stack, axis=0).astype(value.dtype)
            for value, stack in zip(metrics, own)
        ]
        loss, denominator = (
            jnp.sum(stack, axis=0) for stack in (carry.loss, carry.denominator)
        )
    return carry._replace(sums=gradients, loss=loss, denominator=denominator), metrics


def _seeded(model, non_trainable, replicas):
    """The values of non-trainable variables, with the device's own seeds."""
    return [
        _of_device(value, replicas) if internals.is_seed(variable) else value
        for variable, value in zip(model.non_trainable_variables, non_trainable)
    ]


def _of_all(model, non_trainable, moved):
    """The moved values, but with seeds that are equal on all devices."""
    return [
        old.at[1].set(new[1])
        if new is not None and internals.is_seed(variable)
        else new
        for variable, old, new in zip(
            model.non_trainable_variables, non_trainable, moved
        )
    ]


def _of_device(seed, replicas):
    """The device's own seed, so that devices draw different masks."""
    stride = _STRIDE.astype(seed.dtype)
    return seed.at[0].add(jax.lax.axis_index(replicas.axis).astype(seed.dtype) * stride)


_STRIDE = np.uint32(0x9E3779B1)  # odd, so that no two devices have the same seed
