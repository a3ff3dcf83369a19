"""The operations of `GradientAccumulateOptimizer`, each backend in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from gradient_accumulator.compat import OptimizerStep, internals
from gradient_accumulator.compat.api import keras, ops


class Accumulators(ABC):
    """Sums of gradients in the variables of an optimizer.

    The methods of this class are right for one device, in eager execution.
    """

    def accumulator(
        self, optimizer: Any, variable: keras.Variable, dtype: str
    ) -> keras.Variable:
        """A new variable of an optimizer that sums the gradients of one variable."""
        name = internals.path(variable).replace("/", "_").replace(":", "_")
        return OptimizerStep(optimizer).add_variable(
            tuple(variable.shape),
            dtype,
            f"{name}_gradient_accumulator",
            like=variable,
        )

    def add_local_variable(
        self, optimizer: Any, shape: tuple, dtype: str, name: str
    ) -> keras.Variable:
        """A new variable of an optimizer, of which each replica has its own value."""
        return OptimizerStep(optimizer).add_variable(shape, dtype, name)

    @abstractmethod
    def add(self, pairs: list, factor: Any) -> None:
        """Add gradients, times `factor`, to their accumulators.

        A given factor, which is no `float`, may be 0. Nothing is then added: a mean
        over nothing is not a number, nor is 0 times that mean.

        Args:
            pairs: Accumulators and gradients.
            factor: The number that gradients are multiplied by.
        """

    def add_and_update(self, pairs: list, factor: Any, update: Callable) -> None:
        """Add a micro-batch, and call `update`, which applies the sums after the last.

        If it fails, the micro-batch is subtracted again, unless a function is compiled.
        """
        self.add(pairs, factor)
        try:
            update()
        except BaseException:
            if not self.compiles(factor):
                self.add(pairs, -factor)
            raise

    @abstractmethod
    def compiles(self, factor: Any) -> bool:
        """Whether a function that gets this factor is being compiled."""

    @abstractmethod
    def divided(
        self, accumulators: list, total: Any
    ) -> AbstractContextManager[dict[int, Any]]:
        """A context with the sums of accumulators over `total`, by accumulators' `id`.

        The total is 0 only if all gradients were multiplied by 0.
        """

    def clear(self, accumulators: list) -> None:
        """Set accumulators to 0."""
        for accumulator in accumulators:
            accumulator.assign(ops.zeros(accumulator.shape, accumulator.dtype))

    def total(self, variable: keras.Variable, weighed: bool) -> Any:
        """The sum of the micro-batches' weights.

        Args:
            variable: The variable that sums them.
            weighed: Whether some micro-batch was given a weight.
        """
        return internals.value(variable)

    def clip(
        self, clipping: Any, optimizer: Any, variables: list, gradients: list
    ) -> list:
        """Clip the finished gradients of an update."""
        return clipping.clip_update(optimizer, variables, gradients)

    @abstractmethod
    def apply(
        self, optimizer: Any, gradients: list, variables: list, trainable: list
    ) -> None:
        """Hand the gradients of some of the trainable variables to an optimizer, once.

        It calls the method of the optimizer's class, because the object's own method
        may be the accumulating one.
        """

    def when(
        self, predicate: Callable, function: Callable, variables: Callable
    ) -> None:
        """Call a function that assigns `variables()`, if the predicate is true."""
        if predicate():
            function()

    def flush(
        self, predicate: Callable, function: Callable, variables: Callable
    ) -> None:
        """As `when`, for a call from a callback."""
        self.when(predicate, function, variables)

    def everywhere(self, function: Callable, variable: keras.Variable) -> None:
        """Call a function on each replica that has the variable, from a callback."""
        function()

    @abstractmethod
    def read(self, variable: keras.Variable) -> np.ndarray:
        """A counter's value, outside of functions that are being compiled."""

    @abstractmethod
    def is_traced(self, variable: keras.Variable) -> bool:
        """Whether a function that uses the variable is being compiled."""

    def guard(self) -> Any:
        """The memory of `unchanged`, None where each call is checked at once."""
        return None

    def unchanged(
        self, guard: Any, given: list[int], count: keras.Variable
    ) -> AbstractContextManager:
        """A context whose code fails if variables changed while micro-batches wait.

        Args:
            guard: What `guard` returned.
            given: The places of the variables that gradients are given for.
            count: The number of micro-batches that wait.
        """
        return nullcontext()

    @abstractmethod
    def stateless(self, values: list) -> list:
        """The values of variables for a stateless call."""
