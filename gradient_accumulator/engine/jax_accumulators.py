"""The operations of `GradientAccumulateOptimizer` on JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from gradient_accumulator.engine.optimizer_base import Accumulators


class JaxAccumulators(Accumulators):
    """Sums in variables of an optimizer on JAX."""

    def add(self, pairs: list, factor: Any) -> None:
        for held, gradient in pairs:
            gradient = jnp.asarray(gradient).astype(held.dtype)
            product = gradient * jnp.asarray(factor, held.dtype)
            if not isinstance(factor, float):
                product = jnp.where(factor == 0, 0, product)
            held.assign(held.value + product)

    def compiles(self, factor: Any) -> bool:
        return isinstance(factor, jax.core.Tracer)

    @contextmanager
    def divided(self, accumulators: list, total: Any) -> Iterator[dict]:
        total = jnp.where(jnp.asarray(total) == 0, 1, total)
        yield {
            id(held): held.value / jnp.asarray(total, held.dtype)
            for held in accumulators
        }

    def apply(
        self, optimizer: Any, gradients: list, variables: list, trainable: list
    ) -> None:
        given = {id(v): g for v, g in zip(variables, gradients)}
        # Loss scaling branches, and the branches of JAX have no effects.
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

    def when(
        self, predicate: Callable, function: Callable, variables: Callable
    ) -> None:
        chosen = predicate()
        if not isinstance(chosen, jax.core.Tracer):
            if chosen:
                function()
            return

        # A loop that runs at most once, not `jax.lax.cond`: XLA copies every result of
        # a conditional in either branch, here the weights and all of the optimizer's
        # state. Values that a loop carries stay where they are.
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

    def read(self, variable: keras.Variable) -> np.ndarray:
        return np.asarray(variable.value)

    def is_traced(self, variable: keras.Variable) -> bool:
        return isinstance(variable.value, jax.core.Tracer)

    def stateless(self, values: list) -> list:
        return values


ACCUMULATORS = JaxAccumulators
