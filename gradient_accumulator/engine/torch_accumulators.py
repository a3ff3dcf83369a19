"""The operations of `GradientAccumulateOptimizer` on PyTorch: sums in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import numpy as np
import torch

from gradient_accumulator.engine.common import added, new_accumulator

accumulator = new_accumulator


def add_local_variable(optimizer: Any, shape: tuple, **kwargs) -> keras.Variable:
    """An optimizer's variable, of which each replica has its own value."""
    return optimizer.add_variable(shape, **kwargs)


@torch.no_grad()
def add(pairs: list, factor: Any) -> None:
    """Add gradients, times `factor`, to their accumulators.

    A given factor, which is no `float`, may be 0. Nothing is then added: a mean over
    nothing is not a number, nor is 0 times that mean.
    """
    together: dict[tuple, tuple[list, list]] = {}
    for held, gradient in pairs:
        value = held.value
        if gradient.dtype != value.dtype or gradient.is_sparse:
            gradient = gradient.to_dense().to(value.dtype)
        kind = value.dtype, value.device
        sums, added = together.setdefault(kind, ([], []))
        sums.append(value)
        added.append(gradient)
    for sums, added in together.values():
        if isinstance(factor, torch.Tensor):
            factor_of = factor.to(sums[0])
            products = torch._foreach_mul(added, factor_of)
            for product in products:
                product.masked_fill_(factor_of == 0, 0)
            torch._foreach_add_(sums, products)
        else:
            torch._foreach_add_(sums, added, alpha=factor)


def add_and_update(pairs: list, factor: Any, update: Callable) -> None:
    """Add a micro-batch, and call `update`, which applies the sums after the last."""
    with added(add, pairs, factor, not torch.compiler.is_compiling()):
        update()


@contextmanager
def divided(accumulators: list, total: torch.Tensor) -> Iterator[dict]:
    """Yields the accumulators' sums over `total`, by the accumulators' `id`.

    The division is in place, because the sums take as much memory as the gradients. It
    is undone if the code in the context fails.
    """
    divisor = None if is_one(total) else torch.where(total == 0, 1, total)
    if divisor is not None:
        _divide(accumulators, divisor)
    try:
        yield {id(held): held.value for held in accumulators}
    except BaseException:
        if divisor is not None:
            _divide(accumulators, 1 / divisor)
        raise


@torch.no_grad()
def _divide(accumulators, divisor):
    for held in accumulators:
        held.value.div_(divisor.to(held.value.dtype))


def is_one(total: torch.Tensor) -> bool:
    return abs(float(total) - 1) <= 4 * torch.finfo(total.dtype).eps


@torch.no_grad()
def clear(accumulators: list) -> None:
    for held in accumulators:
        held.value.zero_()


def total(variable: keras.Variable, weighed: bool) -> Any:
    """The sum of the micro-batches' weights."""
    return variable.value


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient as a dense tensor, which sums rows that occur several times."""
    gradient = keras.ops.convert_to_tensor(gradient)
    return gradient.to_dense() if gradient.is_sparse else gradient


@torch.no_grad()
def clip(clipping: Any, optimizer: Any, variables: list, gradients: list) -> list:
    """Clip the finished gradients of an update."""
    return clipping.clip_update(optimizer, variables, gradients)


@torch.no_grad()
def apply(optimizer: Any, gradients: list, variables: list, trainable: list) -> None:
    """Hand the gradients of some of the trainable variables to an optimizer, once."""
    # The object's own method may be the accumulating one.
    type(optimizer).apply(optimizer, gradients, variables)


def when(predicate: Callable, function: Callable, variables: Callable) -> None:
    """Call a function that assigns `variables()`, if the predicate is true."""
    if predicate():
        function()


flush = when


def everywhere(function: Callable, variable: keras.Variable) -> None:
    """Call a function on each replica that has the variable, from a callback."""
    function()


def read(variable: keras.Variable) -> np.ndarray:
    """A counter's value."""
    return variable.value.numpy(force=True)


def is_traced(variable: keras.Variable) -> bool:
    """Whether a function that uses the variable is being compiled."""
    return torch.compiler.is_compiling()


def guard() -> None:
    """None: `same` remembers nothing, because each call is checked when it is made."""


def same(
    guard: None, given: list[int], count: keras.Variable
) -> AbstractContextManager:
    """A context without effect: no compiled call can have changed the variables."""
    return nullcontext()


def stateless(values: list) -> list:
    """Copies of values, for a stateless call, because sums are made in place."""
    return [torch.clone(torch.as_tensor(value).detach()) for value in values]
