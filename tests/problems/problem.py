"""What a problem is, and the list of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from api import KERAS_2, keras

BACKENDS = ("tensorflow", "jax", "torch")
PIECE = 5  # examples of a piece


def sgd(**overrides):
    return keras.optimizers.SGD(**{"learning_rate": 0.3, "momentum": 0.5, **overrides})


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, what it is compiled with, and its full batches.

    Args:
        name: What the problem is about.
        build: Makes the model, not compiled. Every call gives the same weights.
        batches: Makes the full batches of one epoch: tuples `(x,)`, `(x, y)` or
            `(x, y, sample_weight)`.
        arguments: Makes the arguments of `compile`, without the optimizer.
        optimizer: Makes the optimizer; keyword arguments are for its constructor.
        class_weight: For `fit`.
        pieces: Cuts one full batch for `accum_steps`, where that is not by examples.
        stages: What is done to the model before each `fit`, one entry a `fit`.
        epochs: Epochs of each `fit`.
        backends: Those that the problem exists on. `because` says why not on all.
        floatx: Keras's `floatx`.
        build_optimizer: Whether the optimizer is built before `fit`.
    """

    name: str
    build: Callable[[], keras.Model]
    batches: Callable[[], list[tuple]]
    arguments: Callable[[], dict[str, Any]] = lambda: {"loss": "mse"}
    optimizer: Callable[..., keras.optimizers.Optimizer] = sgd
    class_weight: dict[int, float] | None = None
    pieces: Callable[[tuple], list[tuple]] | None = None
    stages: tuple[Callable[[keras.Model], None] | None, ...] = (None,)
    epochs: int = 2
    backends: tuple[str, ...] = BACKENDS
    because: str = ""
    floatx: str = "float32"
    build_optimizer: bool = False

    def __str__(self):
        return self.name

    def compile(self, model, **overrides):
        """Compiles with a new optimizer; `overrides` go to its constructor."""
        model.compile(optimizer=self.optimizer(**overrides), **self.arguments())
        if self.build_optimizer:
            model.optimizer.build(model.trainable_variables)

    def cut(self, batch):
        """The pieces of one full batch, as `accum_steps` gets them."""
        return self.pieces(batch) if self.pieces else cut(batch)

    @property
    def accum_steps(self):
        """Pieces of the largest full batch; a smaller one has fewer."""
        return max(len(self.cut(batch)) for batch in self.batches())


def cut(batch, size=None):
    """Cuts every array of a batch in pieces of `size` examples, the last smaller."""
    size = size or PIECE
    count = len(keras.tree.flatten(batch)[0])
    return [
        keras.tree.map_structure(lambda a, i=i: a[i : i + size], batch)
        for i in range(0, count, size)
    ]


PROBLEMS: list[Problem] = []


def add(name, build, batches, **settings):
    PROBLEMS.append(Problem(name, build, batches, **settings))


def here():
    """The problems that the active backend, and the Keras in use, can have."""
    return [
        p
        for p in PROBLEMS
        if keras.backend.backend() in p.backends and (not KERAS_2 or _in_keras_2(p))
    ]


# What TensorFlow 2.12 does not have yet.
_SINCE_2_13 = (
    "loss_categorical_focal_crossentropy",
    "optimizer_lion",
    "schedule_warmup",
)


def _in_keras_2(problem):
    """Whether plain Keras 2 can train it."""
    return (
        # A reduction of Keras 3's.
        "mean_with_sample_weight" not in problem.name
        and not problem.name.startswith(("reduction_mean", "regularizers_of_both"))
        and not (keras.__version__.startswith("2.12.") and problem.name in _SINCE_2_13)
        and problem.name
        not in (
            # Optimizers, losses and layers of Keras 3's.
            "optimizer_lamb",
            "loss_scale_factor",
            "loss_dice_of_each_example",
            "float8_overwrite_with_gradient",
            # It adds losses of each example to a scalar, and fails.
            "add_loss_of_each_example",
            # A full batch that is masked as a whole has loss NaN.
            "fully_masked_full_batch_sum_over_batch_size",
        )
    )
