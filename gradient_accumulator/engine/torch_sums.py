"""The sum of gradients on PyTorch: in `grad` itself where that has the wanted dtype."""

from __future__ import annotations

from typing import Any

import torch


class Sum:
    """The sum of a parameter's gradients.

    Where `backward` already sums in the wanted dtype, the sum stays in `grad`.

    Args:
        parameter: The parameter whose gradients are summed.
        dtype: The dtype to sum in.
        largest: Whether to keep the largest gradient instead of the sum.
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
            correction: The number that the sum is multiplied by, or None.
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
