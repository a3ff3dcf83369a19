"""`accumulated_value_and_grad` on PyTorch, where `backward` adds to `grad`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import torch

from gradient_accumulator.engine.engine_base import Engine
from gradient_accumulator.engine.torch_activations import free_activations
from gradient_accumulator.engine.torch_modules import reducing
from gradient_accumulator.engine.torch_sums import GradSums
from gradient_accumulator.functional import (
    Accumulation,
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
        parameters = _parameters(variables)
        check_leaves(batch, leaves(batch))
        wanted = [p for p in parameters if p.requires_grad]

        def value_and_grad(part_of_batch, _):
            part, (_, *rest) = part_of_batch(parameters)
            processes.backward(part, wanted)
            return [], (part.detach(), *rest)

        # Gradients are averaged over processes: their number multiplies each sum.
        (size,) = processes.totals([example_count(batch) / processes.count])
        sums = GradSums(
            parameters,
            [processes.dtype(p) or loss.accumulator_dtype(p.dtype) for p in parameters],
        )
        accumulation = Accumulation(sums, value_and_grad, size)
        auxes = []
        before = [parameter.grad for parameter in parameters]
        try:
            carry = accumulation.zeros()
            microbatches = cut(batch, loss.microbatch_size, count=example_count)
            processes.check(microbatches.count, parameters)
            for k, microbatch in enumerate(microbatches.iterator, start=1):
                one = partial(_of_tensors, loss, microbatch, args, kwargs)
                with processes.microbatch(last=k == microbatches.count):
                    carry, aux = accumulation.add(
                        carry, one, parameters, example_count(microbatch)
                    )
                auxes.append(aux)
                free_activations()
            value, gradients = accumulation.finish(_over(processes, carry))
        finally:
            for parameter, gradient in zip(parameters, before):
                parameter.grad = gradient
        if accumulation.has_means:
            warn_of_nan(bool(torch.isnan(value)))
        if loss.has_aux:
            return (value, keras.tree.map_structure(_joined, *auxes)), gradients
        return value, gradients

    return function


def _parameters(variables):
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
    return parameters


def _of_tensors(loss, microbatch, args, kwargs, _):
    numerator, denominator, aux = loss(microbatch, *args, **kwargs)
    if not isinstance(numerator, torch.Tensor):
        raise TypeError(
            "`loss_fn` must return a tensor of PyTorch's, also where the batch has "
            "arrays of NumPy's, which it is given as they are. "
            f"Received: {described(numerator)}"
        )
    return numerator, denominator, aux


def _over(processes, carry):
    """The carry, with the means of the loss and the denominator over processes."""
    if processes.count == 1:
        return carry
    numbers = [carry.loss, carry.denominator]
    loss, denominator = (
        own.new_tensor(sum_ / processes.count)
        for own, sum_ in zip(numbers, processes.totals([float(n) for n in numbers]))
    )
    return carry._replace(loss=loss, denominator=denominator)


def _joined(*tensors: Any) -> torch.Tensor:
    """The micro-batches' `aux`, joined along the first axis; scalars as a vector."""
    parts = [torch.as_tensor(tensor).detach() for tensor in tensors]
    return torch.cat(parts) if parts[0].dim() else torch.stack(parts)
