"""A PyTorch loop, compared with the batch and with accelerate."""

import problems
import pytest
from helpers import BACKEND
from helpers.loops import assert_equal_weights, tokens_and_labels

from gradient_accumulator import accumulated_value_and_grad

on_torch = pytest.mark.skipif(BACKEND != "torch", reason="a PyTorch loop")


def torch_model():
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(problems.TOKENS, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    )


def torch_sum(model, microbatch):
    tokens, labels, mask = microbatch
    errors = (model(tokens)[..., 0] - labels) ** 2
    return (errors * mask).sum(), mask.sum()


def torch_batch():
    import torch

    tokens, labels, mask = tokens_and_labels()
    return torch.tensor(tokens).long(), torch.tensor(labels), torch.tensor(mask)


@on_torch
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_beside_accelerate(weighted):
    import accelerate
    import torch

    batch = torch_batch()
    if not weighted:
        batch = (batch[0], batch[1], torch.ones_like(batch[2]))
    microbatches = [tuple(a[i : i + 4] for a in batch) for i in (0, 4, 8)]

    def mean(model, microbatch):
        numerator, denominator = torch_sum(model, microbatch)
        return numerator / denominator

    def trained(run):
        model = torch_model()
        before = [p.detach().clone().numpy() for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-2)
        for _ in range(3):
            run(model, optimizer)
        return before, [p.detach().numpy() for p in model.parameters()]

    def full(model, optimizer):
        optimizer.zero_grad()
        mean(model, batch).backward()
        optimizer.step()

    def ours(model, optimizer):
        loss = torch_sum if weighted else mean
        function = accumulated_value_and_grad(
            lambda microbatch: loss(model, microbatch), microbatch_size=4
        )
        parameters = list(model.parameters())
        _, gradients = function(parameters, batch)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        optimizer.step()

    accelerator = accelerate.Accelerator(gradient_accumulation_steps=3, cpu=True)

    def accelerated(model, optimizer):
        optimizer = accelerator.prepare(optimizer)
        for microbatch in microbatches:
            with accelerator.accumulate(model):
                accelerator.backward(mean(model, microbatch))
                optimizer.step()
                optimizer.zero_grad()

    before, reference = trained(full)
    _, got = trained(ours)
    assert_equal_weights(got, reference, before)
    _, peer = trained(accelerated)
    if weighted:  # micro-batches have equal weights, whatever their numbers of tokens
        with pytest.raises(AssertionError):
            assert_equal_weights(peer, reference, before, tolerance=1e-2)
    else:
        assert_equal_weights(peer, reference, before)
