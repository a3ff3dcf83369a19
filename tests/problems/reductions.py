"""Reductions of losses: the facts about each, and the backends that have it."""

import dataclasses
from collections.abc import Callable

from api import keras

from .problem import BACKENDS, sgd


def slow(**overrides):
    """An optimizer for sums over a batch, whose gradients are large."""
    return sgd(**{"learning_rate": 0.02, **overrides})


@dataclasses.dataclass(frozen=True)
class Reduction:
    """The facts about a reduction that its problems depend on.

    Args:
        adds_up: Whether the losses of micro-batches add up to the loss of the batch.
        by_weights: Whether it divides by the sum of the sample weights.
        of_values: Whether the loss is a number for each example.
        another_name: Whether it is another name of a reduction in this list.
        optimizer: Makes an optimizer whose learning rate is high but does not diverge.
        backends: The backends that can train with it. `because` says why not all.
        keras2: The first version of Keras 2 that has it; None if none has.
    """

    adds_up: bool = False
    by_weights: bool = False
    of_values: bool = False
    another_name: bool = False
    optimizer: Callable[..., keras.optimizers.Optimizer] = sgd
    backends: tuple[str, ...] = BACKENDS
    because: str = ""
    keras2: str | None = "2.12"


REDUCTIONS = {
    "sum": Reduction(adds_up=True, optimizer=slow),
    "sum_over_batch_size": Reduction(),
    "mean": Reduction(another_name=True, keras2=None),
    "mean_with_sample_weight": Reduction(by_weights=True, keras2=None),
    "none": Reduction(
        adds_up=True,
        of_values=True,
        optimizer=slow,
        backends=("tensorflow",),
        because="JAX and PyTorch differentiate scalars only, in plain Keras too",
    ),
}

TO_A_NUMBER = [name for name, each in REDUCTIONS.items() if not each.of_values]


def squared(reduction):
    return lambda: {"loss": keras.losses.MeanSquaredError(reduction=reduction)}


def of_reduction(name, weighted=False, masked=False):
    """Fields of a problem whose loss has this reduction.

    Args:
        name: The name of the reduction.
        weighted: Whether sample weights differ from micro-batch to micro-batch.
        masked: Whether the number of losses differs from micro-batch to micro-batch.
    """
    reduction = REDUCTIONS[name]
    unequal = masked or (weighted and reduction.by_weights)
    return {
        "optimizer": reduction.optimizer,
        "backends": reduction.backends,
        "because": reduction.because,
        "keras2": reduction.keras2,
        "optimizer_reduction": (
            "SUM" if reduction.adds_up else None if unequal else "MEAN"
        ),
    }
