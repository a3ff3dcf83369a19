"""`accumulated_value_and_grad` on JAX: a scan if it is traced, else a host loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, ValuesView
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from gradient_accumulator.engine.engine_base import Engine, Sums
from gradient_accumulator.functional import (
    Accumulation,
    LossFunction,
    check_leaves,
    listed,
    warn_of_nan,
)
from gradient_accumulator.microbatches import example_count
from gradient_accumulator.received import check_of_backend, described

# The types of further arguments that are traced. `jax.jit` also traces ints and bools,
# but a loss function may need their values for shapes and branches.
TRACED = (jax.Array, np.ndarray, np.inexact, float, complex)


def value_and_grad(engine: Engine, loss: LossFunction) -> Callable:
    """The function that `accumulated_value_and_grad` returns."""
    watch = _Watch()
    add = _Add(engine, loss)
    compiled = jax.jit(add.__call__, static_argnames="others", donate_argnames="carry")

    def function(variables, batch, *args, **kwargs):
        variables = jax.tree.map(jnp.asarray, _arrays(variables))
        check_leaves(batch, jax.tree.leaves(batch))
        size = example_count(jax.tree.leaves(batch))
        length = min(loss.microbatch_size, size)
        arrays, others = _split_arguments(args, kwargs)
        values, structure = jax.tree.flatten(variables)
        accumulation = add.accumulation(values, float(size))
        accumulation.has_pairs = True  # which only a compiled function may know
        carry = accumulation.zeros()
        traced = any(
            isinstance(leaf, jax.core.Tracer)
            for leaf in jax.tree.leaves((variables, batch, arrays))
        )
        one = add if traced else compiled

        def microbatch(carry, start, length=length):
            return one(
                carry=carry,
                variables=variables,
                microbatch=_take(batch, start, length),
                size=float(size),
                inputs=arrays,
                others=others,
            )

        starts = range(0, size - length + 1, length)
        if traced:
            carry, aux = jax.lax.scan(microbatch, carry, jnp.asarray(starts))
            auxes = [aux]
        else:
            auxes = []
            for start in starts:
                carry, aux = microbatch(carry, start)
                auxes.append(jax.tree.map(lambda leaf: leaf[None], aux))
        rest = size % length
        if rest:
            carry, aux = microbatch(carry, size - rest, rest)
            auxes.append(jax.tree.map(lambda leaf: leaf[None], aux))
        value, gradients = accumulation.finish(carry)
        gradients = jax.tree.unflatten(structure, gradients)
        if not traced and add.has_means:
            warn_of_nan(watch.is_nan(value))
        if loss.has_aux:
            return (value, jax.tree.map(_joined, *auxes)), gradients
        return value, gradients

    return function


class _Add:
    """Adds a micro-batch, and returns the new carry and the `aux` of `loss_fn`.

    Args:
        engine: The engine.
        loss: The loss function.
    """

    def __init__(self, engine: Engine, loss: LossFunction):
        self.engine = engine
        self.loss = loss
        self.has_means = False  # whether a loss was a mean, which tracing finds out

    def accumulation(self, values: list, size: Any) -> Accumulation:
        sums = Sums(values, [self.loss.accumulator_dtype(v.dtype) for v in values])
        sums.connected.update(range(len(values)))  # JAX gives zeros for no gradient
        return Accumulation(sums, self.engine.value_and_grad, size)

    def __call__(self, *, carry, variables, microbatch, size, inputs, others):
        args, kwargs = _joined_arguments(inputs, others)
        values, structure = jax.tree.flatten(variables)

        def one(values):
            variables = jax.tree.unflatten(structure, values)
            return self.loss(variables, microbatch, *args, **kwargs)

        accumulation = self.accumulation(values, size)
        count = example_count(jax.tree.leaves(microbatch))
        with jax.named_scope("accumulate_gradients"):
            carry, aux = accumulation.add(carry, one, values, count)
        self.has_means |= accumulation.has_means
        return carry, aux


def _arrays(variables):
    """The nested arrays to differentiate by. An iterator becomes a list."""
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
    """Checks losses after they are computed, and waits only for the first one.

    If the host waited for each loss, the device would then wait for the host, for a
    quarter of the time of a small network's update.
    """

    def __init__(self):
        self.began = False
        self.running: list = []

    def is_nan(self, value: jax.Array) -> bool:
        """Whether a loss is not a number: this one or an earlier one, if computed."""
        # A process cannot read a value that is on other processes' devices only.
        if value.is_fully_addressable or value.is_fully_replicated:
            self.running.append(value)
        # A user's program may have donated a value, which deletes it.
        self.running = [v for v in self.running if not v.is_deleted()]
        ready = [v for v in self.running if not self.began or v.is_ready()]
        self.running = [v for v in self.running if not any(v is r for r in ready)]
        self.began = True
        return any(np.isnan(np.asarray(v)) for v in ready)


def _split_arguments(args, kwargs):
    """The arrays and floats among the arguments, and the others as static arguments."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, TRACED) for leaf in leaves]
    arrays = [leaf for leaf, is_one in zip(leaves, is_array) if is_one]
    rest = [None if is_one else leaf for leaf, is_one in zip(leaves, is_array)]
    return arrays, (structure, tuple(is_array), tuple(rest))


def _joined_arguments(arrays, others):
    structure, is_array, rest = others
    waiting = iter(arrays)
    leaves = [next(waiting) if is_one else leaf for is_one, leaf in zip(is_array, rest)]
    return jax.tree.unflatten(structure, leaves)


def _take(batch, start, length):
    def take(array):
        if isinstance(array, np.ndarray):
            if isinstance(start, int):
                return array[start : start + length]
            array = jnp.asarray(array)
        # `start` is an operand, so that one program serves all micro-batches.
        return jax.lax.dynamic_slice_in_dim(array, start, length)

    return jax.tree.map(take, batch)


def _joined(*stacked):
    """The micro-batches' `aux`, joined along the first axis; scalars as a vector."""
    flat = [s if s.ndim == 1 else s.reshape(-1, *s.shape[2:]) for s in stacked]
    return jnp.concatenate(flat)
