"""Functions that use private attributes of Keras 2's `Model`.

They are the functions of `keras3_trainer.py`, which describes their arguments.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from gradient_accumulator.compat import keras2_hugging_face as hugging_face
from gradient_accumulator.compat import keras2_normalization as normalization
from gradient_accumulator.compat.attributes import with_attribute
from gradient_accumulator.compat.keras2_data import BuiltByFit as BuiltByFit
from gradient_accumulator.compat.keras2_data import FitData as FitData
from gradient_accumulator.compat.keras2_names import keras

_ENGINE = keras.Model.__module__.rpartition(".")[0]
_ROOT = _ENGINE.rpartition(".")[0]

A_MODEL = "a Keras 2 model, a `tf.keras.Model`"

# The class name of a functional model that accumulates. HDF5 files hold only the name
# of a class. A model that loaded as a plain one would train on micro-batches as if they
# were batches.
FUNCTIONAL_NAME = "GradientAccumulateModel"

# A decorator of methods that makes Keras take them for its own.
default: Any = importlib.import_module(f"{_ROOT}.utils.generic_utils").default
Functional: Any = importlib.import_module(f"{_ENGINE}.functional").Functional
StatelessScope = keras.StatelessScope
# Prints where Keras shows its progress.
print_message: Any = importlib.import_module(f"{_ROOT}.utils.io_utils").print_msg

Normalization: Any = normalization.Normalization
State = normalization.State
feature_axis = normalization.feature_axis
forget = normalization.forget


def in_stateless_scope() -> bool:
    return False


def is_keras_own(function: Callable) -> bool:
    """Whether a method comes from Keras itself, not from a user's subclass."""
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] in ("keras", "tf_keras")


def layers_of(model: Any) -> list:
    """Returns the model and all its layers, at any depth."""
    return list(model._flatten_layers())


def rename(layer: Any, name: str) -> None:
    """Give a layer another name."""
    layer._name = name


def constructor(finish: Callable) -> Callable:
    """Returns a constructor of a functional model that calls `finish` with the model.

    Keras clones and saves a model by its graph if its constructor has the signature of
    Keras's own.
    """

    def __init__(self, inputs, outputs, name=None, trainable=True, **kwargs):
        Functional.__init__(self, inputs, outputs, name, trainable, **kwargs)
        finish(self)

    return __init__


def register(cls: type) -> None:
    """Register a class by its name alone, which is all that older file formats hold."""
    keras.utils.get_custom_objects()[cls.__name__] = cls


def copy_adapted(original: Any, layer: Any) -> None:
    """Give a preprocessing layer the adapted state of another.

    On Keras 2 the config of the layer has its vocabulary.
    """
    if isinstance(layer, keras.layers.experimental.preprocessing.PreprocessingLayer):
        layer.finalize_state()


def copied_inputs(model: Any, made: dict[int, Any]) -> Any:
    """Returns inputs for a copy of a functional model, with the names of its inputs.

    Args:
        model: The functional model.
        made: Input layers of copies by the `id` of their originals; new ones are added.
    """

    def copied(tensor):
        layer = tensor._keras_history.layer
        if id(layer) not in made:
            new = keras.Input(
                batch_shape=tensor.shape, dtype=tensor.dtype, name=layer.name
            )
            made[id(layer)] = new._keras_history.layer
        return made[id(layer)].output

    return tf.nest.map_structure(copied, model.input)


def has_static_inputs(model: Any) -> bool:
    """Whether the shapes of inputs are fixed, except for the number of examples."""
    return type(model).call is Functional.call and all(
        None not in tensor.shape[1:] for tensor in model.inputs
    )


# ------------------------------------------------------------------ variables


def is_variable(thing: Any) -> bool:
    return isinstance(thing, tf.Variable)


def value(variable: tf.Variable) -> tf.Tensor:
    return tf.convert_to_tensor(variable)


