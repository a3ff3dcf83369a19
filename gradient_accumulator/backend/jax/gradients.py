"""`accumulated_value_and_grad` on JAX: a scan where it is traced, else a host loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gradient_accumulator.gradients import LossFunction
from gradient_accumulator.pieces import example_count

# What is traced among further arguments: what `jax.jit` traces, but for ints and bools,
# which shapes and branches are made of.
TRACED = (jax.Array, np.ndarray, np.inexact, float, complex)


def value_and_grad(loss: LossFunction) -> Callable:
    """The function that `accumulated_value_and_grad` returns."""
    add = partial(_add, loss)
    compiled = jax.jit(add, static_argnames="others", donate_argnames="sums")

    def function(variables, batch, *args, **kwargs):
        size = example_count(jax.tree.leaves(batch))
        length = min(loss.microbatch_size, size)
        sums = _zeros(loss, variables)
        arrays, others = _taken_apart(args, kwargs)
        traced = any(
            isinstance(leaf, jax.core.Tracer)
            for leaf in jax.tree.leaves((variables, batch, arrays))
        )
        one = add if traced else compiled

        def piece(sums, start, length=length):
            return one(
                sums=sums,
                variables=variables,
                piece=_take(batch, start, length),
                inverse=1 / size,
                arrays=arrays,
                others=others,
            )

        starts = range(0, size - length + 1, length)
        if traced:
            sums, aux = jax.lax.scan(piece, sums, jnp.asarray(starts))
            auxes = [aux]
        else:
            auxes = []
            for start in starts:
                sums, aux = piece(sums, start)
                auxes.append(jax.tree.map(lambda leaf: leaf[None], aux))
        rest = size % length
        if rest:
            sums, aux = piece(sums, size - rest, rest)
            auxes.append(jax.tree.map(lambda leaf: leaf[None], aux))
        value, gradients = _finished(sums, variables, size)
        if loss.has_aux:
            return (value, jax.tree.map(_joined, *auxes)), gradients
        return value, gradients

    return function


def _taken_apart(args, kwargs):
    """The arrays and floats among arguments, and what else there is, which a jitted
    function takes as it is."""
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
    """What pieces add up to: gradients, losses and denominators."""
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
        # With the start an operand, one program serves all pieces.
        return jax.lax.dynamic_slice_in_dim(array, start, length)

    return jax.tree.map(take, batch)


def _add(loss, sums, variables, piece, inverse, arrays, others):
    """Add a piece's numerator over the number of all examples, and its gradient."""
    args, kwargs = _together(arrays, others)

    def worth(variables):
        numerator, denominator, aux = loss(variables, piece, *args, **kwargs)
        share = inverse
        if denominator is None:
            denominator = example_count(jax.tree.leaves(piece))
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
    """What pieces return, along their first axis; scalars as a vector."""
    flat = [s if s.ndim == 1 else s.reshape(-1, *s.shape[2:]) for s in stacked]
    return jnp.concatenate(flat)
