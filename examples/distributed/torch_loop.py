"""A training loop of your own in the processes of `torchrun`. See README.md."""

import argparse
import os

os.environ["KERAS_BACKEND"] = "torch"

import digits
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradient_accumulator import accumulated_value_and_grad


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, count = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    ).to(device)
    if arguments.shard:
        mesh = dist.init_device_mesh(device.type, (count,))
        module = fully_shard(module, mesh=mesh)
    else:
        module = DistributedDataParallel(module)
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)

    def loss_fn(microbatch):
        x, y = microbatch
        return torch.nn.functional.cross_entropy(module(x), y)

    # Processes reduce gradients once an update, with its last micro-batch.
    value_and_grad = accumulated_value_and_grad(
        loss_fn, microbatch_size=4, module=module
    )
    training, validation = digits.data()
    x, y = (
        torch.tensor(digits.share(array, count, rank), device=device).split(
            digits.BATCH // count
        )
        for array in training
    )
    parameters = list(module.parameters())
    for epoch in range(arguments.epochs):
        losses = []
        for features, labels in zip(x, y, strict=True):
            loss, gradients = value_and_grad(parameters, (features, labels.long()))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            losses.append(loss.item())
        if rank == 0:
            print(f"epoch {epoch + 1}, loss {sum(losses) / len(losses):.4f}")
    with torch.no_grad():
        inputs, labels = (torch.tensor(a, device=device) for a in validation)
        accuracy = (module(inputs).argmax(-1) == labels).float().mean().item()
    print(f"validation accuracy {accuracy:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
