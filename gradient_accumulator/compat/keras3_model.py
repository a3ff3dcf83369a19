"""A compiled model of Keras 3: its losses, its metrics and its logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
from keras.src.losses import loss as losses
from keras.src.models.functional import Functional
from keras.src.trainers.trainer import Trainer

from gradient_accumulator.compat.attributes import with_attribute
from gradient_accumulator.compat.keras3_internals import (
    StatelessScope,
    get_stateless_scope,
    is_keras_own,
    overwrites,
)
from gradient_accumulator.compat.keras3_metrics import (
    averaging,
    is_number,
    number_weight,
    weights_of_each,
)
from gradient_accumulator.compat.model_base import CompiledModelBase

# Before Keras 3.14 an activity regularizer's loss is a sum over the examples.
_SUMS_ACTIVITY_LOSSES = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 14)


class CompiledModel(CompiledModelBase):
    """A compiled model of Keras 3."""

    functional = Functional

    @property
    def moved_by_microbatches(self) -> list:
        """The variables that forward passes move: seeds, statistics and the like.

        It leaves out the variables that frozen layers created as trainable, which may
        be most of a model.
        """
        frozen = {id(v) for layer in self.layers for v in layer._trainable_variables}
        return [v for v in self.model.non_trainable_variables if id(v) not in frozen]

    @property
    def metrics_variables(self) -> list:
        return self.model.metrics_variables

    @property
    def rounds_or_overwrites(self) -> bool:
        """Whether a factor of the loss changes its gradients by more than that factor.

        It does in half precision, which rounds, and in float8, which depends on the
        largest values so far.
        """
        return any(
            layer.compute_dtype in ("float16", "bfloat16") for layer in self.layers
        ) or any(overwrites(variable) for variable in self.model.trainable_variables)

    @property
    def steps_per_execution(self) -> int:
        """The number of updates in a call of the train function."""
        return self.model.steps_per_execution

    def count_update(self) -> None:
        """Count an update for callbacks. On Keras 3 nothing is left to do."""

    def build(self, data: Any) -> None:
        """Create the variables of the model, its losses, metrics and optimizer."""
        self.model._symbolic_build(data_batch=data)

    def build_from_values(self, data: Any) -> None:
        """Does the same as `build` for an eager model, which may branch on values."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with StatelessScope():
            y_pred = self.forward(x, training=False)
        # Weight regularizers read values from the scope.
        values = [(variable, variable.value) for variable in self.model.variables]
        with StatelessScope(state_mapping=values):
            if (
                self.model._compile_metrics is not None
                and not self.model._compile_metrics.built
            ):
                self.model.compute_metrics(x, y, y_pred, sample_weight)
            if (
                self.model._compile_loss is not None
                and not self.model._compile_loss.built
            ):
                self.model._compute_loss(x, y, y_pred, sample_weight, training=False)
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        self.model._post_build()

    @property
    def has_known_train_step(self) -> bool:
        """Whether the model's `train_step` does the same as Keras's."""
        return is_keras_own(type(self.model).train_step)

    def check_compiled(self) -> None:
        """Raise for a loss without a known denominator. On Keras 3 there is none."""

    def unpack(self, data: Any) -> tuple:
        """Returns inputs, targets and sample weights as the model takes them."""
        return keras.utils.unpack_x_y_sample_weight(data)

    def forward(self, x: Any, training: bool) -> Any:
        """Returns the model's predictions."""
        with self.summed_activity_losses():
            return (
                self.model(x, training=training)
                if self.model._call_has_training_arg
                else self.model(x)
            )

    @contextmanager
    def summed_activity_losses(self) -> Iterator[None]:
        """A context that gives activity losses an axis, if they are sums.

        `compute_loss` takes additional losses with axes as sums.
        """
        if not _SUMS_ACTIVITY_LOSSES:
            yield
            return

        def with_axis(regularizer):
            return lambda output: keras.ops.reshape(regularizer(output), (1,))

        regularized = [
            (layer, layer.activity_regularizer)
            for layer in self.layers
            if layer.activity_regularizer is not None
        ]
        for layer, regularizer in regularized:
            layer.activity_regularizer = with_axis(regularizer)
        try:
            yield
        finally:
            for layer, regularizer in regularized:
                layer.activity_regularizer = regularizer

    def _update_loss(self, loss: Any, examples: Any) -> None:
        loss = losses.unscale_loss_for_distribution(loss)
        self.model._loss_tracker.update_state(loss, sample_weight=examples)

    @property
    def metric_types(self) -> set[type]:
        """Returns the classes of the model's metrics, also of the compiled metrics."""
        return {
            type(each)
            for metric in self.model.metrics
            for each in (metric, *getattr(metric, "metrics", ()))
        }

    def means(self) -> list:
        compiled = self.model._compile_loss
        losses_own = [self.model._loss_tracker, *(compiled.metrics if compiled else [])]
        found = {
            id(each): each
            for metric in self.model.metrics
            for each in (metric, *getattr(metric, "metrics", ()))
            if isinstance(each, keras.metrics.Mean)
        }
        return [m for key, m in found.items() if key not in set(map(id, losses_own))]

    @contextmanager
    def weighing_numbers(self, weight: Any, sample_weight: Any) -> Iterator[None]:
        """A context that updates metrics: one number for a micro-batch weighs `weight`.

        Metrics have another class meanwhile, because a user's class calls Keras's by
        `super()`.

        Args:
            weight: The micro-batch's part of the batch's weight.
            sample_weight: Nested sample weights. A number among them weighs each
                example, because other micro-batches may have more examples.
        """
        means = self.means()
        classes: list[Any] = [type(metric) for metric in means]
        token = number_weight.set(weight)
        numbers = [
            each for each in keras.tree.flatten(sample_weight) if is_number(each)
        ]
        of_each = weights_of_each.set(numbers)
        for metric, cls in zip(means, classes):
            metric.__class__ = averaging(cls)
        try:
            yield
        finally:
            for metric, cls in zip(means, classes):
                metric.__class__ = cls
            weights_of_each.reset(of_each)
            number_weight.reset(token)

    def update_metrics(
        self, microbatch: tuple, loss: Any, examples: Any, share: Any
    ) -> dict:
        x, y, y_pred, sample_weight = microbatch
        with self.weighing_numbers(share, sample_weight):
            if self.has_own_metrics:
                self._update_loss(loss, examples)
                return self.model.compute_metrics(x, y, y_pred, sample_weight)
            # Keras's `compute_metrics` also computes results, which are needed only
            # once.
            if self.model._compile_metrics is not None:
                self.model._compile_metrics.update_state(y, y_pred, sample_weight)
        return {}

    def metrics_result(self) -> dict:
        """Returns the values of the model's metrics on this process's data.

        Newer versions of Keras on PyTorch sum each variable over processes.
        """
        return Trainer.get_metrics_result(self.model)

    def logs(self, own: dict, loss: Any, examples: Any) -> dict:
        """Returns the logs of an update, after its last micro-batch.

        Args:
            own: The logs that `update_metrics` returned for the last micro-batch.
            loss: The batch's loss.
            examples: The number of examples in the batch.
        """
        if self.has_own_metrics:
            return own
        self._update_loss(loss, examples)
        return self.model.get_metrics_result()

    @property
    def has_compiled_losses(self) -> bool:
        return self.model._compile_loss is not None

    @property
    def compiled_loss_is_all(self) -> bool:
        """Whether loss and logs come from compiled losses and `add_loss` alone."""
        return is_keras_own(self.model.compute_loss) and not self.has_own_metrics

    def records_shares(self, y: Any) -> bool:
        """Whether compiled losses are recorded with the micro-batch's share as weight.

        They are if there are several, because each then has an entry in the logs.
        """
        return bool(self.model._compile_loss.metrics)

    def compute_loss(
        self,
        microbatch: tuple,
        additional: list,
        share: Any,
        weigh: Callable | None,
    ) -> Any:
        # Keras sums an additional loss with axes: its sums on micro-batches add up. One
        # without axes is taken as a mean over examples.
        x, y, y_pred, sample_weight = microbatch
        additional = [
            loss / keras.ops.cast(share, loss.dtype) if len(loss.shape) else loss
            for loss in additional
        ]
        self.model._losses_override.clear()
        self.model._losses_override.extend(additional)
        try:
            with (
                self._weighed(share, weigh),
                self.weighing_numbers(share, sample_weight),
            ):
                return self.model._compute_loss(
                    x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
                )
        finally:
            self.model._losses_override.clear()

    @contextmanager
    def _weighed(self, share: Any, weigh: Callable | None) -> Iterator[None]:
        """A context of `_compute_loss`: see `compute_loss`."""
        if not self.has_compiled_losses:
            yield
            return

        def counting_once(update_state):
            # If Keras does not know the size of a batch, the batch has the weight 1,
            # and the micro-batch has its share of that.
            def update(values, sample_weight=None):
                weight = share if sample_weight is None else sample_weight
                update_state(values, sample_weight=weight)

            return update

        with ExitStack() as stack:
            for metric in self.model._compile_loss.metrics:
                update = counting_once(metric.update_state)
                stack.enter_context(with_attribute(metric, "update_state", update))
            if weigh is not None:
                stack.enter_context(self.replaced_losses(weigh))
            yield

    @contextmanager
    def replaced_losses(self, replace: Callable) -> Iterator[None]:
        compiled = self.model._compile_loss
        original = compiled._flat_losses
        compiled._flat_losses = [
            entry._replace(loss=replace(entry.loss)) for entry in original
        ]
        try:
            yield
        finally:
            compiled._flat_losses = original

    @property
    def loss_metrics(self):
        return self.model._compile_loss.metrics

    def call_losses(self, microbatch):
        x, y, y_pred, sample_weight = microbatch
        if is_keras_own(self.model.compute_loss):
            self.model._compile_loss(y, y_pred, sample_weight)
        else:
            self.zero_metrics()
            self.model._compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )

    def zero_metrics(self) -> None:
        scope = get_stateless_scope()
        for variable in self.model.metrics_variables:
            scope.add_update(
                (variable, keras.ops.zeros(variable.shape, variable.dtype))
            )
