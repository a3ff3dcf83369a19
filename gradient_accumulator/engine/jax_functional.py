"""`accumulated_value_and_grad` on JAX: a scan where it is traced, else a host loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, ValuesView
from functools import partial

import jax
import jax.numpy as jnp
import keras
import numpy as np

from gradient_accumulator.engine.base import Engine
from gradient_accumulator.functional import (
    LossFunction,
    check_leaves,
    listed,
    warn_of_nan,
)
from gradient_accumulator.microbatches import example_count
from gradient_accumulator.received import check_of_backend, described

# The types of further arguments that are traced: those that `jax.jit` traces, except
# ints and bools, which set shapes and choose branches.
TRACED = (jax.Array, np.ndarray, np.inexact, float, complex)


def value_and_grad(engine: Engine, loss: LossFunction) -> Callable:
    """The function that `accumulated_value_and_grad` returns."""
    means: set[bool] = set()  # has True once a traced loss was a mean
    watch = _Watch()
    add = partial(_add, loss, means)
    compiled = jax.jit(add, static_argnames="others", donate_argnames="sums")

    def function(variables, batch, *args, **kwargs):
        variables = _arrays(variables)
        check_leaves(batch, jax.tree.leaves(batch))
        size = example_count(jax.tree.leaves(batch))
        length = min(loss.microbatch_size, size)
        sums = _zeros(loss, variables)
        arrays, others = _taken_apart(args, kwargs)
        traced = any(
            isinstance(leaf, jax.core.Tracer)
            for leaf in jax.tree.leaves((variables, batch, arrays))
        )
        one = add if traced else compiled

        def microbatch(sums, start, length=length):
            return one(
                sums=sums,
                variables=variables,
                microbatch=_take(batch, start, length),
                inverse=1 / size,
                arrays=arrays,
                others=others,
            )

        starts = range(0, size - length + 1, length)
        if traced:
            sums, aux = jax.lax.scan(microbatch, sums, jnp.asarray(starts))
            auxes = [aux]
        else:
            auxes = []
            for start in starts:
                sums, aux = microbatch(sums, start)
                auxes.append(jax.tree.map(lambda leaf: leaf[None], aux))
        rest = size % length
        if rest:
            sums, aux = microbatch(sums, size - rest, rest)
            auxes.append(jax.tree.map(lambda leaf: leaf[None], aux))
        value, gradients = _finished(sums, variables, size)
        if not traced and True in means:
            warn_of_nan(watch.is_nan(value))
        if loss.has_aux:
            return (value, jax.tree.map(_joined, *auxes)), gradients
        return value, gradients

    return function


def _arrays(variables):
    """The nested arrays to differentiate by; those of an iterator as a list."""
    if isinstance(variables, (Iterator, ValuesView)):
        variables = listed(variables)
    leaves = jax.tree.leaves(variables)
    check_of_backend("variables", leaves)
    if any(isinstance(leaf, (keras.Variable, keras.layers.Layer)) for leaf in leaves):
        raise TypeError(
            "Argument `variables` must be nested arrays on JAX, whose functions are "
            "pure: `[v.value for v in model.trainable_variables]`. "
            f"Received: variables={described(variables)}"
        )
    return variables


class _Watch:
    """Checks losses once they are computed, and waits for the first one only.

    If the host waited for each, the device would wait for the host (a quarter of the
    time of a small network's update).
    """

    def __init__(self):
        self.began = False
        self.running: list = []

    def is_nan(self, value: jax.Array) -> bool:
        """Whether this loss, or an earlier one computed by now, is not a number."""
        # This process cannot read a value that is on other processes' devices.
        if value.is_fully_addressable or value.is_fully_replicated:
            self.running.append(value)
        self.running = [v for v in self.running if not v.is_deleted()]  # or donated
        ready = [v for v in self.running if not self.began or v.is_ready()]
        self.running = [v for v in self.running if not any(v is r for r in ready)]
        self.began = True
        return any(np.isnan(np.asarray(v)) for v in ready)


def _taken_apart(args, kwargs):
    """The arrays and floats among arguments, and the rest as a static argument."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, TRACED) for leaf in leaves]
    arrays = [leaf for leaf, is_one in zip(leaves, is_array) if is_one]
    rest = [None if is_one else leaf for leaf, is_one in zip(leaves, is_array)]
    return arrays, (structure, tuple(is_array), tuple(rest))


def _together(arrays, others):
    structure, is_array, rest = others
    waiting = iter(arrays)
    leaves = [next(waiting) if is_one else leaf for is_one, leaf in zip(is_array, rest)]
    return jax.tree.unflatten(structure, leaves)


def _zeros(loss, variables):
    """Zeros for the sums of gradients, losses and denominators."""
    gradients = jax.tree.map(
        lambda v: jnp.zeros(jnp.shape(v), loss.accumulator_dtype(jnp.result_type(v))),
        variables,
    )
    dtypes = {v.dtype for v in jax.tree.leaves(gradients)}
    dtype = "float64" if np.dtype("float64") in dtypes else "float32"
    return gradients, jnp.zeros((), dtype), jnp.zeros((), dtype)


def _take(batch, start, length):
    def take(array):
        if isinstance(array, np.ndarray):
            if isinstance(start, int):
                return array[start : start + length]
            array = jnp.asarray(array)
        # `start` is an operand, so that one program serves all micro-batches.
        return jax.lax.dynamic_slice_in_dim(array, start, length)

    return jax.tree.map(take, batch)


def _add(loss, means, sums, variables, microbatch, inverse, arrays, others):
    """Add a micro-batch's loss and gradient, over the batch's number of examples."""
    args, kwargs = _together(arrays, others)

    def worth(variables):
        numerator, denominator, aux = loss(variables, microbatch, *args, **kwargs)
        means.add(denominator is None)
        share = inverse
        if denominator is None:
            denominator = example_count(jax.tree.leaves(microbatch))
            share = inverse * denominator
        numerator = jnp.asarray(numerator)
        return numerator * jnp.asarray(share, numerator.dtype), (denominator, aux)

    with jax.named_scope("accumulate_gradients"):
        (value, (denominator, aux)), gradients = jax.value_and_grad(
            worth, has_aux=True
        )(variables)
        accumulators, total, weight = sums
        accumulators = jax.tree.map(
            lambda accumulator, g: accumulator + g.astype(accumulator.dtype),
            accumulators,
            gradients,
        )
    weight = weight + jax.lax.stop_gradient(jnp.asarray(denominator, weight.dtype))
    return (accumulators, total + value.astype(total.dtype), weight), aux


def _finished(sums, variables, size):
    accumulators, total, weight = sums
    correction = jnp.where(weight == 0, 0, size / jnp.where(weight == 0, 1, weight))
    gradients = jax.tree.map(
        lambda sum_, v: (sum_ * correction.astype(sum_.dtype)).astype(
            jnp.result_type(v)
        ),
        accumulators,
        variables,
    )
    return total * correction, gradients


def _joined(*stacked):
    """The micro-batches' `aux`, joined along the first axis; scalars as a vector."""
    flat = [s if s.ndim == 1 else s.reshape(-1, *s.shape[2:]) for s in stacked]
    return jnp.concatenate(flat)
