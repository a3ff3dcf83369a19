"""The sum of gradients on PyTorch: in `grad` itself where that has the wanted dtype."""

from __future__ import annotations

from typing import Any

import torch


class Sum:
    """The sum of a parameter's gradients.

    Where `backward` sums in the wanted dtype already, the sum stays where it is.

    Args:
        parameter: What gradients are taken by.
        dtype: What to sum in.
        largest: Whether the largest gradient is wanted in the place of the sum.
    """

    def __init__(
        self, parameter: torch.Tensor, dtype: torch.dtype, largest: bool = False
    ):
        self.parameter = parameter
        self.dtype = dtype
        self.largest = largest
        self.sum: torch.Tensor | None = None

    def add(self) -> None:
        gradient = self.parameter.grad
        if gradient is None or (gradient.dtype == self.dtype and not self.largest):
            return
        self.parameter.grad = None
        if self.sum is None:
            self.sum = gradient.to(self.dtype)
        elif self.largest:
            torch.maximum(self.sum, gradient, out=self.sum)
        else:
            self.sum += gradient

    def finish(self, correction: Any) -> torch.Tensor | None:
        """The finished gradient, in the dtype that it was summed in.

        Args:
            correction: What the sum is to be multiplied by.
        """
        gradient, self.sum = self.sum, None
        if gradient is None:
            gradient = self.parameter.grad
        if gradient is None:
            return None
        if correction is not None and not self.largest:
            gradient *= correction
        return gradient

    def zeros(self) -> torch.Tensor:
        """A gradient of zeros, as `finish` would return it."""
        return torch.zeros_like(self.parameter, dtype=self.dtype)