def native(variable: tf.Variable) -> tf.Variable:
    """Returns TensorFlow's own variable."""
    return variable


def moved_by_microbatches(model: Any) -> list:
    """Returns the variables that forward passes move: seeds, statistics and the like.

    It leaves out the variables that frozen layers created as trainable, which may be
    most of a model.
    """
    return [v for v in model.non_trainable_variables if not v.trainable]


def metrics_variables(model: Any) -> list:
    return [v for metric in model.metrics for v in metric.variables]


def update_variables(layer: Any) -> list:
    """Returns the variables that a layer moves in training, whatever the data is.

    See `statistics.py`.
    """
    spectral = getattr(keras.layers, "SpectralNormalization", ())  # since 2.13
    if isinstance(layer, spectral):
        return [layer.vector_u, layer.kernel]
    return list(getattr(layer, "update_variables", ()))


# Whether denominators are measured in passes in training, whose masks are those of the
# update. On Keras 2 two passes cannot have the same seeds.
MEASURES_IN_TRAINING = False


def path(variable: Any) -> str:
    """Returns a variable's name, after its layer's; an empty string for a tensor."""
    return variable.name.partition(":")[0] if is_variable(variable) else ""


def overwrites(variable: Any) -> bool:
    """Whether the optimizer assigns a variable its gradient. On Keras 2 none does."""
    return False


def accumulator_dtype(variable: tf.Variable, accum_dtype: str) -> str:
    """Returns the dtype in which a variable's gradients are summed."""
    return "float64" if variable.dtype.base_dtype == tf.float64 else accum_dtype


# ------------------------------------------------------------------ optimizers


def is_optimizer(identifier: Any) -> bool:
    """Whether an object is a new optimizer or a legacy one."""
    kinds = keras.optimizers.Optimizer, keras.optimizers.legacy.Optimizer
    return isinstance(identifier, (*kinds, keras.optimizers.LossScaleOptimizer))


def scale_loss(optimizer: Any, loss: Any) -> Any:
    """Returns the loss, multiplied by the optimizer's scale."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.get_scaled_loss(loss)
    return loss


def apply_gradients(optimizer: Any, gradients: list, variables: list) -> None:
    """Make one step of the optimizer, with gradients of the scaled loss."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        gradients = optimizer.get_unscaled_gradients(gradients)
    optimizer.apply_gradients(list(zip(gradients, variables)))


def step(optimizer: Any, pairs: list, aggregated: bool = False) -> None:
    """Make one step of the optimizer, with gradients of the loss itself.

    Args:
        optimizer: An optimizer.
        pairs: Pairs of a gradient, or None, and its variable.
        aggregated: Whether the gradients are summed over replicas already.
    """
    keywords: dict[str, bool] = {}
    if aggregated and isinstance(optimizer, keras.optimizers.legacy.Optimizer):
        keywords["experimental_aggregate_gradients"] = False
    elif aggregated:
        keywords["skip_gradients_aggregation"] = True
    # The method of its class, because the object may have one that accumulates.
    type(optimizer).apply_gradients(optimizer, pairs, **keywords)


def build_optimizer(optimizer: Any, variables: list) -> None:
    """Create an optimizer's variables."""
    if isinstance(optimizer, keras.optimizers.legacy.Optimizer):
        optimizer._create_all_weights(variables)
    else:
        optimizer.build(variables)


def add_variable(
    optimizer: Any, shape: tuple, dtype: str, name: str, like: Any = None, **arguments
) -> tf.Variable:
    """Returns a new variable of an optimizer, filled with zeros.

    Args:
        optimizer: The optimizer.
        shape: The variable's shape.
        dtype: Its dtype.
        name: Its name.
        like: Not used on Keras 2.
        **arguments: Arguments of `tf.Variable`.
    """
    variable = tf.Variable(
        lambda: tf.zeros(shape, dtype), trainable=False, name=name, **arguments
    )
    optimizer._variables.append(variable)
    return variable


