"""`accumulated_value_and_grad` on JAX: a scan where it is traced, else a host loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gradient_accumulator.gradients import LossFunction
from gradient_accumulator.pieces import example_count


def value_and_grad(loss: LossFunction) -> Callable:
    """The function that `accumulated_value_and_grad` returns."""
    add = partial(_add, loss)
    compiled = jax.jit(add, donate_argnums=0)

    def function(variables, batch, *args, **kwargs):
        size = example_count(batch)
        length = min(loss.microbatch_size, size)
        sums = _zeros(loss, variables)
        inverse = np.asarray(1 / size, "float32")
        traced = any(
            isinstance(leaf, jax.core.Tracer)
            for leaf in jax.tree.leaves((variables, batch, args, kwargs))
        )
        one = add if traced else compiled

        def piece(sums, start, length=length):
            return one(
                sums, variables, _take(batch, start, length), inverse, args, kwargs
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


def _zeros(loss, variables):
    """What pieces add up to: gradients, losses and denominators."""
    gradients = jax.tree.map(
        lambda v: jnp.zeros(jnp.shape(v), loss.accumulator_dtype(v)), variables
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


def _add(loss, sums, variables, piece, inverse, args, kwargs):
    """Add a piece's numerator over the number of all examples, and its gradient."""

    def worth(variables):
        numerator, denominator, aux = loss(variables, piece, *args, **kwargs)
        share = inverse
        if denominator is None:
            denominator = example_count(piece)
            share = inverse * denominator
        numerator = jnp.asarray(numerator)
        return numerator * share.astype(numerator.dtype), (denominator, aux)

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
        lambda sum_, v: (sum_ * correction.astype(sum_.dtype)).astype(v.dtype),
        accumulators,
        variables,
    )
    return total * correction, gradients


def _joined(*stacked):
    """What pieces return, along their first axis; scalars as a vector."""
    flat = [s if s.ndim == 1 else s.reshape(-1, *s.shape[2:]) for s in stacked]
    return jnp.concatenate(flat)
