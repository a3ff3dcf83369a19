"""`GradientAccumulateOptimizer`: accumulation in training loops of one's own."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import keras
from keras import ops

from gradient_accumulator import backend
from gradient_accumulator.agc import AdaptiveClipping
from gradient_accumulator.backend import trainer
from gradient_accumulator.pieces import check_float_dtype, check_positive_int

REDUCTIONS = ("MEAN", "SUM")


@keras.saving.register_keras_serializable("gradient_accumulator")
class GradientAccumulateOptimizer(keras.optimizers.Optimizer):
    """An optimizer that updates the weights on every `accum_steps`-th call.

    It sums the gradients that it is given, one call for each piece of a full batch,
    and hands the finished sum to the optimizer that it wraps:

        gradient = sum_k weight_k * gradient_k / sum_k weight_k      reduction="MEAN"
        gradient = sum_k weight_k * gradient_k                       reduction="SUM"

    Nothing of the wrapped optimizer runs before: clipping, weight decay, averages of
    the weights, constraints, learning-rate schedules, momentums and `iterations` know
    of updates only. It is for training loops that are your own (a custom `train_step`,
    a `tf.GradientTape`, `jax.jit` or PyTorch loop). Where `fit` trains the model,
    `accumulate` does the same, is faster, and exact in more cases:

    **What an optimizer cannot know.** It sees gradients, not what the losses were
    divided by. Pieces weigh equally here, which is the full batch's mean if all have
    as many examples, and no mask, `ignore_class` or
    `reduction="mean_with_sample_weight"` makes the loss of one a mean over fewer
    values. A loss with `reduction="sum"` needs `reduction="SUM"` here, and then
    regularizers count once a piece. The model wrapper, `accumulate`, is exact in all
    these cases; in a loop of your own, `weight=` tells what a piece is worth.

    An epoch's last pieces wait for the next epoch if they are fewer than
    `accum_steps`: the callback `FlushGradients` applies them at the epoch's end, and
    `flush` does at any time.

    Two facts about what is wrapped. With a `LossScaleOptimizer`, inside or around, the
    gradients of one update are scaled by one scale, and one that is not finite skips
    the whole update and lowers the scale once; Keras itself puts one around under the
    policy `mixed_float16`. On TensorFlow, the sparse gradients of embeddings are added
    to a dense sum, so that rows that occur several times are merged; Keras's optimizers
    do not merge them, and square the parts of such a row where they should square its
    sum.

    Args:
        optimizer: The optimizer to wrap: a name, a config, or any Keras 3 optimizer.
        accum_steps: Positive int, the number of calls that make an update.
        reduction: `"MEAN"` or `"SUM"`, of the pieces' gradients.
        name: Name of the optimizer.
        accum_dtype: Name of the float dtype that gradients are summed in (float64
            variables always sum in float64).
        use_agc: Whether to clip the finished gradient adaptively, before the wrapped
            optimizer sees it: see `adaptive_clip_grad`.
        clip_factor: Positive number, of adaptive clipping.
        eps: Positive number, of adaptive clipping.
        agc_exclude: What adaptive clipping leaves out, as for `adaptive_clip_grad`.

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

    In a loop of your own, here on PyTorch, with pieces of uneven worth:

    ```python
    for tokens, labels in pieces:
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
        check_positive_int("accum_steps", accum_steps)
        check_float_dtype(accum_dtype)
        if reduction not in REDUCTIONS:
            raise ValueError(
                "Argument `reduction` must be 'MEAN' or 'SUM'. "
                f"Received: reduction={reduction!r}"
            )
        clipping = AdaptiveClipping(clip_factor, eps, agc_exclude) if use_agc else None
        inner = _optimizer(optimizer)
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner
        self.accum_steps = accum_steps
        self.reduction = reduction
        self.accum_dtype = accum_dtype
        self._clipping = clipping
        self._engine = backend.active().optimizer
        self._accumulators: list = []
        self._scaler: Callable[[], Any] = lambda: None  # a LossScaleOptimizer around
        self._finishing = 0  # how many calls are giving it the finished sum
        # Of the accumulation at hand:
        self._given: list[int] = []  # which variables gradients were given for
        self._weighed = False  # whether some piece was given a weight
        # Which of them had a gradient, where calls run as they are, and where they are
        # compiled, and one serves many updates.
        self._connected: set[int] = set()
        self._compiled_connected: set[int] = set()

    # ------------------------------------------------------------------ applying

    def apply(self, grads, trainable_variables=None, weight=None):
        """Add a piece's gradients; the last piece of an update applies the sum.

        Args:
            grads: List of gradients, one for each variable; None where there is none.
            trainable_variables: The variables, the same in every call of an update. If
                not given, those that the optimizer was built with.
            weight: What the piece is worth, a number or a scalar tensor, not negative:
                what its loss was divided by, such as its number of tokens. If not
                given, 1.

        Raises:
            ValueError: If variables change before the update is complete, or gradients
                do not fit them; nothing has been added then.
        """
        if self._finishing:
            # The optimizer around has the finished sum, checked and unscaled.
            self.inner_optimizer.apply(grads, trainable_variables)
            return
        self._check_outermost()
        self._accumulate(grads, trainable_variables, weight)

    def apply_gradients(self, grads_and_vars, weight=None):
        """As `apply`, from pairs of a gradient and its variable.

        Returns:
            The number of updates so far.
        """
        grads, trainable_variables = zip(*grads_and_vars)
        self.apply(grads, trainable_variables, weight=weight)
        return self.iterations

    def stateless_apply(
        self, optimizer_variables, grads, trainable_variables, weight=None
    ):
        """As `apply`, without effects: for `jax.jit`.

        The update is in a loop that runs once or not at all, through which JAX
        differentiates forwards but not in reverse.

        Args:
            optimizer_variables: List of the values of `variables`.
            grads: As for `apply`.
            trainable_variables: List of the values of the variables that the optimizer
                was built with.
            weight: As for `apply`.

        Returns:
            The new values of the trainable variables and of the optimizer's.
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

    def flush(self) -> None:
        """Apply what has been accumulated, weighed by the pieces that there were.

        Does nothing where no piece waits. In a custom training loop it may be called
        inside a `tf.function`; for `jax.jit` there is `stateless_flush`.
        """
        if self._accumulators:
            self._engine.flush(
                lambda: ops.greater(self._count, 0), self._update, self._changing
            )

    def stateless_flush(self, optimizer_variables, trainable_variables):
        """As `flush`, without effects: for `jax.jit`.

        Args, returns: As `stateless_apply`.
        """
        return self._stateless(self.flush, optimizer_variables, trainable_variables)

    def reset(self) -> None:
        """Forget what has been accumulated."""
        if self._accumulators:
            self._given = []
            self._clear()

    @property
    def pending(self) -> int:
        """How many pieces wait for their update.

        During `fit` on JAX the state is not in the variables: in a callback, call the
        model's `jax_state_sync` before.
        """
        return self._engine.read(self._count) if self._accumulators else 0

    def build(self, variables) -> None:
        """Create the accumulators, and the variables of the wrapped optimizer."""
        if self.built:
            return
        # Keras before 3.10 does nothing to the optimizer inside when it puts it there.
        self._look_for_scaler()
        variables = list(variables)
        if self._clipping is not None:
            self._clipping.check_excluded(variables)
        if self.accum_steps > 1:
            dtypes = [trainer.accumulator_dtype(v, self.accum_dtype) for v in variables]
            self._accumulators = [
                self._engine.accumulator(self, v, dtype)
                for v, dtype in zip(variables, dtypes)
            ]
            dtype = "float64" if "float64" in dtypes else "float32"
            self._count = self.add_variable(
                (), dtype="int", name="pending", aggregation="only_first_replica"
            )
            self._total = self._engine.add_local_variable(
                self, (), dtype=dtype, name="total_weight"
            )
            self._guard = self._engine.guard()
        self.inner_optimizer.build(variables)
        super().build(variables)

    def _accumulate(self, grads, trainable_variables=None, weight=None):
        grads = list(grads)
        if not grads:
            return
        _check_weight(weight)
        root = self._scaler() or self
        if trainable_variables is None:
            if not root.built:
                raise ValueError(
                    "An optimizer that is not built needs the variables too: give "
                    "`trainable_variables`, or call `build` first. Received: "
                    "trainable_variables=None"
                )
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        if not root.built:
            _check_gradients(grads, variables)
            root.build(variables)
        self._check_variables(variables)
        _check_gradients(grads, variables)
        if self.accum_steps == 1:
            self._finish(self._alone(grads, weight), variables)
            return
        factor = self._factor(weight)
        with self._engine.same(self._guard, self._given, self._count):
            pairs = self._count_piece(grads, variables, weight, factor)
        try:
            self._engine.add_and_update(
                pairs,
                factor,
                lambda: ops.greater_equal(self._count, self.accum_steps),
                self._update,
                self._changing,
            )
        except BaseException:
            if not self._engine.is_traced(self._count):
                # Take back the piece whose update failed.
                self._count.assign_sub(1)
                self._total.assign_sub(ops.cast(factor, self._total.dtype))
            raise

    def _count_piece(self, grads, variables, weight, factor):
        """Count a piece; returns what is to be added to what."""
        connected = self._compiled_connected
        if not self._engine.is_traced(self._count):
            connected = self._connected
            if self._engine.read(self._count) == 0:
                connected.clear()
        pairs = []
        for gradient, variable in zip(grads, variables):
            if gradient is None:
                continue
            index = self._get_variable_index(variable)
            connected.add(index)
            accumulator = self._accumulators[index]
            if trainer.overwrites(variable):
                # Keras's own way to join what pieces would overwrite a variable with.
                accumulator.assign(ops.maximum(accumulator, gradient))
            else:
                pairs.append((accumulator, gradient))
        self._weighed |= weight is not None
        self._count.assign_add(1)
        self._total.assign_add(ops.cast(factor, self._total.dtype))
        return pairs

    def _factor(self, weight):
        """What a piece's gradient is multiplied by when it is added.

        Of a mean as much as if this were one of `accum_steps` equal pieces: if it was,
        nothing is left to be divided in the end.
        """
        share = 1 / self.accum_steps if self.reduction == "MEAN" else 1.0
        return share if weight is None else ops.cast(weight, self._total.dtype) * share

    def _update(self, joined=None):
        """The finished gradient to the wrapped optimizer.

        Args:
            joined: Sums that have their last gradient, by the `id` of the accumulators,
                which do not. None if all have it.
        """
        given = self._given or range(len(self._accumulators))
        variables = [self._trainable_variables[index] for index in given]
        connected = self._connected | self._compiled_connected or set(given)
        means = [
            self._accumulators[index]
            for index, variable in zip(given, variables)
            if self.reduction == "MEAN" and not trainer.overwrites(variable)
        ]
        total = self._engine.total(self._total, self._weighed)
        if joined is None:
            joined = {}
            self._engine.divide(means, total)
        else:
            joined |= self._engine.divided(means, joined, total)
        sums = [joined.get(id(a), a) for a in (self._accumulators[i] for i in given)]
        gradients = [
            ops.cast(sum_, variable.dtype) if index in connected else None
            for index, sum_, variable in zip(given, sums, variables)
        ]
        try:
            self._finish(gradients, variables)
        except BaseException:
            if not joined:
                self._engine.divide(means, ops.divide_no_nan(1.0, total))
            raise
        self._clear()

    def _finish(self, gradients, variables):
        """A finished gradient to the wrapped optimizer, or to the one around."""
        # Counted, for replicas take turns in here.
        optimizer = self._scaler() or self.inner_optimizer
        if self._clipping is not None:
            gradients = self._engine.clip(
                self._clipping, optimizer, variables, gradients
            )
        self._finishing += 1
        try:
            self._engine.apply(
                optimizer,
                gradients,
                variables,
                self._trainable_variables,
            )
        finally:
            self._finishing -= 1

    def _alone(self, grads, weight):
        """The gradients of a piece that is an update."""
        if weight is None:
            return grads
        weight = ops.cast(weight, "float32")
        factor = (
            weight if self.reduction == "SUM" else ops.divide_no_nan(weight, weight)
        )
        return [None if g is None else g * ops.cast(factor, g.dtype) for g in grads]

    def _clear(self):
        self._engine.clear(self._accumulators)
        self._count.assign(0)
        self._total.assign(0.0)

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

    def _changing(self) -> list:
        """All variables that an update changes."""
        return [*self._trainable_variables, *(self._scaler() or self).variables]

    def _check_variables(self, variables):
        known = self._trainable_variables_indices
        unknown = [v for v in variables if self._var_key(v) not in known]
        if unknown:
            raise ValueError(
                "The optimizer can only be called for the variables that it was built "
                "with. Make one optimizer for each set of variables. Received: "
                f"unknown variables {_names(unknown)}"
            )
        if not self._accumulators:
            return
        given = [self._get_variable_index(v) for v in variables]
        changed = self._given not in ([], given)
        if changed and self._engine.read(self._count) != 0:
            before = [self._trainable_variables[index] for index in self._given]
            raise ValueError(
                "The variables changed while pieces wait for their update. Call "
                "`flush()` or `reset()` before, and make one optimizer for each "
                "set of variables that is trained in turns. Received: "
                f"{_names(variables)} after {_names(before)}"
            )
        self._given = given

    def _check_outermost(self):
        if self._scaler() is not None:
            raise ValueError(
                "This optimizer is inside of a `LossScaleOptimizer`: give that one the "
                "gradients of the scaled loss, and call its `build` before. "
                "Received: a call of the inner one"
            )

    # ---------------------------------------------- what is the wrapped optimizer's

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
        """`learning_rate`, for callbacks of Keras 2's that look for this name."""
        return self.learning_rate

    @lr.setter
    def lr(self, learning_rate):
        self.learning_rate = learning_rate

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)

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
            # All that a `LossScaleOptimizer` does to an optimizer put into it. Not in
            # the property: on TensorFlow Keras leaves an equal value alone.
            self._look_for_scaler()

    def _look_for_scaler(self):
        scaler = _scaler_that_calls(self)
        if scaler is not None and self._scaler() is not scaler:
            self._let_scale(scaler)

    def _let_scale(self, scaler):
        """A `LossScaleOptimizer` was put around.

        It would drop a piece that is not finite without a word. Here it gets the
        finished sum of scaled gradients instead: what it does on a full batch.
        """
        if isinstance(self.inner_optimizer, keras.optimizers.LossScaleOptimizer):
            # Keras puts one around under the policy mixed_float16. One is enough.
            scaler.scale_loss = self.scale_loss
            scaler.apply = self.apply
            scaler.stateless_apply = partial(_stateless_apply_inside, self)
            return
        # Weakly, or Keras would save the outer optimizer as a part of the inner one.
        self._scaler = weakref.ref(scaler)
        scaler.apply = self._accumulate
        scaler.stateless_apply = self._stateless_accumulate
        for name in ("_tf_apply", "_common_apply"):
            # Keras before 3.10 may be in `apply` already, and goes on with one of them.
            setattr(scaler, name, partial(self._scaled, getattr(scaler, name)))

    def _scaled(self, apply, grads, trainable_variables):
        """A method of the scaler's: `apply` only with the finished sum."""
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
        if self._accumulators:
            # What is not saved: any variable may have had a gradient, and a weight.
            self._connected = set(range(len(self._accumulators)))
            self._weighed = True


def chain(optimizer: Any) -> Iterable:
    """An optimizer, the one it wraps, and so on."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def accumulating(optimizer: Any) -> GradientAccumulateOptimizer | None:
    """The one of an optimizer and those that it wraps that accumulates."""
    return next(
        (o for o in chain(optimizer) if isinstance(o, GradientAccumulateOptimizer)),
        None,
    )


def check_not_accumulating(optimizer: Any, problem: str) -> None:
    """Raise if an optimizer, or one that it wraps, accumulates gradients."""
    for each in chain(optimizer):
        steps = getattr(each, "gradient_accumulation_steps", None)
        if steps:
            raise ValueError(
                f"{problem} Use an optimizer without `gradient_accumulation_steps`. "
                f"Received: gradient_accumulation_steps={steps}"
            )
        if isinstance(each, GradientAccumulateOptimizer):
            raise ValueError(
                f"{problem} Use the optimizer that it wraps. Received: {each} with "
                f"accum_steps={each.accum_steps}"
            )


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
                f"Received: optimizer={identifier!r}"
            ) from error
    raise TypeError(
        f"Argument `optimizer` must be {advice} Received: optimizer={identifier!r} "
        f"(of type {type(identifier)})"
    )


def _scaler_that_calls(optimizer) -> keras.optimizers.LossScaleOptimizer | None:
    """The `LossScaleOptimizer` around `optimizer`, if a method of it is running.

    Keras tells the optimizer inside nothing of the one around.
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
    """`stateless_apply` of a `LossScaleOptimizer` that lets `optimizer` do it all."""
    own = len(optimizer_variables) - len(optimizer.variables)
    trainable_variables, inner = optimizer.stateless_apply(
        optimizer_variables[own:], grads, trainable_variables, weight
    )
    return trainable_variables, [*optimizer_variables[:own], *inner]


def _check_weight(weight):
    if isinstance(weight, (bool, str)):
        raise TypeError(
            "Argument `weight` must be a number or a scalar tensor. "
            f"Received: weight={weight!r} (of type {type(weight).__name__})"
        )
    if isinstance(weight, (int, float)) and not (0 <= weight < math.inf):
        raise ValueError(
            "Argument `weight` must be finite and not negative. "
            f"Received: weight={weight}"
        )
    if tuple(getattr(weight, "shape", ())) != ():
        raise ValueError(
            "Argument `weight` must be a number or a scalar tensor. "
            f"Received: weight of shape {tuple(weight.shape)}"
        )


def _check_gradients(grads, variables):
    if len(grads) != len(variables):
        raise ValueError(
            "There must be one gradient for each variable. Received: "
            f"{len(grads)} gradients for {len(variables)} variables"
        )
    for gradient, variable in zip(grads, variables):
        # TensorFlow does not always know a shape, nor that of sparse gradients.
        if (
            gradient is None
            or hasattr(gradient, "dense_shape")
            or getattr(gradient.shape, "rank", 0) is None
        ):
            continue
        shape, wanted = tuple(gradient.shape), tuple(variable.shape)
        if len(shape) != len(wanted) or any(
            a != b and a is not None for a, b in zip(shape, wanted)
        ):
            raise ValueError(
                "A gradient needs its variable's shape. Received: a gradient of shape "
                f"{shape} for {_names([variable])} of shape {wanted}"
            )


def _names(variables) -> list[str]:
    return [getattr(v, "path", None) or v.name for v in variables]