def may_skip(optimizer: Any) -> bool:
    """Whether an optimizer skips updates that are not finite."""
    return _dynamic_scaler(optimizer) is not None


def _dynamic_scaler(optimizer):
    while optimizer is not None:
        if (
            isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
            and optimizer.dynamic
        ):
            return optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return None


def mark(optimizer: Any) -> Any:
    """Returns the current scale of an optimizer that may skip updates, or None."""
    scaler = _dynamic_scaler(optimizer)
    return None if scaler is None else tf.identity(scaler.loss_scale)


def skipped(optimizer: Any, mark: Any) -> Any:
    """Whether the optimizer skipped an update since `mark`.

    A skipped update lowers the scale, unless it is 1, and restarts the counter.
    """
    scaler = _dynamic_scaler(optimizer)
    return (scaler.loss_scale <= mark) & tf.equal(scaler.dynamic_counter, 0)


def rounds_or_overwrites(model: Any) -> bool:
    """Whether a factor of the loss changes its gradients by more than that factor.

    It does in half precision, which rounds.
    """
    return any(
        getattr(layer, "compute_dtype", None) in ("float16", "bfloat16")
        for layer in layers_of(model)
    )


# ------------------------------------------------------------------ the train function


def steps_per_execution(model: Any) -> int:
    """The number of updates in a call of the train function."""
    return model._steps_per_execution.numpy().item()


def public_module(cls: type) -> str:
    """Returns the module of a class. Files of Keras 2 do not hold it."""
    return cls.__module__


def count_update(model: Any) -> None:
    """Count an update in the counter that Keras keeps for callbacks."""
    model._train_counter.assign_add(1)


def build(model: Any, data: Any) -> None:
    """Create the variables of the model, its losses and metrics.

    Args:
        model: A compiled model.
        data: Nested `tf.TensorSpec`s of a micro-batch.
    """
    if _is_built(model):
        return

    def run(data):
        tf.distribute.get_strategy().run(partial(_evaluate, model), args=(data,))

    # The function is traced and never run. The variables that it makes stay.
    specs = tf.nest.map_structure(
        lambda leaf: None if leaf is None else tf.TensorSpec(leaf.shape, leaf.dtype),
        data,
    )
    tf.function(run, autograph=False).get_concrete_function(specs)


def build_from_values(model: Any, data: Any) -> None:
    """Does the same as `build` for an eager model, which may branch on values."""
    if not _is_built(model):
        _evaluate(model, data)
        model.reset_metrics()


def _is_built(model):
    containers = model.compiled_loss, model.compiled_metrics
    return model.built and all(each is None or each.built for each in containers)


def _evaluate(model, data):
    x, y, sample_weight = unpack(model, data)
    y_pred = forward(model, x, training=False)
    model.compute_loss(x, *_of_loss(model, y, y_pred, sample_weight))
    model.compute_metrics(x, *_of_metrics(model, y, y_pred), sample_weight)


def has_known_train_step(model: Any) -> bool:
    """Whether the model's `train_step` is known: Keras's, or that of Hugging Face.

    `keras2_hugging_face.py` adds the steps of Hugging Face.
    """
    return is_keras_own(type(model).train_step) or hugging_face.is_one(model)


def check_compiled(model: Any) -> None:
    """Raise if the model is not compiled, or its own loss has no known denominator."""
    model._assert_compile_was_called()
    if hugging_face.has_own_loss(model):
        hugging_face.check_own_loss(model)


def unpack(model: Any, data: Any) -> tuple:
    """Returns inputs, targets and sample weights as the model takes them."""
    if hugging_face.is_one(model):
        return hugging_face.unpack(model, data)
    return keras.utils.unpack_x_y_sample_weight(data)


def forward(model: Any, x: Any, training: bool) -> Any:
    """Returns the model's predictions."""
    if hugging_face.has_own_loss(model):
        return hugging_face.with_own_loss(model, x, training)
    return model(x, training=training)


