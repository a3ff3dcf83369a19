"""A compiled model, as far as both Kerases are alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from typing import Any

from gradient_accumulator.compat.api import is_keras_own, keras
from gradient_accumulator.compat.attributes import with_attribute

# The metrics that averaged one number for a micro-batch; None if nobody asks.
numbers_seen: ContextVar[list | None] = ContextVar("numbers_seen", default=None)


class CompiledModelBase(ABC):
    """A compiled model, with what its trainer keeps private.

    Args:
        model: The model.
    """

    functional: Any  # Keras's class of functional models

    def __init__(self, model: Any):
        self.model = model

    @property
    def layers(self) -> list:
        """The model and all its layers, at any depth."""
        return list(self.model._flatten_layers())

    @property
    def has_static_inputs(self) -> bool:
        """Whether the shapes of inputs are fixed, except for the number of examples."""
        return type(self.model).call is self.functional.call and all(
            None not in tensor.shape[1:] for tensor in self.model.inputs
        )

    @property
    def has_own_metrics(self) -> bool:
        """Whether the model has a `compute_metrics` of its own: it makes the logs."""
        return not is_keras_own(type(self.model).compute_metrics)

    def may_average_numbers(self, y_pred: Any) -> bool:
        """Whether a metric may average one number for a whole micro-batch.

        The metrics that Keras has classes for average a value for each example, if
        predictions have an axis after the first.
        """
        wrapper: Any = keras.metrics.MeanMetricWrapper
        flat = any(len(each.shape) < 2 for each in keras.tree.flatten(y_pred))
        return any(
            flat
            or type(metric) is wrapper
            or not isinstance(metric, wrapper)
            or not is_keras_own(type(metric))
            for metric in self.means()
        )

    def averages_numbers(self, microbatch: tuple, additional: list) -> bool:
        """Whether a metric averages one number for a micro-batch, found out by a call.

        On Keras 3 the call must be in a stateless scope, on Keras 2 it must be traced,
        and never run.

        Args:
            microbatch: Inputs, targets, predictions and sample weights of a
                micro-batch.
            additional: As for `compute_loss`.
        """
        self.zero_metrics()
        seen: list = []
        token = numbers_seen.set(seen)
        try:
            loss = self.compute_loss(microbatch, additional, 1.0, None)
            self.update_metrics(microbatch, loss, 1, 1.0)
        finally:
            numbers_seen.reset(token)
        return bool(seen)

    def stand_ins(self, stand_in: Callable, microbatch: tuple) -> list:
        """Compute the loss with stand-ins for the compiled losses, and record nothing.

        Each stand-in gets the outputs, targets and weights of its loss. A model's own
        `compute_loss` may change them, or call a loss several times.

        Args:
            stand_in: Function of a loss that returns a stand-in, which is called
                instead.
            microbatch: Inputs, targets, predictions and sample weights of a
                micro-batch.

        Returns:
            The stand-ins, one for each call of a loss.
        """
        made: list = []

        def replace(loss):
            def call(*args, **kwargs):
                made.append(stand_in(loss))
                return made[-1](*args, **kwargs)

            return call

        with ExitStack() as stack:
            for metric in self.loss_metrics:
                stack.enter_context(
                    with_attribute(metric, "update_state", lambda *_, **__: None)
                )
            stack.enter_context(self.replaced_losses(replace))
            self.call_losses(microbatch)
        return made

    @abstractmethod
    def means(self) -> list:
        """The model's metrics that average values, without those of losses."""

    @abstractmethod
    def zero_metrics(self) -> None:
        """Set metrics to 0 in a stateless scope, where there is one."""

    @abstractmethod
    def compute_loss(
        self, microbatch: tuple, additional: list, share: Any, weigh: Callable | None
    ) -> Any:
        """A micro-batch's loss: times `share`, it is a part of the batch's loss.

        Args:
            microbatch: The inputs, targets, predictions and sample weights.
            additional: The additional losses of the micro-batch's forward pass,
                `model.losses`.
            share: The micro-batch's part of the batch's examples.
            weigh: Function of a compiled loss that returns the function to call
                instead; or None to call the losses themselves.
        """

    @abstractmethod
    def update_metrics(
        self, microbatch: tuple, loss: Any, examples: Any, share: Any
    ) -> dict:
        """Add a micro-batch to the metrics.

        Args:
            microbatch: The inputs, targets, predictions and sample weights.
            loss: The micro-batch's loss.
            examples: The number of its examples.
            share: Its part of the batch's examples.

        Returns:
            The logs, if the model has its own `compute_metrics`; else an empty
            dictionary.
        """

    @property
    @abstractmethod
    def loss_metrics(self) -> list:
        """The metrics that record each compiled loss."""

    @abstractmethod
    def replaced_losses(self, replace: Callable) -> AbstractContextManager:
        """A context in which `replace(loss)` stands in for each compiled loss."""

    @abstractmethod
    def call_losses(self, microbatch: tuple) -> None:
        """Compute the loss of a micro-batch, and nothing else."""
