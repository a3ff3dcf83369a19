"""Two processes of `torch.distributed` normalize by the statistics of both.

`test_layers_updates.py` runs it as new processes, which import everything themselves.
"""

import sys

import numpy as np
import torch
import torch.distributed as dist
from keras import layers, ops

from gradient_accumulator import AccumBatchNormalization

r = np.random.default_rng(0)
X = r.normal(size=(12, 5)).astype("float32") * r.uniform(0.5, 3, 5) + 1
X = X.astype("float32")
TARGET = r.normal(size=(12, 5)).astype("float32")


def gradient(layer, x, target):
    x = torch.tensor(x, requires_grad=True)
    y = layer(x, training=True)
    (y * torch.tensor(target)).sum().backward()
    return ops.convert_to_numpy(y), x.grad.numpy()


def process(rank, file):
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    # The shares are uneven: 8 and 4 examples.
    own = slice(0, 8) if rank == 0 else slice(8, 12)
    whole = layers.BatchNormalization(momentum=0.5)
    outputs, gradients = gradient(whole, X, TARGET)
    layer = AccumBatchNormalization(momentum=0.5, synchronized=True)
    y, of_x = gradient(layer, X[own], TARGET[own])
    np.testing.assert_allclose(y, outputs[own], atol=1e-5)
    np.testing.assert_allclose(of_x, gradients[own], atol=1e-5)
    for a, b in (
        (layer.moving_mean, whole.moving_mean),
        (layer.moving_variance, whole.moving_variance),
    ):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)
    # Without synchronization, the pools are joined at the end of the update.
    layer = AccumBatchNormalization(accum_steps=2, momentum=0.5)
    middle = (own.start + own.stop) // 2
    for microbatch in (X[own.start : middle], X[middle : own.stop]):
        layer(torch.tensor(microbatch), training=True)
    for a, b in (
        (layer.moving_mean, whole.moving_mean),
        (layer.moving_variance, whole.moving_variance),
    ):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(process, (sys.argv[1],), nprocs=2)