def _of_metrics(model, y, y_pred):
    """Returns the targets, and the outputs that metrics compare them with."""
    if hugging_face.is_one(model):
        return hugging_face.matched(y, y_pred)
    return y, y_pred


def _of_loss(model, y, y_pred, sample_weight):
    """Returns targets, outputs and sample weights for the compiled losses."""
    if hugging_face.has_own_loss(model):
        return *hugging_face.own_loss(model, y_pred, sample_weight), sample_weight
    return *_of_metrics(model, y, y_pred), sample_weight


def compute_output_spec(function: Callable, data: Any) -> Any:
    """Returns the `tf.TensorSpec`s of a function's outputs.

    The function is traced in a graph that never runs.

    Args:
        function: Function of the data.
        data: Nested specs of the data.
    """

    def placeholder(spec):
        if spec is None:
            return None
        return tf.compat.v1.placeholder(spec.dtype, spec.shape)

    with tf.__internal__.FuncGraph("output_spec").as_default():
        outputs = function(tf.nest.map_structure(placeholder, data))
    return tf.nest.map_structure(tf.TensorSpec.from_tensor, outputs)


def variance_to_move_by(layer: Any, variance: Any, count: Any) -> Any:
    """Returns the variance by which the moving variance moves.

    If Keras 2 normalizes images by TensorFlow's fused operation, it is the unbiased
    estimate of the variance.
    """
    if not layer.fused:
        return variance
    return variance * count / tf.maximum(count - 1, 1)


# ------------------------------------------------------------------ metrics


_number_weight: ContextVar[Any] = ContextVar("number_weight")
# The numbers that metrics were updated by; None if nobody asks.
_numbers_seen: ContextVar[list | None] = ContextVar("numbers_seen", default=None)

_Reduce: Any = keras.metrics.Mean.__mro__[1]
_Wrapper: Any = keras.metrics.MeanMetricWrapper


def _weight_of(values: Any, sample_weight: Any) -> Any:
    """Returns the weight of a mean's values: `_number_weight` for one number."""
    if sample_weight is not None or len(np.shape(values)):
        return sample_weight
    seen = _numbers_seen.get()
    if seen is not None:
        seen.append(values)
    return tf.cast(_number_weight.get(), keras.backend.floatx())


class _AveragesNumbers(_Reduce):
    """A mean in which one number for a micro-batch has the weight `_number_weight`."""

    def update_state(self, values, sample_weight=None):
        return super().update_state(values, _weight_of(values, sample_weight))


@functools.cache
def _averaging(cls: Any) -> Any:
    """Returns a subclass of a metric's class, with ours before the base of `Mean`."""
    return type(cls.__name__, (cls, _AveragesNumbers), {"__module__": cls.__module__})


def _means(model: Any) -> list:
    """Returns the model's metrics that average values, without those of losses."""
    losses_own = model.compiled_loss.metrics if model.compiled_loss else []
    known = set(map(id, losses_own))
    return [
        metric
        for metric in model.metrics
        if isinstance(metric, keras.metrics.Mean) and id(metric) not in known
    ]


@contextmanager
def weighing_numbers(model: Any, weight: Any) -> Iterator[None]:
    """A context that updates metrics: one number for a micro-batch weighs `weight`.

    Metrics of a user's class have another class meanwhile, because that class calls
    Keras's by `super()`. Metrics of Keras's classes have another method, because their
    constructor bound it.
    """
    token = _number_weight.set(weight)
    with ExitStack() as stack:
        stack.callback(_number_weight.reset, token)
        for metric in _means(model):
            cls: Any = type(metric)
            if cls.update_state is not _Reduce.update_state:
                stack.callback(setattr, metric, "__class__", cls)
                metric.__class__ = _averaging(cls)
                continue
            update = _weighing_number(metric.update_state)
            stack.enter_context(with_attribute(metric, "update_state", update))
        yield


