"""`accumulated_value_and_grad` on PyTorch, where `backward` adds to `grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch

from gradient_accumulator.engine.base import Engine
from gradient_accumulator.engine.torch_activations import free_activations
from gradient_accumulator.engine.torch_modules import reducing
from gradient_accumulator.engine.torch_sums import GradSums
from gradient_accumulator.functional import (
    LossFunction,
    check_leaves,
    listed,
    warn_of_nan,
)
from gradient_accumulator.microbatches import cut, example_count, leaves
from gradient_accumulator.received import check_of_backend, described


def value_and_grad(engine: Engine, loss: LossFunction) -> Callable:
    """The function that `accumulated_value_and_grad` returns."""
    processes = reducing(loss.module)

    def function(variables, batch, *args, **kwargs):
        parameters = [
            v.value if isinstance(v, keras.Variable) else v for v in listed(variables)
        ]
        check_of_backend("variables", parameters)
        for parameter in parameters:
            if not isinstance(parameter, torch.Tensor):
                raise TypeError(
                    "Argument `variables` must be a list of variables or parameters. "
                    f"Received: {described(parameter)} (of type {type(parameter)})"
                )
        check_leaves(batch, leaves(batch))
        # Gradients are averaged over processes: their number multiplies each sum.
        (size,) = processes.totals([example_count(batch) / processes.count])
        dtypes = [
            processes.dtype(p) or loss.accumulator_dtype(p.dtype) for p in parameters
        ]
        double = "float64" in dtypes
        weight = torch.zeros((), dtype=torch.float64 if double else torch.float32)
        wanted = [p for p in parameters if p.requires_grad]
        total, auxes = 0.0, []
        before = [parameter.grad for parameter in parameters]
        try:
            sums = GradSums(parameters, dtypes)
            sums.zeros()
            microbatches = cut(batch, loss.microbatch_size, count=example_count)
            processes.check(microbatches.count, parameters)
            for k, microbatch in enumerate(microbatches.iterator, start=1):
                with processes.microbatch(last=k == microbatches.count):
                    numerator, denominator, aux = loss(microbatch, *args, **kwargs)
                    if not isinstance(numerator, torch.Tensor):
                        raise TypeError(
                            "`loss_fn` must return a tensor of PyTorch's, also where "
                            "the batch has arrays of NumPy's, which it is given as "
                            f"they are. Received: {described(numerator)}"
                        )
                    examples = example_count(microbatch)
                    share = (examples if denominator is None else 1) / size
                    worth = numerator * share
                    processes.backward(worth, wanted)
                sums.add(None, [])
                total += worth.detach().to(weight.dtype)
                if denominator is not None:
                    weight = weight + torch.as_tensor(denominator).detach()
                auxes.append(aux)
                free_activations()
            total, weight = _over(processes, total, weight)
            correction = None if denominator is None else _inverse(weight, size)
            if correction is not None and processes.count > 1:
                correction = float(correction)  # sharded gradients take no tensor
            gradients = sums.finish(None, correction)
        finally:
            for parameter, gradient in zip(parameters, before):
                parameter.grad = gradient
        value = total if correction is None else total * correction
        if correction is None:
            warn_of_nan(bool(torch.isnan(value)))
        if loss.has_aux:
            return (value, keras.tree.map_structure(_joined, *auxes)), gradients
        return value, gradients

    return function


def _over(processes, total, weight):
    """The means of the loss and the denominator over processes."""
    if processes.count == 1:
        return total, weight
    sums = processes.totals([float(total), float(weight)])
    return tuple(
        own.new_tensor(sum_ / processes.count)
        for own, sum_ in zip((total, weight), sums)
    )


def _inverse(weight, size):
    return torch.where(weight == 0, 0, size / weight)


def _joined(*tensors: Any) -> torch.Tensor:
    """The micro-batches' `aux`, joined along the first axis; scalars as a vector."""
    parts = [torch.as_tensor(tensor).detach() for tensor in tensors]
    return torch.cat(parts) if parts[0].dim() else torch.stack(parts)
