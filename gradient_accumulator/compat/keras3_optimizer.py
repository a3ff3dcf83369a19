"""`GradientAccumulateOptimizer`: it accumulates in a training loop of your own."""

from __future__ import annotations

import inspect
import weakref
from functools import partial
from typing import Any

import keras
from keras import ops

from gradient_accumulator.accumulator import (
    ELSEWHERE,
    Accumulator,
    check_not_accumulating,
    check_variables,
)
from gradient_accumulator.agc import AdaptiveClipping
from gradient_accumulator.arguments import names_arguments
from gradient_accumulator.optimizer_checks import check_settings
from gradient_accumulator.received import check_of_backend, described
from gradient_accumulator.settings import positive_int


@keras.saving.register_keras_serializable("gradient_accumulator")
class GradientAccumulateOptimizer(Accumulator, keras.optimizers.Optimizer):
    """An optimizer that updates the weights on every `accum_steps`-th call.

    It sums the gradients that it is given, one call for each micro-batch of a batch,
    and hands the finished sum to the optimizer that it wraps:

        gradient = sum_k weight_k * gradient_k / sum_k weight_k      reduction="MEAN"
        gradient = sum_k weight_k * gradient_k                       reduction="SUM"

    The wrapped optimizer runs only then: clipping, weight decay, averages of the
    weights, constraints, learning-rate schedules, momentums and `iterations` see
    updates, and no micro-batches. It is for training loops of your own (a custom
    `train_step`, or a loop with `tf.GradientTape`, `jax.jit` or PyTorch). If `fit`
    trains the model, use `accumulate`, which is faster, and exact in more cases.

    **What an optimizer cannot know.** It sees gradients, but not the numbers that the
    losses were divided by. Here all micro-batches weigh the same. Their mean is that of
    the batch if all have as many examples, and if no mask, `ignore_class` or
    `reduction="mean_with_sample_weight"` makes a loss a mean over fewer values. A loss
    with `reduction="sum"` needs `reduction="SUM"` here, and regularizers then count
    once a micro-batch. `accumulate` is exact in all these cases; in a loop of your own,
    give each micro-batch its `weight`.

    If an epoch's last micro-batches are fewer than `accum_steps`, they wait for the
    next epoch. The callback `FlushGradients` applies them at the epoch's end, and
    `flush` applies them at any time.

    **Loss scaling.** A `LossScaleOptimizer` may be inside of this optimizer or around
    it; under the policy `mixed_float16` Keras itself puts one around it. All gradients
    of an update then have the same scale. If one is not finite, the whole update is
    skipped, and the scale is lowered once. A `LossScaleOptimizer` around it has `flush`
    and `reset` too, and takes a `weight` in `apply` and `stateless_apply`, but not in
    `apply_gradients`; its `inner_optimizer` has `pending`.

    **Sparse gradients.** On TensorFlow, the sparse gradients of embeddings are added to
    a dense sum, which merges rows that occur several times. Keras's optimizers do not
    merge them: they square each of the rows, and not their sum.

    Args:
        optimizer: The optimizer to wrap: a name, a config, or any Keras 3 optimizer.
        accum_steps: Positive int, the number of calls that make an update.
        reduction: `"MEAN"` or `"SUM"` of the micro-batches' gradients.
        name: Name of the optimizer.
        accum_dtype: Name of the float dtype in which gradients are summed (gradients of
            float64 variables are always summed in float64).
        use_agc: Whether to clip the finished gradient adaptively, before the wrapped
            optimizer sees it: see `adaptive_clip_grad`.
        clip_factor: Positive number, of adaptive clipping.
        eps: Positive number, of adaptive clipping.
        agc_exclude: The variables that are not clipped, as for `adaptive_clip_grad`.

    Raises:
        TypeError: If `accum_steps` is no int, or `optimizer` no optimizer of Keras 3.
        ValueError: If `accum_steps` is not positive, `reduction` or `accum_dtype` is
            unknown, or `optimizer` accumulates already.

    Example:

    ```python
    optimizer = GradientAccumulateOptimizer("adam", accum_steps=4)
    model.compile(optimizer, "mse")
    model.fit(x, y, batch_size=8, callbacks=[FlushGradients()])
    ```

    In a loop of your own, here on PyTorch, with micro-batches of different weights:

    ```python
    for tokens, labels in microbatches:
        loss = mean_loss_of_tokens(model(tokens), labels)
        model.zero_grad()
        loss.backward()
        gradients = [v.value.grad for v in model.trainable_variables]
        with torch.no_grad():
            optimizer.apply(
                gradients, model.trainable_variables, weight=(labels != PAD).sum()
            )
    ```
    """

    @names_arguments(**ELSEWHERE)
    def __init__(
        self,
        optimizer: Any = "SGD",
        accum_steps: int = 1,
        reduction: str = "MEAN",
        name: str | None = None,
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
        super().__init__(learning_rate=0.0, name=name)
        self._set_up(inner, accum_steps, reduction, accum_dtype, clipping)

    # ------------------------------------------------------------------ applying

    def apply(self, grads, trainable_variables=None, weight=None):
        """Add a micro-batch's gradients. After the last micro-batch, apply the sum.

        Args:
            grads: List with one gradient, or None, for each variable.
            trainable_variables: The variables, the same in every call of an update. If
                not given, those that the optimizer was built with.
            weight: The weight of the micro-batch, a number or a scalar tensor that is
                not negative: the number that its loss was divided by, such as its
                number of tokens. If not given, 1. A micro-batch of weight 0 adds
                nothing, even if its gradient is not finite.

        Raises:
            ValueError: If variables change before the update is complete, or gradients
                do not fit them. Nothing has been added then.
        """
        if self._finishing:
            # The optimizer around this one has checked and unscaled the finished sum.
            self.inner_optimizer.apply(grads, trainable_variables)
            return
        self._check_outermost()
        self._accumulate(grads, trainable_variables, weight)

    def apply_gradients(self, grads_and_vars, weight=None):
        """Does the same as `apply`, from pairs of a gradient and its variable.

        Returns:
            The number of updates so far.
        """
        grads, trainable_variables = zip(*grads_and_vars)
        self.apply(grads, trainable_variables, weight=weight)
        return self.iterations

    def stateless_apply(
        self, optimizer_variables, grads, trainable_variables, weight=None
    ):
        """Does the same as `apply`, without side effects: for `jax.jit`.

        The update is in a loop that runs once or not at all. JAX can differentiate
        through it in forward mode, but not in reverse mode.

        Args:
            optimizer_variables: List of the values of `variables`.
            grads: As for `apply`.
            trainable_variables: List of the values of the variables that the optimizer
                was built with.
            weight: As for `apply`.

        Returns:
            The new values of the trainable variables, and of the optimizer's variables.
        """
        if self._finishing:
            own = len(self._variables)
            trainable_variables, inner = self.inner_optimizer.stateless_apply(
                optimizer_variables[own:], grads, trainable_variables
            )
            kept = [ops.convert_to_tensor(v) for v in optimizer_variables[:own]]
            return trainable_variables, [*kept, *inner]
        self._check_outermost()
        return self._stateless_accumulate(
            optimizer_variables, grads, trainable_variables, weight
        )

    def stateless_flush(self, optimizer_variables, trainable_variables):
        """Does the same as `flush`, without side effects: for `jax.jit`.

        Args, returns: As in `stateless_apply`.
        """
        return self._stateless(self.flush, optimizer_variables, trainable_variables)

    def build(self, variables) -> None:
        """Create the accumulators, and the variables of the wrapped optimizer."""
        if self.built:
            return
        # Keras before 3.10 does not set `loss_scale_factor` of the inner optimizer.
        self._look_for_scaler()
        variables = list(variables)
        check_variables("variables", variables)
        self._build_accumulators(variables)
        self.inner_optimizer.build(variables)
        super().build(variables)

    def _new_counter(self, name, shape):
        return self.add_variable(
            shape, dtype="int", name=name, aggregation="only_first_replica"
        )

    def _scales(self, optimizer):
        return optimizer

    def _stateless_accumulate(
        self, optimizer_variables, grads, trainable_variables, weight=None
    ):
        return self._stateless(
            partial(self._accumulate, grads, weight=weight),
            optimizer_variables,
            trainable_variables,
        )

    def _stateless(self, function, optimizer_variables, trainable_variables):
        root = self._scaler() or self
        if not root.built:
            raise ValueError(
                "The optimizer must be built before it is used without effects: call "
                "`optimizer.build(trainable_variables)`. Received: an optimizer "
                "without variables"
            )
        optimizer_variables = list(optimizer_variables)
        trainable_variables = list(trainable_variables)
        check_of_backend("trainable_variables", trainable_variables)
        for name, values, of in (
            ("optimizer_variables", optimizer_variables, root.variables),
            ("trainable_variables", trainable_variables, self._trainable_variables),
        ):
            if len(values) != len(of):
                raise ValueError(
                    f"Argument `{name}` must be a list of {len(of)} tensors, one for "
                    "each variable that the optimizer was built with. Received: a "
                    f"list of {len(values)}"
                )
        variables = [*self._trainable_variables, *root.variables]
        values = self._engine.stateless([*trainable_variables, *optimizer_variables])
        with keras.StatelessScope(state_mapping=list(zip(variables, values))) as scope:
            function()
        new = [scope.get_current_value(v) for v in variables]
        return new[: len(trainable_variables)], new[len(trainable_variables) :]

    def _check_outermost(self):
        if self._scaler() is not None:
            raise ValueError(
                "This optimizer is inside of a `LossScaleOptimizer`: give that one the "
                "gradients of the scaled loss, and call its `build` before. "
                "Received: a call of the inner one"
            )

    # ------------------------------------------ attributes of the wrapped optimizer

    @property
    def variables(self):
        return self._variables + self.inner_optimizer.variables

    @property
    def iterations(self):
        """The number of updates."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def lr(self):
        """`learning_rate`, for callbacks of Keras 2 that look for this name."""
        return self.learning_rate

    @lr.setter
    def lr(self, learning_rate):
        self.learning_rate = learning_rate

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(list(var_list))

    @property
    def _model_variables_moving_average(self):
        # Keras's `SwapEMAWeights` reads it, also through a `LossScaleOptimizer`.
        return self.inner_optimizer._model_variables_moving_average

    @property
    def loss_scale_factor(self):
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor):
        if "inner_optimizer" in self.__dict__:  # else Keras's constructor is running
            self.inner_optimizer.loss_scale_factor = factor

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "loss_scale_factor" and "inner_optimizer" in self.__dict__:
            # A `LossScaleOptimizer` does nothing else to its inner optimizer. This is
            # not in the setter, which Keras on TensorFlow does not call for an equal
            # value.
            self._look_for_scaler()

    def _look_for_scaler(self):
        scaler = _scaler_that_calls(self)
        if scaler is not None and self._scaler() is not scaler:
            self._let_scale(scaler)

    def _let_scale(self, scaler):
        """Give the `LossScaleOptimizer` around this optimizer the finished sum only.

        It would silently drop a micro-batch that is not finite. With the finished sum
        of scaled gradients it does what it does on a batch.
        """
        # A model compiled under mixed_float16 has the scaler as its optimizer.
        scaler.flush, scaler.reset = self.flush, self.reset
        if isinstance(self.inner_optimizer, keras.optimizers.LossScaleOptimizer):
            # Under mixed_float16 Keras puts a second one around. The inner one scales.
            scaler.scale_loss = self.scale_loss
            scaler.apply = self.apply
            scaler.stateless_apply = partial(_stateless_apply_inside, self)
            return
        # A weak reference, because Keras would save the outer optimizer with this one.
        self._scaler = weakref.ref(scaler)
        scaler.apply = self._accumulate
        scaler.stateless_apply = self._stateless_accumulate
        for name in ("_tf_apply", "_common_apply"):
            # Keras before 3.10 may be in `apply` already, which calls one of these.
            setattr(scaler, name, partial(self._scaled, getattr(scaler, name)))

    def _scaled(self, apply, grads, trainable_variables):
        """Replaces a method `apply` of the scaler, which gets the finished sum only."""
        if self._finishing:
            apply(grads, trainable_variables)
        else:
            self._accumulate(grads, trainable_variables)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    # -------------------------------------------------------------------- saving

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
            config |= self._clipping.get_config(
                self._trainable_variables if self.built else None
            )
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        config["optimizer"] = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return cls(**config)

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self._loaded()


def _optimizer(identifier: Any) -> keras.optimizers.Optimizer:
    modules = [cls.__module__ for cls in type(identifier).__mro__]
    advice = "a Keras 3 optimizer, its name or its config."
    if any(module.startswith("torch.optim") for module in modules):
        advice += (
            " This is an optimizer of PyTorch's: in a loop of your own, take the "
            "gradients from `accumulated_value_and_grad`."
        )
    elif any(
        module.startswith(("tf_keras.", "keras.optimizers.", "tensorflow.python.keras"))
        for module in modules
    ):
        advice += " This is an optimizer of Keras 2's: make it with `import keras`."
    elif isinstance(identifier, keras.optimizers.Optimizer):
        check_not_accumulating(identifier, "The optimizer accumulates already.")
        return identifier
    elif isinstance(identifier, (str, dict)):
        try:
            return _optimizer(keras.optimizers.get(identifier))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"Argument `optimizer` must be {advice} {error} "
                f"Received: optimizer={described(identifier)}"
            ) from error
    raise TypeError(
        f"Argument `optimizer` must be {advice} "
        f"Received: optimizer={described(identifier)} (of type {type(identifier)})"
    )


def _scaler_that_calls(optimizer) -> keras.optimizers.LossScaleOptimizer | None:
    """Returns the `LossScaleOptimizer` around `optimizer`, if it is calling.

    An optimizer has no reference to the one around it: the stack is searched.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if (
            isinstance(caller, keras.optimizers.LossScaleOptimizer)
            and caller.__dict__.get("inner_optimizer") is optimizer
        ):
            return caller
        frame = frame.f_back
    return None


def _stateless_apply_inside(
    optimizer, optimizer_variables, grads, trainable_variables, weight=None
):
    """`stateless_apply` of a `LossScaleOptimizer` around one that scales itself."""
    own = len(optimizer_variables) - len(optimizer.variables)
    trainable_variables, inner = optimizer.stateless_apply(
        optimizer_variables[own:], grads, trainable_variables, weight
    )
    return trainable_variables, [*optimizer_variables[:own], *inner]
