"""`GradientAccumulateOptimizer` on Keras 2, around new optimizers and legacy ones.

Keras 2 unscales the gradients of every micro-batch, so that the sums are never scaled.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any

import tensorflow as tf

from gradient_accumulator.accumulator import (
    ELSEWHERE,
    Accumulator,
    check_not_accumulating,
    check_variables,
)
from gradient_accumulator.agc import AdaptiveClipping
from gradient_accumulator.arguments import names_arguments
from gradient_accumulator.compat import keras2_internals as internals
from gradient_accumulator.compat.keras2_names import keras
from gradient_accumulator.compat.keras2_step import OptimizerStep
from gradient_accumulator.optimizer_checks import check_settings
from gradient_accumulator.received import described
from gradient_accumulator.settings import positive_int

_LossScaleOptimizer = keras.mixed_precision.LossScaleOptimizer


@keras.saving.register_keras_serializable("gradient_accumulator")
class GradientAccumulateOptimizer(Accumulator, keras.optimizers.Optimizer):
    """An optimizer that updates the weights on every `accum_steps`-th call.

    It sums the gradients that it is given, one call for each micro-batch of a batch,
    and hands the finished sum to the optimizer that it wraps. The class of the same
    name for Keras 3 describes the rest. It has the same arguments and methods, and also
    `apply` and the stateless methods, which Keras 2 does not have.

    Args:
        optimizer: The optimizer to wrap: a name, a config, or any optimizer of Keras 2,
            also one of `tf.keras.optimizers.legacy`.
        accum_steps: Positive int, the number of calls that make an update.
        reduction: `"MEAN"` or `"SUM"` of the micro-batches' gradients.
        name: Name of the optimizer.
        accum_dtype: Name of the float dtype in which gradients are summed.
        use_agc: Whether to clip the finished gradient adaptively.
        clip_factor: Positive number, of adaptive clipping.
        eps: Positive number, of adaptive clipping.
        agc_exclude: The variables that are not clipped.

    Raises:
        TypeError: If `accum_steps` is no int, or `optimizer` no optimizer of Keras 2.
        ValueError: If `accum_steps` is not positive, `reduction` or `accum_dtype` is
            unknown, or `optimizer` accumulates already.

    Example:

    ```python
    optimizer = GradientAccumulateOptimizer(tf.keras.optimizers.Adam(), accum_steps=4)
    model.compile(optimizer, "mse")
    model.fit(x, y, batch_size=8, callbacks=[FlushGradients()])
    ```
    """

    @names_arguments(**ELSEWHERE)
    def __init__(
        self,
        optimizer: Any = "SGD",
        accum_steps: int = 1,
        reduction: str = "MEAN",
        name: str = "GradientAccumulateOptimizer",
        *,
        accum_dtype: str = "float32",
        use_agc: bool = False,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        agc_exclude: Any = None,
    ):
        accum_steps = positive_int("accum_steps", accum_steps)
        check_settings(reduction, accum_dtype)
        clipping = AdaptiveClipping(clip_factor, eps, agc_exclude) if use_agc else None
        inner = _optimizer(optimizer)
        super().__init__(name=name)
        self._built = False
        self._wrapped = False
        self._remember([])
        self._set_up(inner, accum_steps, reduction, accum_dtype, clipping)
        # The optimizer that TensorFlow restores from a file reads this attribute.
        self._iterations = inner.iterations

    # ------------------------------------------------------------------ applying

    def compute_gradients(self, loss, var_list, tape=None):
        inner, var_list = self.inner_optimizer, list(var_list)
        if not isinstance(inner, _LossScaleOptimizer):
            return super().compute_gradients(loss, var_list, tape)
        tape = tf.GradientTape() if tape is None else tape
        with tape:
            loss = inner.get_scaled_loss(loss)
        gradients, variables = zip(*super().compute_gradients(loss, var_list, tape))
        return list(zip(inner.get_unscaled_gradients(gradients), variables))

    def get_scaled_loss(self, loss):
        """Calls the wrapped `LossScaleOptimizer`, for loops of your own."""
        return self.inner_optimizer.get_scaled_loss(loss)

    def get_unscaled_gradients(self, gradients):
        """Calls the wrapped `LossScaleOptimizer`, for loops of your own."""
        return self.inner_optimizer.get_unscaled_gradients(gradients)

    def apply_gradients(
        self,
        grads_and_vars,
        name=None,
        skip_gradients_aggregation=False,
        weight=None,
        **kwargs,
    ):
        """Add a micro-batch's gradients. After the last micro-batch, apply the sum.

        Args:
            grads_and_vars: Pairs of a gradient, or None, and its variable, the same
                variables in every call of an update.
            name: Not used.
            skip_gradients_aggregation: Whether replicas have summed the gradients
                before. It is an error if they have.
            weight: The weight of the micro-batch, a number or a scalar tensor that is
                not negative. If not given, 1. A micro-batch of weight 0 adds nothing,
                even if its gradient is not finite.

        Returns:
            The number of updates so far.

        Raises:
            ValueError: If variables change before the update is complete, or replicas
                have summed the gradients.
        """
        pairs = list(grads_and_vars)
        aggregated = skip_gradients_aggregation or not kwargs.pop(
            "experimental_aggregate_gradients", True
        )
        if self._finishing:
            # The optimizer around this one has checked and reduced the finished sum.
            OptimizerStep(self.inner_optimizer).apply(pairs, aggregated)
        elif aggregated and tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise ValueError(
                "Give each replica's own gradients, which are reduced once an update. "
                "Received: skip_gradients_aggregation=True"
            )
        elif self._scaler() is not None:
            raise ValueError(
                "This optimizer is inside of a `LossScaleOptimizer`: give that one the "
                "gradients. Received: a call of the inner one"
            )
        else:
            self._accumulate_pairs(pairs, weight)
        return self.iterations

    def _accumulate_pairs(self, pairs, weight=None, **_):
        pairs = list(pairs)
        if pairs:
            gradients, variables = zip(*pairs)
            self._accumulate(gradients, variables, weight)

    def build(self, var_list):
        """Create the accumulators, and the variables of the wrapped optimizer."""
        if self._built:
            return
        variables = list(var_list)
        check_variables("var_list", variables)
        self._build_index_dict(variables)
        self._remember(variables)
        with tf.init_scope():
            self._build_accumulators(variables)
            OptimizerStep(self.inner_optimizer).build(variables)
        self._built = True

    def _remember(self, variables):
        # The optimizer's own `__setattr__` would save them with it.
        object.__setattr__(self, "_trainable_variables", variables)
        indices = {self._var_key(v): i for i, v in enumerate(variables)}
        object.__setattr__(self, "_trainable_variables_indices", indices)

    @property
    def built(self):
        return self._built

    def _is_built(self):
        return self._built

    def _new_counter(self, name, shape):
        return OptimizerStep(self).add_variable(
            shape,
            "int32",
            name,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def _scales(self, optimizer):
        return None

    def _get_variable_index(self, variable):
        return self._index_dict[self._var_key(variable)]

    def update_step(self, gradient, variable):
        raise NotImplementedError("The wrapped optimizer updates variables.")

    # ---------------------------------------------- a `LossScaleOptimizer` around

    @property
    def _is_wrapped_by_loss_scale_optimizer(self):
        return self._wrapped

    @_is_wrapped_by_loss_scale_optimizer.setter
    def _is_wrapped_by_loss_scale_optimizer(self, wrapped):
        # A `LossScaleOptimizer` does nothing else to its inner optimizer.
        self._wrapped = wrapped
        scaler = _scaler_that_calls(self)
        if scaler is None:
            return
        # A model compiled under mixed_float16 has the scaler as its optimizer.
        scaler.flush, scaler.reset = self.flush, self.reset
        if isinstance(self.inner_optimizer, _LossScaleOptimizer):
            # Under mixed_float16 Keras puts a second one around. The inner one scales.
            scaler.get_scaled_loss = self.get_scaled_loss
            scaler.get_unscaled_gradients = self.get_unscaled_gradients
            scaler.compute_gradients = self.compute_gradients
            scaler.apply_gradients = self.apply_gradients
            return
        # It would drop a micro-batch that is not finite, and count it. With the
        # finished sum it does what it does on a batch.
        self._scaler = weakref.ref(scaler)
        scaler.apply_gradients = self._accumulate_pairs

    # ------------------------------------------ attributes of the wrapped optimizer

    def _create_iteration_variable(self):
        """Creates no variable, because the wrapped optimizer counts updates."""

    @property
    def optimizer(self):
        """The wrapped optimizer."""
        return self.inner_optimizer

    @property
    def variables(self):
        own = [*self._variables, *self.inner_optimizer.variables()]
        return _CallableList(own)

    @property
    def iterations(self):
        """The number of updates."""
        return self.inner_optimizer.iterations

    @iterations.setter
    def iterations(self, variable):
        self.inner_optimizer.iterations = variable

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def lr(self):
        return self.learning_rate

    @lr.setter
    def lr(self, learning_rate):
        self.learning_rate = learning_rate

    def finalize_variable_values(self, var_list):
        # Legacy optimizers have no averages of the weights.
        if hasattr(self.inner_optimizer, "finalize_variable_values"):
            self.inner_optimizer.finalize_variable_values(list(var_list))

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    # -------------------------------------------------------------------- saving

    def set_weights(self, weights):
        """Set the values of `variables`."""
        if not self._built:
            raise ValueError(
                "The optimizer must be built before its weights are set: call "
                "`build(trainable_variables)`. Received: an optimizer that is not built"
            )
        variables = self.variables
        if len(weights) != len(variables):
            raise ValueError(
                f"Argument `weights` must be a list of {len(variables)} arrays, one "
                f"for each variable. Received: a list of {len(weights)}"
            )
        for variable, weight in zip(variables, weights):
            variable.assign(weight)
        self._loaded()

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self._loaded()

    def get_config(self):
        config = {
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "accum_steps": self.accum_steps,
            "reduction": self.reduction,
            "name": self.name,
            "accum_dtype": self.accum_dtype,
        }
        if self._clipping is not None:
            config["use_agc"] = True
            known = self._trainable_variables if self._built else None
            config.update(self._clipping.get_config(known))
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        if isinstance(config["optimizer"], dict):
            config["optimizer"] = _deserialized(config["optimizer"], custom_objects)
        return cls(**config)


# The name that version 0.5 saved, and the name that a `LossScaleOptimizer` looks for.
keras.utils.get_custom_objects().update(
    {
        "gradient-accumulator>GradientAccumulateOptimizer": GradientAccumulateOptimizer,
        "GradientAccumulateOptimizer": GradientAccumulateOptimizer,
    }
)


def _deserialized(config: dict, custom_objects: Any) -> Any:
    made = keras.optimizers.deserialize(copy.deepcopy(config), custom_objects)
    if internals.is_optimizer(made):
        return made
    # `keras.optimizers.deserialize` returns the names of AdamW, Adafactor and Lion.
    return keras.saving.deserialize_keras_object(config, custom_objects)


class _CallableList(list):
    """A list of variables that can be called.

    `variables` is a property of new optimizers, and a method of legacy ones.
    """

    def __call__(self):
        return self


def _optimizer(identifier: Any) -> Any:
    if isinstance(identifier, (str, dict)):
        try:
            identifier = keras.optimizers.get(identifier)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                "Argument `optimizer` must be a Keras 2 optimizer, its name or its "
                f"config. {error} Received: optimizer={described(identifier)}"
            ) from error
    if not internals.is_optimizer(identifier):
        raise TypeError(
            "Argument `optimizer` must be a Keras 2 optimizer, its name or its config. "
            f"Received: optimizer={described(identifier)} (of type {type(identifier)})"
        )
    check_not_accumulating(identifier, "The optimizer accumulates already.")
    return identifier


def _scaler_that_calls(optimizer: Any) -> Any:
    """Returns the `LossScaleOptimizer` around `optimizer`, if it is being made."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if (
            isinstance(caller, _LossScaleOptimizer)
            and caller.__dict__.get("_optimizer") is optimizer
        ):
            return caller
        frame = frame.f_back
    return None
