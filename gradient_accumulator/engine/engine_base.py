"""The operations of an update, which each backend has in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from gradient_accumulator import devices
from gradient_accumulator.compat import CompiledModel, OptimizerStep, internals
from gradient_accumulator.compat.api import keras, ops
from gradient_accumulator.statistics import rewound

if TYPE_CHECKING:
    from gradient_accumulator.functional import LossFunction
    from gradient_accumulator.microbatches import Epoch
    from gradient_accumulator.settings import Accumulation
    from gradient_accumulator.update import Update


class Carry(NamedTuple):
    """The values that a loop carries from one micro-batch to the next."""

    sums: Any  # of gradients, as `Sums` holds them
    loss: Any  # the part of the batch's loss so far
    denominator: Any  # the sum so far of a loss that is divided last
    logs: Any  # of a model's own `compute_metrics`, for the last micro-batch


def times(tensor: Any, factor: Any) -> Any:
    """A tensor times a number, or times a scalar tensor of any dtype."""
    if isinstance(factor, float):  # in eager execution a conversion takes time
        return tensor * factor
    return tensor * ops.cast(factor, tensor.dtype)


class Steps(NamedTuple):
    """The functions that an update consists of, compiled where a backend compiles."""

    zeros: Callable[[], Carry]
    add: Callable[..., Carry]
    apply: Callable[[list], None]
    finish: Callable[..., dict]


class Sums:
    """Sums of gradients, an array for each variable.

    The methods take and return the arrays, which a loop may carry.

    Args:
        variables: The variables, or arrays, that the gradients are of.
        dtypes: The dtype of each sum.
    """

    def __init__(self, variables: list, dtypes: list[str]):
        self.variables = variables
        self.dtypes = dtypes
        # The places of those that some micro-batch had a gradient of.
        self.connected: set[int] = set()

    def zeros(self) -> Any:
        return [
            ops.zeros(tuple(variable.shape), dtype)
            for variable, dtype in zip(self.variables, self.dtypes)
        ]

    def clear(self) -> None:
        """Let go of what is held outside of the carry, if there is something."""

    def add(self, sums: Any, gradients: list) -> Any:
        """The sums with the gradients of one more micro-batch."""
        self.connected.update(i for i, g in enumerate(gradients) if g is not None)
        return [
            sum_ if gradient is None else self._added(sum_, gradient, variable)
            for sum_, gradient, variable in zip(sums, gradients, self.variables)
        ]

    def _added(self, sum_, gradient, variable):
        gradient = ops.cast(devices.active().dense(gradient), sum_.dtype)
        if internals.overwrites(variable):
            return ops.maximum(sum_, gradient)
        return sum_ + gradient

    def finish(self, sums: Any, scale: Any) -> list:
        """The gradients of the batch, None where no micro-batch had one.

        Args:
            sums: The sums over all micro-batches.
            scale: The number that sums are multiplied by, None for 1.
        """
        return [
            ops.cast(self._scaled(sum_, scale, variable), variable.dtype)
            if i in self.connected
            else None
            for i, (sum_, variable) in enumerate(zip(sums, self.variables))
        ]

    def _scaled(self, sum_, scale, variable):
        if scale is None or internals.overwrites(variable):
            return sum_
        return sum_ * ops.cast(scale, sum_.dtype)


class Engine(ABC):
    """An update's operations on one backend.

    The methods of this class are right for one device, in eager execution. An engine
    belongs to one model, or to one function.
    """

    # An update.

    def prepare(self, update: Update) -> None:  # noqa: B027
        """Called when an update is made, before its first call."""

    @abstractmethod
    def weigh(self, update: Update, microbatches: Any) -> Any:
        """The micro-batches of one update, each with its weight in the batch.

        Args:
            update: The update.
            microbatches: The micro-batches, as this engine draws them.
        """

    def steps(self, update: Update) -> Steps:
        """The update's functions, compiled."""
        return Steps(update.zeros, update.add, update.apply, update.finish)

    def sums(self, update: Update, weighed: Any) -> Sums:
        """How the gradients of the update are summed."""
        return Sums(update.variables, update.dtypes)

    @abstractmethod
    def fold(self, step: Callable[..., Carry], carry: Carry, weighed: Any) -> Carry:
        """Call `step` with what the micro-batch before returned, for each micro-batch.

        Args:
            step: A function of the carry, the kinds of losses, a micro-batch, its share
                of the batch's examples and the factors of its losses.
            carry: The carry for the first micro-batch.
            weighed: What `weigh` returned.
        """

    def forward(self, model: keras.Model, x: Any) -> tuple[Any, list]:
        """A model's predictions in training, and its additional losses."""
        return CompiledModel(model).forward(x, training=True), model.losses

    @abstractmethod
    def value_and_grad(
        self, function: Callable[[Any], tuple], variables: list
    ) -> tuple[list, Any]:
        """The gradients of a function, and what it returns beside the loss.

        Args:
            function: A function of the variables that returns a scalar loss and a
                nested structure.
            variables: Variables, or arrays.
        """

    def values(self, variables: list) -> list:
        """Copies of the values of variables."""
        return [ops.copy(internals.value(variable)) for variable in variables]

    def assign(self, variables: list, values: list) -> None:
        """Give variables the values that `values` returned."""
        for variable, value in zip(variables, values):
            variable.assign(value)

    @contextmanager
    def restored(self, model: keras.Model) -> Iterator[None]:
        """A context of an update: if it fails, its micro-batches have moved nothing."""
        variables = [
            *CompiledModel(model).moved_by_microbatches,
            *rewound(model),
            *self.readable_metrics(model),
        ]
        values = self.values(variables)
        try:
            yield
        except BaseException:
            self.assign(variables, values)
            raise

    def readable_metrics(self, model: keras.Model) -> list:
        """The variables of a model's metrics."""
        return CompiledModel(model).metrics_variables

    @abstractmethod
    def total(
        self, update: Update, carry: Carry, weighed: Any
    ) -> tuple[Carry, Any, bool]:
        """The carry of all devices, after the last micro-batch.

        Returns:
            The carry, the number that its sums are to be multiplied by (None for 1),
            and whether that has yet to be divided by the sum of denominators.
        """

    def finishing(self, weighed: Any, carry: Carry) -> AbstractContextManager:
        """A context of what comes after the last micro-batch."""
        return nullcontext()

    def clip(
        self, clipping: Any, optimizer: Any, variables: list, gradients: list
    ) -> list:
        """Clip the finished gradients of an update."""
        return clipping.clip_update(optimizer, variables, gradients)

    def step(self, optimizer: Any, gradients: list, variables: list) -> None:
        """One step of the optimizer, with gradients of the scaled loss."""
        OptimizerStep(optimizer).apply_scaled(gradients, variables)

    # `accumulated_value_and_grad`.

    @abstractmethod
    def accumulated(self, loss: LossFunction) -> Callable:
        """The function that `accumulated_value_and_grad` returns."""

    # `fit`.

    trained: list | None = None  # the variables that the train function is for

    def is_outdated(self, model: keras.Model) -> bool:
        """Whether the user froze layers since, or the opposite, without `compile`.

        On TensorFlow the graph stays as it is, as Keras's own does.
        """
        now = model.trainable_variables
        return self.trained is not None and list(map(id, now)) != list(
            map(id, self.trained)
        )

    @abstractmethod
    def make_train_function(self, model: keras.Model, training: Any) -> Callable:
        """The function that Keras's `fit` calls for one update or several."""

    @abstractmethod
    def batches(
        self, model: keras.Model, epoch: Epoch, accumulation: Accumulation, adapter: Any
    ) -> tuple[Callable, Callable | None]:
        """The data that Keras draws, and the data that it builds the model from.

        Args:
            model: The model.
            epoch: The position of `fit`. It gets the sizes of batches whose
                micro-batches are drawn.
            accumulation: How the model accumulates.
            adapter: Keras's adapter over the data.

        Returns:
            Two functions that Keras calls instead of the adapter's. The second is None
            where the train function builds the model.
        """

    def after_fit(self, model: keras.Model, epoch: Epoch) -> None:  # noqa: B027
        """Called at the end of `fit`."""

    def before_epoch(self, model: keras.Model, epoch: Epoch) -> None:  # noqa: B027
        """Called when Keras resets the metrics."""

    def epoch_ended(self, epoch: Epoch) -> None:  # noqa: B027
        """Called after the last update of an epoch, before Keras goes on."""

    def metrics_result(
        self, model: keras.Model, epoch: Epoch, own: Callable[[], dict]
    ) -> dict:
        """The logs.

        Args:
            model: The model.
            epoch: The position of `fit`.
            own: Keras's `get_metrics_result`.
        """
        return own()
