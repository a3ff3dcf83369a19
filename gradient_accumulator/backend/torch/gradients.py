"""`accumulated_value_and_grad` on PyTorch: `backward` adds to what is there."""

from __future__ import annotations

from collections.abc import Callable

import keras
import torch

from gradient_accumulator.backend.torch.sums import Sum
from gradient_accumulator.gradients import LossFunction
from gradient_accumulator.pieces import cut, example_count


def value_and_grad(loss: LossFunction) -> Callable:
    """The function that `accumulated_value_and_grad` returns."""

    def function(variables, batch, *args, **kwargs):
        variables = list(variables)
        parameters = [
            v.value if isinstance(v, keras.Variable) else v for v in variables
        ]
        size = example_count(batch)
        total, weight, auxes = 0.0, 0.0, []
        before = [parameter.grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None
            sums = [
                Sum(p, getattr(torch, loss.accumulator_dtype(p))) for p in parameters
            ]
            for piece in cut(batch, loss.microbatch_size).iterator:
                numerator, denominator, aux = loss(piece, *args, **kwargs)
                examples = example_count(piece)
                share = (examples if denominator is None else 1) / size
                worth = numerator * share
                worth.backward()
                for sum_ in sums:
                    sum_.add()
                total += worth.detach()
                weight += examples if denominator is None else denominator
                auxes.append(aux)
            correction = None if denominator is None else _inverse(weight, size)
            gradients = [sum_.finish(correction) for sum_ in sums]
        finally:
            for parameter, gradient in zip(parameters, before):
                parameter.grad = gradient
        value = total if correction is None else total * correction
        if loss.has_aux:
            return (value, keras.tree.map_structure(_joined, *auxes)), gradients
        return value, gradients

    return function


def _inverse(weight, size):
    weight = torch.as_tensor(weight, dtype=torch.float32).detach()
    return torch.where(weight == 0, 0, size / weight)


def _joined(*tensors):
    """What pieces return, along their first axis; scalars as a vector."""
    return torch.cat(tensors) if tensors[0].dim() else torch.stack(tensors)
