"""A compiled model of Keras 2: its losses, its metrics and its logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import tensorflow as tf

from gradient_accumulator.compat import keras2_hugging_face as hugging_face
from gradient_accumulator.compat.attributes import with_attribute
from gradient_accumulator.compat.keras2_internals import (
    Functional,
    is_keras_own,
)
from gradient_accumulator.compat.keras2_metrics import (
    Reduce,
    averaging,
    number_weight,
    weighing_number,
)
from gradient_accumulator.compat.keras2_names import keras
from gradient_accumulator.compat.model_base import CompiledModelBase


def _weighing_once(update_state, share, once):
    """Returns an `update_state` that gives a micro-batch its part of a batch's weight.

    Args:
        update_state: The method of a loss's metric.
        share: The micro-batch's part of the batch's examples.
        once: Whether a batch has the weight 1, and not its number of examples.
    """

    def update(value, sample_weight=None):
        if not len(value.shape):
            sample_weight = share if once or sample_weight is None else sample_weight
        elif sample_weight is not None:
            # Keras weighs each value by the number of examples in the batch.
            sample_weight = tf.cast(sample_weight, value.dtype)
            sample_weight /= tf.cast(share, value.dtype)
        return update_state(value, sample_weight=sample_weight)

    return update


class _InPlaceOf:
    """A stand-in for a compiled loss, with the `reduction` that Keras reads.

    Args:
        loss: The compiled loss.
        function: The function that is called instead.
    """

    def __init__(self, loss: Any, function: Callable):
        self.reduction = loss.reduction
        self.function = function

    def __call__(self, y_true, y_pred, sample_weight=None):
        return self.function(y_true, y_pred, sample_weight)


class CompiledModel(CompiledModelBase):
    """A compiled model of Keras 2."""

    functional = Functional

    @property
    def moved_by_microbatches(self) -> list:
        """The variables that forward passes move: seeds, statistics and the like.

        It leaves out the variables that frozen layers created as trainable, which may
        be most of a model.
        """
        return [v for v in self.model.non_trainable_variables if not v.trainable]

    @property
    def metrics_variables(self) -> list:
        return [v for metric in self.model.metrics for v in metric.variables]

    @property
    def rounds_or_overwrites(self) -> bool:
        """Whether a factor of the loss changes its gradients by more than that factor.

        It does in half precision, which rounds.
        """
        return any(
            getattr(layer, "compute_dtype", None) in ("float16", "bfloat16")
            for layer in self.layers
        )

    @property
    def steps_per_execution(self) -> int:
        """The number of updates in a call of the train function."""
        return self.model._steps_per_execution.numpy().item()

    def count_update(self) -> None:
        """Count an update in the counter that Keras keeps for callbacks."""
        self.model._train_counter.assign_add(1)

    def build(self, data: Any) -> None:
        """Create the variables of the model, its losses and metrics.

        Args:
            data: Nested `tf.TensorSpec`s of a micro-batch.
        """
        if self._is_built():
            return

        def run(data):
            tf.distribute.get_strategy().run(self._evaluate, args=(data,))

        # The function is traced and never run. The variables that it makes stay.
        specs = tf.nest.map_structure(
            lambda leaf: (
                None if leaf is None else tf.TensorSpec(leaf.shape, leaf.dtype)
            ),
            data,
        )
        tf.function(run, autograph=False).get_concrete_function(specs)

    def build_from_values(self, data: Any) -> None:
        """Does the same as `build` for an eager model, which may branch on values."""
        if not self._is_built():
            self._evaluate(data)
            self.model.reset_metrics()

    def _is_built(self):
        containers = self.model.compiled_loss, self.model.compiled_metrics
        return self.model.built and all(
            each is None or each.built for each in containers
        )

    def _evaluate(self, data):
        x, y, sample_weight = self.unpack(data)
        y_pred = self.forward(x, training=False)
        self.model.compute_loss(x, *self._of_loss(y, y_pred, sample_weight))
        self.model.compute_metrics(x, *self._of_metrics(y, y_pred), sample_weight)

    @property
    def has_known_train_step(self) -> bool:
        """Whether the model's `train_step` is known: Keras's, or that of Hugging Face.

        `keras2_hugging_face.py` adds the steps of Hugging Face.
        """
        return is_keras_own(type(self.model).train_step) or hugging_face.is_one(
            self.model
        )

    def check_compiled(self) -> None:
        """Raise unless the model is compiled, with a loss of a known denominator."""
        self.model._assert_compile_was_called()
        if hugging_face.has_own_loss(self.model):
            hugging_face.check_own_loss(self.model)

    def unpack(self, data: Any) -> tuple:
        """Returns inputs, targets and sample weights as the model takes them."""
        if hugging_face.is_one(self.model):
            return hugging_face.unpack(self.model, data)
        return keras.utils.unpack_x_y_sample_weight(data)

    def forward(self, x: Any, training: bool) -> Any:
        """Returns the model's predictions."""
        if hugging_face.has_own_loss(self.model):
            return hugging_face.with_own_loss(self.model, x, training)
        return self.model(x, training=training)

    def _of_metrics(self, y, y_pred):
        """Returns the targets, and the outputs that metrics compare them with."""
        if hugging_face.is_one(self.model):
            return hugging_face.matched(y, y_pred)
        return y, y_pred

    def _of_loss(self, y, y_pred, sample_weight):
        """Returns targets, outputs and sample weights for the compiled losses."""
        if hugging_face.has_own_loss(self.model):
            return *hugging_face.own_loss(
                self.model, y_pred, sample_weight
            ), sample_weight
        return *self._of_metrics(y, y_pred), sample_weight

    def means(self) -> list:
        losses_own = (
            self.model.compiled_loss.metrics if self.model.compiled_loss else []
        )
        known = set(map(id, losses_own))
        return [
            metric
            for metric in self.model.metrics
            if isinstance(metric, keras.metrics.Mean) and id(metric) not in known
        ]

    @contextmanager
    def weighing_numbers(self, weight: Any) -> Iterator[None]:
        """A context that updates metrics: one number for a micro-batch weighs `weight`.

        Metrics of a user's class have another class meanwhile, because that class calls
        Keras's by `super()`. Metrics of Keras's classes have another method, because
        their constructor bound it.
        """
        token = number_weight.set(weight)
        with ExitStack() as stack:
            stack.callback(number_weight.reset, token)
            for metric in self.means():
                cls: Any = type(metric)
                if cls.update_state is not Reduce.update_state:
                    stack.callback(setattr, metric, "__class__", cls)
                    metric.__class__ = averaging(cls)
                    continue
                update = weighing_number(metric.update_state)
                stack.enter_context(with_attribute(metric, "update_state", update))
            yield

    def update_metrics(
        self, microbatch: tuple, loss: Any, examples: Any, share: Any
    ) -> dict:
        x, y, y_pred, sample_weight = microbatch
        with self.weighing_numbers(share):
            if self.has_own_metrics:
                return self.model.compute_metrics(x, y, y_pred, sample_weight)
            y, y_pred = self._of_metrics(y, y_pred)
            self.model.compiled_metrics.update_state(y, y_pred, sample_weight)
        return {}

    def logs(self, own: dict, loss: Any, examples: Any) -> dict:
        """Returns the logs of an update, after its last micro-batch."""
        return own if self.has_own_metrics else self.model.get_metrics_result()

    @property
    def compiled_loss_is_all(self) -> bool:
        """Whether compiled losses and `add_loss` alone determine the loss and the logs.

        On Keras 2 this is never assumed: the log records the loss of each micro-batch
        with the weight of that micro-batch.
        """
        return False

    @property
    def has_compiled_losses(self) -> bool:
        return self.model.compiled_loss is not None and self.model.compiled_loss.built

    def records_shares(self, y: Any) -> bool:
        """Whether compiled losses are recorded with the micro-batch's share as weight.

        They are if there are no targets, from which Keras 2 takes the number of
        examples, and if a model's own loss replaces them.
        """
        own = hugging_face.has_own_loss(self.model)
        return y is None or (own and hugging_face.is_mean_of_labels(self.model))

    def compute_loss(
        self, microbatch: tuple, additional: list, share: Any, weigh: Callable | None
    ) -> Any:
        x, y, y_pred, sample_weight = microbatch
        once = self.records_shares(y)
        y, y_pred, sample_weight = self._of_loss(y, y_pred, sample_weight)
        with ExitStack() as stack:
            for metric in (
                self.model.compiled_loss.metrics if self.model.compiled_loss else ()
            ):
                update = _weighing_once(metric.update_state, share, once)
                stack.enter_context(with_attribute(metric, "update_state", update))
            if weigh is not None:
                stack.enter_context(self.replaced_losses(weigh))
            stack.enter_context(self.weighing_numbers(share))
            loss = self.model.compute_loss(x, y, y_pred, sample_weight)
        self.model._validate_target_and_loss(y, loss)
        return loss

    @contextmanager
    def replaced_losses(self, replace: Callable) -> Iterator[None]:
        compiled = self.model.compiled_loss
        losses = [
            None if loss is None else _InPlaceOf(loss, replace(loss))
            for loss in compiled._losses
        ]
        with with_attribute(compiled, "_losses", losses):
            yield

    @property
    def loss_metrics(self):
        return self.model.compiled_loss.metrics

    def call_losses(self, microbatch):
        x, y, y_pred, sample_weight = microbatch
        if is_keras_own(self.model.compute_loss) or hugging_face.is_one(self.model):
            self.model.compiled_loss(*self._of_loss(y, y_pred, sample_weight))
        else:
            with self._metrics_kept(), self.weighing_numbers(1.0):
                self.model.compute_loss(x, y, y_pred, sample_weight)

    def zero_metrics(self):
        """There is no stateless scope on Keras 2."""

    @contextmanager
    def _metrics_kept(self):
        """A context that restores the metrics in the end, if it runs eagerly."""
        if not tf.executing_eagerly():
            yield
            return
        variables = self.metrics_variables
        before = [variable.read_value() for variable in variables]
        yield
        for variable, value in zip(variables, before):
            variable.assign(value)