def _weighing_number(update_state):
    def update(values, sample_weight=None):
        return update_state(values, _weight_of(values, sample_weight))

    return update


def may_average_numbers(model: Any, y_pred: Any) -> bool:
    """Whether a metric may average one number for a whole micro-batch.

    The metrics that Keras has classes for average a value for each example, if
    predictions have an axis after the first.
    """
    flat = any(len(each.shape) < 2 for each in tf.nest.flatten(y_pred))
    return any(
        flat
        or type(metric) is _Wrapper
        or not isinstance(metric, _Wrapper)
        or not is_keras_own(type(metric))
        for metric in _means(model)
    )


def averages_numbers(model: Any, microbatch: tuple, additional: list) -> bool:
    """Whether a metric averages one number for a micro-batch, found out by a call.

    The call must be traced, and never run.
    """
    seen: list = []
    token = _numbers_seen.set(seen)
    try:
        loss = compute_loss(model, microbatch, additional, 1.0, None)
        update_metrics(model, microbatch, loss, 1, 1.0)
    finally:
        _numbers_seen.reset(token)
    return bool(seen)


def has_own_metrics(model: Any) -> bool:
    """Whether the model has its own `compute_metrics`, which alone knows the logs."""
    return not is_keras_own(type(model).compute_metrics)


def update_metrics(
    model: Any, microbatch: tuple, loss: Any, examples: Any, share: Any
) -> dict:
    """Add a micro-batch to the metrics.

    The compiled losses have recorded their means before, weighed by examples.

    Returns:
        The logs, if the model has its own `compute_metrics`; else an empty dictionary.
    """
    x, y, y_pred, sample_weight = microbatch
    with weighing_numbers(model, share):
        if has_own_metrics(model):
            return model.compute_metrics(x, y, y_pred, sample_weight)
        y, y_pred = _of_metrics(model, y, y_pred)
        model.compiled_metrics.update_state(y, y_pred, sample_weight)
    return {}


def logs(model: Any, own: dict, loss: Any, examples: Any) -> dict:
    """Returns the logs of an update, after its last micro-batch."""
    return own if has_own_metrics(model) else model.get_metrics_result()


# ------------------------------------------------------------------ losses


def get_mask(tensor: Any) -> Any:
    return getattr(tensor, "_keras_mask", None)


def denominator(
    loss: Any, values: Any, y_true: Any, y_pred: Any, sample_weight: Any
) -> Any:
    """Returns the denominator of a loss with a mask: the number of unmasked values.

    Keras 2 does not divide by sample weights.
    """
    masks = [m for m in (get_mask(y_pred), get_mask(values)) if m is not None]
    dtype = values.dtype
    share = tf.reduce_mean(tf.cast(functools.reduce(tf.logical_and, masks), dtype))
    return tf.cast(tf.size(values), dtype) * share


def loss_dtype(loss: Any) -> str:
    """Returns the dtype that a compiled loss computes in, if no values tell it."""
    return keras.backend.floatx()


def loss_values(loss: Any, y_true: Any, y_pred: Any) -> tf.Tensor:
    """Returns the values of a loss before it is reduced, with their mask."""
    y_pred = tf.convert_to_tensor(y_pred)
    y_true = tf.cast(y_true, y_pred.dtype) if _casts(y_true) else y_true
    return loss.call(y_true, y_pred)


def _casts(y_true):
    return y_true.dtype.is_floating


def compiled_loss_is_all(model: Any) -> bool:
    """Whether compiled losses and `add_loss` alone determine the loss and the logs.

    On Keras 2 this is never assumed: the log records the loss of each micro-batch with
    the weight of that micro-batch.
    """
    return False


def is_loss_of_keras(loss: Any) -> bool:
    """Whether Keras's own code computes the values of a loss, and their mask."""
    return is_keras_own(type(loss)) and is_keras_own(getattr(loss, "fn", type(loss)))


def has_compiled_losses(model: Any) -> bool:
    return model.compiled_loss is not None and model.compiled_loss.built


