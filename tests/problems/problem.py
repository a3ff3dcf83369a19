"""What a problem is, and the list of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from api import KERAS_2, keras
from versions import Since, is_before

BACKENDS = ("tensorflow", "jax", "torch")
# How micro-batches are trained: by `accumulate`, or by the optimizer's wrapper.
WAYS_OF_FIT = ("microbatch_size", "accum_steps")
WAYS = (*WAYS_OF_FIT, "optimizer")
MICROBATCH = 5  # examples of a micro-batch


def sgd(**overrides):
    return keras.optimizers.SGD(**{"learning_rate": 0.3, "momentum": 0.5, **overrides})


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, what it is compiled with, and its batches.

    Args:
        name: What the problem is about.
        build: Makes the model, not compiled. Every call gives the same weights.
        batches: Makes the batches of one epoch: tuples `(x,)`, `(x, y)` or
            `(x, y, sample_weight)`.
        arguments: Makes the arguments of `compile`, without the optimizer.
        optimizer: Makes the optimizer; keyword arguments are for its constructor.
        class_weight: For `fit`.
        microbatches: Cuts one batch for `accum_steps`, where that is not by examples.
        stages: What is done to the model before each `fit`, one entry a `fit`.
        epochs: Epochs of each `fit`.
        backends: Those that the problem exists on. `because` says why not on all.
        needs: A class of `keras.optimizers` that the oldest versions do not have.
        floatx: Keras's `floatx`.
        build_optimizer: Whether the optimizer is built before `fit`.

    Where it runs, and how it is compared there:

    Args:
        core: Of `WAYS` those that are in the core of the tests (`make test`).
        alike: Where others draw and weigh micro-batches as this one does: in "fit", in
            "optimizer". TensorFlow traces every test anew, so that on it one of the two
            ways of `fit`, and the optimizer, are left to `make test-full`.
        since: What older versions of Keras cannot train, by plain `fit`.
        keras2: The first version of Keras 2 that can train it, None where none can.
        optimizer_reduction: The `reduction` by which `GradientAccumulateOptimizer`
            gives the batch's gradient from micro-batches of one size. None where it
            cannot know what each is worth.
        repeated_rows: Whether a gradient is of an embedding alone. Keras on TensorFlow
            keeps entries for one row apart, and clips each.
        skips_first: Whether the first batch changes nothing.
        rounds_loss: Whether Keras 2 computes the loss in half precision.
        devices: Where several devices train it in `make test-all`: of "jax", "torch",
            "tensorflow" and "workers". The first three do in `make test-full`.
        plain_replicas: Whether plain Keras can train it on replicas of TensorFlow.
        thirds: Whether a third of a batch is as exact as a half of it.
        per_process: Whether it depends on the number of examples that a process sees.
        agc: Whether it is also trained with adaptive gradient clipping.
        scaler_around: Whether its `LossScaleOptimizer` is also tried around
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
        """Compiles with a new optimizer; `overrides` go to its constructor."""
        model.compile(optimizer=self.optimizer(**overrides), **self.arguments())
        if self.build_optimizer:
            model.optimizer.build(model.trainable_variables)

    def cut(self, batch):
        """The micro-batches of one batch, as `accum_steps` gets them."""
        return self.microbatches(batch) if self.microbatches else cut(batch)

    def is_here(self):
        """Whether the active backend, and the Keras in use, can have it."""
        if keras.backend.backend() not in self.backends:
            return False
        if self.needs is not None and not hasattr(keras.optimizers, self.needs):
            return False
        if KERAS_2:
            return self.keras2 is not None and not is_before(self.keras2)
        return True

    @property
    def accum_steps(self):
        """Micro-batches of the largest batch; a smaller one has fewer."""
        return max(len(self.cut(batch)) for batch in self.batches())


def cut(batch, size=None):
    """Cuts every array of a batch in micro-batches of `size` examples, the last
    smaller.
    """
    size = size or MICROBATCH
    count = len(keras.tree.flatten(batch)[0])
    return [
        keras.tree.map_structure(lambda a, i=i: a[i : i + size], batch)
        for i in range(0, count, size)
    ]


PROBLEMS: list[Problem] = []
# Settings of problems that others are like, wherever they run.
ALIKE = {"alike": ("fit", "optimizer")}


def add(name, build, batches, **settings):
    PROBLEMS.append(Problem(name, build, batches, **settings))


def here():
    """The problems that the active backend, and the Keras in use, can have."""
    return [problem for problem in PROBLEMS if problem.is_here()]
