"""Reductions of losses: what each leaves of many losses, and where it exists."""

import dataclasses
from collections.abc import Callable

from api import keras

from .problem import BACKENDS, sgd


def slow(**overrides):
    """For sums over a batch, whose gradients are large."""
    return sgd(**{"learning_rate": 0.02, **overrides})


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What a problem whose loss has this reduction is like.

    Args:
        adds_up: Whether the losses of micro-batches add up to the loss of the batch.
        by_weights: Whether it divides by the sum of the sample weights.
        of_values: Whether it leaves a loss for each example, and no number.
        another_name: Whether it is another name of a reduction in this list.
        optimizer: Of a learning rate that is high, and does not diverge.
        backends: Those that train by it. `because` says why not all.
        keras2: The first version of Keras 2 that has it, None where none has.
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
        name: The reduction's.
        weighted: Whether sample weights differ from micro-batch to micro-batch.
        masked: Whether the number of losses does.
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
