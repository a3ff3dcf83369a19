"""The class of problems, and the list of all problems."""

import dataclasses
from collections.abc import Callable
from typing import Any

from api import KERAS_2, keras
from versions import Since, is_before

BACKENDS = ("tensorflow", "jax", "torch")
# The ways to train in micro-batches: by `accumulate`, or by the optimizer wrapper.
WAYS_OF_FIT = ("microbatch_size", "accum_steps")
WAYS = (*WAYS_OF_FIT, "optimizer")
MICROBATCH = 5  # examples of a micro-batch


def sgd(**overrides):
    return keras.optimizers.SGD(**{"learning_rate": 0.3, "momentum": 0.5, **overrides})


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, the arguments of `compile`, and its batches.

    Args:
        name: The topic of the problem.
        build: Makes the model, not compiled. Every call gives equal weights.
        batches: Makes the batches of one epoch: tuples `(x,)`, `(x, y)` or
            `(x, y, sample_weight)`.
        arguments: Makes the arguments of `compile`, without the optimizer.
        optimizer: Makes the optimizer. Keyword arguments are for its constructor.
        class_weight: The argument of `fit`.
        microbatches: Cuts one batch for `accum_steps`, if it is not cut by examples.
        stages: Functions that change the model, one before each `fit`, or None.
        epochs: The number of epochs of each `fit`.
        backends: The backends that can train the problem. `because` says why not all.
        needs: A class of `keras.optimizers` that the oldest versions do not have.
        floatx: Keras's `floatx`.
        build_optimizer: Whether the optimizer is built before `fit`.

    The following say where the problem runs, and how it is compared:

    Args:
        core: The elements of `WAYS` that are in the core of the tests (`make test`).
        alike: "fit" or "optimizer", or both, if other problems draw and weight
            micro-batches in this way. TensorFlow traces each test again, so that only
            `make test-full` runs one of the ways of `fit`, and the optimizer, on it.
        since: The versions since which plain Keras can train it.
        keras2: The first version of Keras 2 that can train it; None if none can.
        optimizer_reduction: The `reduction` with which `GradientAccumulateOptimizer`
            gives the batch's gradient from micro-batches of one size. None if it cannot
            know the weights of micro-batches.
        repeated_rows: Whether a gradient is only of an embedding. On TensorFlow Keras
            does not merge slices of one row, and clips each.
        skips_first: Whether the first batch changes nothing.
        rounds_loss: Whether Keras 2 computes the loss in half precision.
        devices: The kinds of devices that train it in `make test-all`, of "jax",
            "torch", "tensorflow" and "workers". `make test-full` uses the first three.
        plain_replicas: Whether plain Keras can train it on replicas of TensorFlow.
        thirds: Whether a third of a batch is as exact as a half of it.
        per_process: Whether it depends on the number of examples of a process.
        agc: Whether it is also trained with adaptive gradient clipping.
        scaler_around: Whether it is also trained with its `LossScaleOptimizer` around
            `GradientAccumulateOptimizer`.
    """

    name: str
    build: Callable[[], keras.Model]
    batches: Callable[[], list[tuple]]
    arguments: Callable[[], dict[str, Any]] = lambda: {"loss": "mse"}
    optimizer: Callable[..., keras.optimizers.Optimizer] = sgd
    class_weight: dict[int, float] | None = None
    microbatches: Callable[[tuple], list[tuple]] | None = None
    stages: tuple[Callable[[keras.Model], None] | None, ...] = (None,)
    epochs: int = 2
    backends: tuple[str, ...] = BACKENDS
    because: str = ""
    needs: str | None = None
    floatx: str = "float32"
    build_optimizer: bool = False
    core: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()
    since: tuple[Since, ...] = ()
    keras2: str | None = "2.12"
    optimizer_reduction: str | None = "MEAN"
    repeated_rows: bool = False
    skips_first: bool = False
    rounds_loss: bool = False
    devices: tuple[str, ...] = ()
    plain_replicas: bool = True
    thirds: bool = True
    per_process: bool = False
    agc: bool = False
    scaler_around: bool = False

    def __str__(self):
        return self.name

    def compile(self, model, **overrides):
        """Compiles a model with a new optimizer, whose constructor gets `overrides`."""
        model.compile(optimizer=self.optimizer(**overrides), **self.arguments())
        if self.build_optimizer:
            model.optimizer.build(model.trainable_variables)

    def cut(self, batch):
        """The micro-batches of one batch, as `accum_steps` gets them."""
        return self.microbatches(batch) if self.microbatches else cut(batch)

    def is_here(self):
        """Whether the active backend and the installed Keras can train it."""
        if keras.backend.backend() not in self.backends:
            return False
        if self.needs is not None and not hasattr(keras.optimizers, self.needs):
            return False
        if KERAS_2:
            return self.keras2 is not None and not is_before(self.keras2)
        return True

    @property
    def accum_steps(self):
        """The number of micro-batches of the largest batch. Smaller ones have fewer."""
        return max(len(self.cut(batch)) for batch in self.batches())


def cut(batch, size=None):
    """Cuts a batch into micro-batches of `size` examples. The last may be smaller."""
    size = size or MICROBATCH
    count = len(keras.tree.flatten(batch)[0])
    return [
        keras.tree.map_structure(lambda a, i=i: a[i : i + size], batch)
        for i in range(0, count, size)
    ]


PROBLEMS: list[Problem] = []
# Settings of problems that are like others in every way.
ALIKE = {"alike": ("fit", "optimizer")}


def add(name, build, batches, **settings):
    PROBLEMS.append(Problem(name, build, batches, **settings))


def here():
    """The problems that the active backend and the installed Keras can train."""
    return [problem for problem in PROBLEMS if problem.is_here()]
