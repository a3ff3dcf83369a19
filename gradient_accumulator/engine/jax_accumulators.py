"""The operations of `GradientAccumulateOptimizer` on JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from gradient_accumulator.engine.common import added, new_accumulator

accumulator = new_accumulator


def add_local_variable(optimizer: Any, shape: tuple, **kwargs) -> keras.Variable:
    """An optimizer's variable, of which each replica has its own value."""
    return optimizer.add_variable(shape, **kwargs)


def add(pairs: list, factor: Any) -> None:
    """Add gradients, times `factor`, to their accumulators.

    A given factor, which is no `float`, may be 0. Nothing is then added: a mean over
    nothing is not a number, nor is 0 times that mean.
    """
    for held, gradient in pairs:
        gradient = jnp.asarray(gradient).astype(held.dtype)
        product = gradient * jnp.asarray(factor, held.dtype)
        if not isinstance(factor, float):
            product = jnp.where(factor == 0, 0, product)
        held.assign(held.value + product)


def add_and_update(pairs: list, factor: Any, update: Callable) -> None:
    """Add a micro-batch, and call `update`, which applies the sums after the last."""
    with added(add, pairs, factor, not isinstance(factor, jax.core.Tracer)):
        update()


@contextmanager
def divided(accumulators: list, total: Any) -> Iterator[dict]:
    """Yields the accumulators' sums over `total`, by the accumulators' `id`."""
    # The total is 0 only if all gradients were multiplied by 0.
    total = jnp.where(jnp.asarray(total) == 0, 1, total)
    yield {
        id(held): held.value / jnp.asarray(total, held.dtype) for held in accumulators
    }


def clear(accumulators: list) -> None:
    for held in accumulators:
        held.assign(jnp.zeros(held.shape, held.dtype))


def total(variable: keras.Variable, weighed: bool) -> Any:
    """The sum of the micro-batches' weights."""
    return variable.value


def dense(gradient: Any) -> jax.Array:
    """The gradient as an array, which all gradients on JAX are."""
    return jnp.asarray(gradient)


def clip(clipping: Any, optimizer: Any, variables: list, gradients: list) -> list:
    """Clip the finished gradients of an update."""
    return clipping.clip_update(optimizer, variables, gradients)


def apply(optimizer: Any, gradients: list, variables: list, trainable: list) -> None:
    """Hand the gradients of some of the trainable variables to an optimizer, once."""
    given = {id(v): g for v, g in zip(variables, gradients)}
    # The call is stateless, because loss scaling branches, and JAX's branches may have
    # no effects. The object's own method may be the accumulating one.
    new_trainable, new_optimizer = type(optimizer).stateless_apply(
        optimizer,
        [v.value for v in optimizer.variables],
        [given.get(id(v)) for v in trainable],
        [v.value for v in trainable],
    )
    for variable, value in zip(trainable, new_trainable):
        variable.assign(value)
    for variable, value in zip(optimizer.variables, new_optimizer):
        variable.assign(value)


def when(predicate: Callable, function: Callable, variables: Callable) -> None:
    """Call a function that assigns `variables()`, if the predicate is true.

    It is a loop that runs at most once, not `jax.lax.cond`: XLA copies every result of
    a conditional in either branch, here the weights and all of the optimizer's state.
    Values that a loop carries stay where they are.
    """
    chosen = predicate()
    if not isinstance(chosen, jax.core.Tracer):
        if chosen:
            function()
        return

    changing = variables()

    def assigned(carry):
        mapping = list(zip(changing, carry[1]))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            function()
        values = [scope.get_current_value(v) for v in changing]
        values = [new.astype(old.dtype) for new, old in zip(values, carry[1])]
        return jnp.zeros_like(chosen), values

    carry = chosen, [variable.value for variable in changing]
    with jax.named_scope("apply_accumulated_gradients"):
        _, values = jax.lax.while_loop(lambda carry: carry[0], assigned, carry)
    for variable, value in zip(changing, values):
        variable.assign(value)


flush = when


def everywhere(function: Callable, variable: keras.Variable) -> None:
    """Call a function on each replica that has the variable, from a callback."""
    function()


def read(variable: keras.Variable) -> np.ndarray | None:
    """A counter's value; None while a function that uses it is being compiled."""
    return None if is_traced(variable) else np.asarray(variable.value)


def is_traced(variable: keras.Variable) -> bool:
    """Whether a function that uses the variable is being compiled."""
    return isinstance(variable.value, jax.core.Tracer)


def guard() -> None:
    """None: `same` remembers nothing, because each call is checked when it is made."""


def same(
    guard: None, given: list[int], count: keras.Variable
) -> AbstractContextManager:
    """A context without effect: no compiled call can have changed the variables."""
    return nullcontext()


def stateless(values: list) -> list:
    """The values of variables, for a stateless call."""
    return values
