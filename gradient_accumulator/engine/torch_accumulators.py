"""The operations of `GradientAccumulateOptimizer` on PyTorch: sums in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import torch

from gradient_accumulator.engine.optimizer_base import Accumulators


@torch.no_grad()
def _divide(accumulators, divisor):
    for held in accumulators:
        held.value.div_(divisor.to(held.value.dtype))


def _is_one(total: torch.Tensor) -> bool:
    return abs(float(total) - 1) <= 4 * torch.finfo(total.dtype).eps


class TorchAccumulators(Accumulators):
    """Sums in variables of an optimizer on PyTorch."""

    @torch.no_grad()
    def add(self, pairs: list, factor: Any) -> None:
        kinds: dict[tuple, tuple[list, list]] = {}
        for held, gradient in pairs:
            value = held.value
            if gradient.dtype != value.dtype or gradient.is_sparse:
                gradient = gradient.to_dense().to(value.dtype)
            kind = value.dtype, value.device
            sums, added = kinds.setdefault(kind, ([], []))
            sums.append(value)
            added.append(gradient)
        for sums, added in kinds.values():
            if isinstance(factor, torch.Tensor):
                factor_of = factor.to(sums[0])
                products = torch._foreach_mul(added, factor_of)
                for product in products:
                    product.masked_fill_(factor_of == 0, 0)
                torch._foreach_add_(sums, products)
            else:
                torch._foreach_add_(sums, added, alpha=factor)

    def compiles(self, factor: Any) -> bool:
        return torch.compiler.is_compiling()

    @contextmanager
    def divided(self, accumulators: list, total: torch.Tensor) -> Iterator[dict]:
        # In place, because the sums take as much memory as the gradients.
        divisor = None if _is_one(total) else torch.where(total == 0, 1, total)
        if divisor is not None:
            _divide(accumulators, divisor)
        try:
            yield {id(held): held.value for held in accumulators}
        except BaseException:
            if divisor is not None:
                _divide(accumulators, 1 / divisor)
            raise

    @torch.no_grad()
    def clear(self, accumulators: list) -> None:
        for held in accumulators:
            held.value.zero_()

    @torch.no_grad()
    def clip(
        self, clipping: Any, optimizer: Any, variables: list, gradients: list
    ) -> list:
        return super().clip(clipping, optimizer, variables, gradients)

    @torch.no_grad()
    def apply(
        self, optimizer: Any, gradients: list, variables: list, trainable: list
    ) -> None:
        type(optimizer).apply(optimizer, gradients, variables)

    def read(self, variable: keras.Variable) -> np.ndarray:
        return variable.value.numpy(force=True)

    def is_traced(self, variable: keras.Variable) -> bool:
        return torch.compiler.is_compiling()

    def stateless(self, values: list) -> list:
        # Copies, because sums are made in place.
        return [torch.clone(torch.as_tensor(value).detach()) for value in values]


ACCUMULATORS = TorchAccumulators