def records_shares(model: Any, y: Any) -> bool:
    """Whether compiled losses are recorded with the micro-batch's share as weight.

    They are if there are no targets, from which Keras 2 takes the number of examples,
    and if a model's own loss replaces them.
    """
    own = hugging_face.has_own_loss(model)
    return y is None or (own and hugging_face.is_mean_of_labels(model))


def compute_loss(
    model: Any, microbatch: tuple, additional: list, share: Any, weigh: Callable | None
) -> Any:
    """Returns a micro-batch's loss: times `share`, it is a part of the batch's loss."""
    x, y, y_pred, sample_weight = microbatch
    once = records_shares(model, y)
    y, y_pred, sample_weight = _of_loss(model, y, y_pred, sample_weight)
    with ExitStack() as stack:
        for metric in model.compiled_loss.metrics if model.compiled_loss else ():
            update = _weighing_once(metric.update_state, share, once)
            stack.enter_context(with_attribute(metric, "update_state", update))
        if weigh is not None:
            stack.enter_context(replaced_losses(model, weigh))
        stack.enter_context(weighing_numbers(model, share))
        loss = model.compute_loss(x, y, y_pred, sample_weight)
    model._validate_target_and_loss(y, loss)
    return loss


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
            sample_weight = tf.cast(sample_weight, value.dtype) / share
        return update_state(value, sample_weight=sample_weight)

    return update


def numerator(loss: Any, y_true, y_pred, sample_weight=None) -> Any:
    """Returns the numerator of a loss: the loss with the reduction `sum`."""
    # The loss itself may be in use elsewhere.
    summed = object.__new__(type(loss))
    summed.__dict__.update(loss.__dict__, reduction="sum")
    return summed(y_true, y_pred, sample_weight)


def taken_apart(loss: Any, y_true, y_pred, sample_weight=None) -> tuple:
    """Returns the numerator and the denominator of a loss."""
    values = loss_values(loss, y_true, y_pred)
    given = y_true, y_pred, sample_weight
    return numerator(loss, *given), denominator(loss, values, *given)


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


@contextmanager
def replaced_losses(model: Any, replace: Callable) -> Iterator[None]:
    """A context in which `replace(loss)` stands in for each compiled loss."""
    compiled = model.compiled_loss
    losses = [
        None if loss is None else _InPlaceOf(loss, replace(loss))
        for loss in compiled._losses
    ]
    with with_attribute(compiled, "_losses", losses):
        yield


def standing_in(model: Any, stand_in: Callable, microbatch: tuple) -> list:
    """Compute the loss with stand-ins for the compiled losses, and record nothing.

    Each stand-in gets the outputs, targets and weights of its loss. A model's own
    `compute_loss` may change them, or call a loss several times.

    Returns:
        The stand-ins, one for each call of a loss.
    """
    made: list = []

    def replace(loss):
        def call(*args, **kwargs):
            made.append(stand_in(loss))
            return made[-1](*args, **kwargs)

        return call

    x, y, y_pred, sample_weight = microbatch
    with ExitStack() as stack:
        for metric in model.compiled_loss.metrics:
            stack.enter_context(
                with_attribute(metric, "update_state", lambda *_, **__: None)
            )
        stack.enter_context(replaced_losses(model, replace))
        if is_keras_own(model.compute_loss) or hugging_face.is_one(model):
            model.compiled_loss(*_of_loss(model, y, y_pred, sample_weight))
        else:
            with _metrics_kept(model), weighing_numbers(model, 1.0):
                model.compute_loss(x, y, y_pred, sample_weight)
    return made


@contextmanager
def _metrics_kept(model):
    """A context that restores the metrics in the end, if it runs eagerly."""
    if not tf.executing_eagerly():
        yield
        return
    variables = metrics_variables(model)
    before = [variable.read_value() for variable in variables]
    yield
    for variable, value in zip(variables, before):
        variable.assign(value)
