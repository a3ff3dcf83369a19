"""Sums of gradients on PyTorch: in `grad` itself where that has the wanted dtype."""

from __future__ import annotations

from typing import Any

import torch

from gradient_accumulator.devices import torch_devices as processes
from gradient_accumulator.engine.engine_base import Sums


class GradSums(Sums):
    """Sums that lie in the parameters' `grad`, or beside it: no loop carries them.

    Args:
        parameters: The parameters whose gradients are summed.
        dtypes: The names of the dtypes to sum in.
        largest: Whether to keep the largest gradient instead of the sum, for each.
    """

    def __init__(
        self, parameters: list, dtypes: list[str], largest: list[bool] | None = None
    ):
        super().__init__(parameters, dtypes)
        largest = largest or [False] * len(parameters)
        self._sums = [
            _Sum(parameter, getattr(torch, dtype), is_largest)
            for parameter, dtype, is_largest in zip(parameters, dtypes, largest)
        ]

    def zeros(self) -> None:
        self.clear()

    def clear(self) -> None:
        for sum_ in self._sums:
            sum_.clear()

    def add(self, sums: None, gradients: list) -> None:
        for sum_ in self._sums:
            sum_.add()

    def finish(self, sums: None, scale: Any) -> list:
        if isinstance(scale, float) and scale == 1:
            scale = None
        return [sum_.finish(scale) for sum_ in self._sums]

    @torch.no_grad()
    def reduce(self, scale: float, loss: torch.Tensor, moving: list) -> None:
        """Sum over all processes, in place.

        Args:
            scale: The number that this process's sums are multiplied by before.
            loss: A tensor to sum too.
            moving: Variables that become their mean over the processes.
        """
        gradients = [sum_.gradient for sum_ in self._sums]
        connected = torch.tensor([g is not None for g in gradients]).to(loss)
        for sum_, gradient in zip(self._sums, gradients):
            if gradient is not None and not sum_.largest:
                gradient *= scale
        gradients = [
            torch.zeros_like(s.parameter, dtype=s.dtype) if g is None else g
            for s, g in zip(self._sums, gradients)
        ]
        added = [g for s, g in zip(self._sums, gradients) if not s.largest]
        largest = [g for s, g in zip(self._sums, gradients) if s.largest]
        values = [variable.value for variable in moving]
        processes.reduce([*added, loss, connected, *values])
        processes.reduce(largest, largest=True)
        for value in values:
            value /= processes.count()
        for sum_, gradient, some in zip(self._sums, gradients, connected.tolist()):
            sum_.gradient = gradient if some else None


class _Sum:
    """The sum of one parameter's gradients.

    Where `backward` already sums in the wanted dtype, the sum stays in `grad`.
    """

    def __init__(self, parameter: torch.Tensor, dtype: torch.dtype, largest: bool):
        self.parameter = parameter
        self.dtype = dtype
        self.largest = largest
        self._beside: torch.Tensor | None = None

    @property
    def gradient(self) -> torch.Tensor | None:
        """The sum, in the dtype that it is summed in."""
        return self.parameter.grad if self._beside is None else self._beside

    @gradient.setter
    def gradient(self, value: torch.Tensor | None) -> None:
        self._beside = value

    def clear(self) -> None:
        self._beside = self.parameter.grad = None

    def add(self) -> None:
        gradient = self.parameter.grad
        if gradient is None or (gradient.dtype == self.dtype and not self.largest):
            return
        self.parameter.grad = None
        if self._beside is None:
            self._beside = gradient.to(self.dtype)
        elif self.largest:
            torch.maximum(self._beside, gradient, out=self._beside)
        else:
            self._beside += gradient

    def finish(self, scale: Any) -> torch.Tensor | None:
        """The finished gradient, in the parameter's dtype."""
        gradient = self.gradient
        self._beside = None
        if gradient is None:
            return None
        if scale is not None and not self.largest:
            gradient *= scale
        return gradient.to(self.parameter.dtype)
