"""Functions that use private attributes of Keras 3's `Trainer`, for all backends."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np
from keras.src import backend
from keras.src.losses import loss as losses
from keras.src.models.functional import Functional as Functional
from keras.src.trainers.trainer import Trainer
from keras.src.utils.io_utils import print_msg
from keras.src.utils.python_utils import default as default

from gradient_accumulator.compat.attributes import with_attribute
from gradient_accumulator.compat.keras3_arrays import large_arrays as large_arrays
from gradient_accumulator.compat.keras3_data import BuiltByFit as BuiltByFit
from gradient_accumulator.compat.keras3_data import FitData as FitData

A_MODEL = "a Keras 3 model, a `keras.Model`"

# The class name of a functional model that accumulates. Keras saves a class by its
# module and its name. With those of Keras's own class, the file loads without this
# package.
FUNCTIONAL_NAME = Functional.__name__

StatelessScope: Any = backend.StatelessScope
in_stateless_scope = backend.in_stateless_scope
get_stateless_scope: Any = backend.get_stateless_scope
compute_output_spec: Any = backend.compute_output_spec
get_mask = backend.get_keras_mask
set_mask = backend.set_keras_mask
print_message: Callable[[str], None] = print_msg  # prints where Keras shows progress


def is_keras_own(function: Callable) -> bool:
    """Whether a method comes from Keras itself, not from a user's subclass."""
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] == "keras"


def layers_of(model: keras.Model) -> list:
    """Returns the model and all its layers, at any depth."""
    return list(model._flatten_layers())


def rename(layer: Any, name: str) -> None:
    """Give a layer another name."""
    layer.name = name


def constructor(finish: Callable) -> Callable:
    """Returns a constructor of a functional model that calls `finish` with the model.

    Keras clones and saves a model by its graph if its constructor has the signature of
    Keras's own.
    """

    def __init__(self, inputs, outputs, name=None, **kwargs):
        Functional.__init__(self, inputs, outputs, name=name, **kwargs)
        finish(self)

    # In some versions Keras's own constructor is decorated.
    return (
        _wrapped(__init__) if hasattr(Functional.__init__, "__wrapped__") else __init__
    )


def register(cls: type) -> None:
    """Register a class by its name alone. On Keras 3 no file format needs that."""


def _wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def copy_adapted(original: Any, layer: Any) -> None:
    """Give a preprocessing layer the adapted state of another, such as a vocabulary."""
    if not hasattr(layer, "finalize_state"):
        return
    stored: dict[str, Any] = {}
    original.save_own_variables(stored)
    values = {
        key: np.array(keras.ops.convert_to_numpy(value))
        for key, value in stored.items()
    }
    layer.load_own_variables(values)
    if hasattr(layer, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            original.save_assets(folder)
            layer.load_assets(folder)


def copied_inputs(model: keras.Model, made: dict[int, Any]) -> Any:
    """Returns inputs for a copy of a functional model, with the names of its inputs.

    Args:
        model: The functional model.
        made: Input layers of copies by the `id` of their originals; new ones are added.
    """

    def copied(tensor):
        layer = tensor._keras_history.operation
        if id(layer) not in made:
            new = keras.Input(
                batch_shape=tensor.shape, dtype=tensor.dtype, name=layer.name
            )
            made[id(layer)] = new._keras_history.operation
        return made[id(layer)].output

    return keras.tree.map_structure(copied, model.input)


def has_static_inputs(model: keras.Model) -> bool:
    """Whether the shapes of inputs are fixed, except for the number of examples."""
    return type(model).call is Functional.call and all(
        None not in tensor.shape[1:] for tensor in model.inputs
    )


def is_variable(thing: Any) -> bool:
    return isinstance(thing, keras.Variable)


def value(variable: keras.Variable) -> Any:
    return variable.value


def native(variable: keras.Variable) -> Any:
    """Returns the backend's own variable."""
    return variable.value


def moved_by_microbatches(model: keras.Model) -> list:
    """Returns the variables that forward passes move: seeds, statistics and the like.

    It leaves out the variables that frozen layers created as trainable, which may be
    most of a model.
    """
    frozen = {id(v) for layer in layers_of(model) for v in layer._trainable_variables}
    return [v for v in model.non_trainable_variables if id(v) not in frozen]


def metrics_variables(model: keras.Model) -> list:
    return model.metrics_variables


def update_variables(layer: Any) -> list:
    """Returns the variables that a layer moves in training, whatever the data is.

    See `statistics.py`.
    """
    if isinstance(layer, keras.layers.SpectralNormalization):
        return [layer.vector_u, layer.kernel]
    return list(getattr(layer, "update_variables", ()))


# Whether denominators are measured in passes in training, whose masks are those of the
# update. Here such a pass can have the same seeds, and has no side effects.
MEASURES_IN_TRAINING = True


def path(variable: Any) -> str:
    """Returns a variable's name, after its layer's; an empty string for a tensor."""
    named = is_variable(variable) or hasattr(variable, "handle")
    return (getattr(variable, "path", None) or variable.name) if named else ""


def is_optimizer(identifier: Any) -> bool:
    return isinstance(identifier, keras.optimizers.Optimizer)


def scale_loss(optimizer: Any, loss: Any) -> Any:
    """Returns the loss, multiplied by the optimizer's scale."""
    return optimizer.scale_loss(loss)


def apply_gradients(optimizer: Any, gradients: list, variables: list) -> None:
    """Make one step of the optimizer, with gradients of the scaled loss."""
    optimizer.apply_gradients(zip(gradients, variables))


def step(optimizer: Any, pairs: list) -> None:
    """Make one step of the optimizer, with pairs of a gradient and its variable."""
    # The method of its class, because the object may have one that accumulates.
    type(optimizer).apply(optimizer, *zip(*pairs))


def add_variable(
    optimizer: Any, shape: tuple, dtype: str, name: str, like: Any = None, **arguments
) -> keras.Variable:
    """Returns a new variable of an optimizer, filled with zeros.

    Args:
        optimizer: The optimizer.
        shape: The variable's shape.
        dtype: Its dtype.
        name: Its name.
        like: A variable whose layout over devices it gets, or None.
        **arguments: Arguments of the optimizer's `add_variable`.
    """
    # Older versions of Keras take the layout from the variable's path.
    if "layout" in inspect.signature(optimizer.add_variable).parameters:
        arguments["layout"] = getattr(like, "_layout", None)
    return optimizer.add_variable(shape, dtype=dtype, name=name, **arguments)


def may_skip(optimizer: Any) -> bool:
    """Whether an optimizer skips updates that are not finite."""
    return _dynamic_scale(optimizer) is not None


def mark(optimizer: Any) -> Any:
    """Returns the current scale of an optimizer that may skip updates, or None."""
    scale = _dynamic_scale(optimizer)
    return None if scale is None else keras.ops.copy(scale.value)


def skipped(optimizer: Any, mark: Any) -> Any:
    """Whether the optimizer skipped an update since `mark`, which lowers its scale."""
    return _dynamic_scale(optimizer).value < mark


def _dynamic_scale(optimizer):
    while optimizer is not None:
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return optimizer.dynamic_scale
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return None


def has_own_scale_loss(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether scaling the loss may read the optimizer's variables."""
    return type(optimizer).scale_loss is not keras.optimizers.Optimizer.scale_loss


def is_seed(variable: keras.Variable) -> bool:
    """Whether a variable is the state of a random seed."""
    return variable.name == "seed_generator_state"


def overwrites(variable: keras.Variable) -> bool:
    """Whether the optimizer assigns a variable its gradient (float8 scales do)."""
    return getattr(variable, "overwrite_with_gradient", False)


def rounds_or_overwrites(model: keras.Model) -> bool:
    """Whether a factor of the loss changes its gradients by more than that factor.

    It does in half precision, which rounds, and in float8, which depends on the largest
    values so far.
    """
    return any(
        layer.compute_dtype in ("float16", "bfloat16") for layer in layers_of(model)
    ) or any(overwrites(variable) for variable in model.trainable_variables)


def steps_per_execution(model: keras.Model) -> int:
    """The number of updates in a call of the train function."""
    return model.steps_per_execution


def public_module(cls: type) -> str:
    """Returns the module from which users import a class, if the class is Keras's."""
    public = getattr(keras, cls.__name__, None)
    return "keras" if public is cls else cls.__module__


def count_update(model: keras.Model) -> None:
    """Count an update for callbacks. On Keras 3 nothing is left to do."""


def build(model: keras.Model, data: Any) -> None:
    """Create the variables of the model, its losses, metrics and optimizer."""
    model._symbolic_build(data_batch=data)


def build_from_values(model: keras.Model, data: Any) -> None:
    """Does the same as `build` for an eager model, which may branch on values."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with StatelessScope():
        y_pred = forward(model, x, training=False)
        if model._compile_metrics is not None and not model._compile_metrics.built:
            model.compute_metrics(x, y, y_pred, sample_weight)
        if model._compile_loss is not None and not model._compile_loss.built:
            model._compute_loss(x, y, y_pred, sample_weight, training=False)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    model._post_build()


def has_known_train_step(model: keras.Model) -> bool:
    """Whether the model's `train_step` does the same as Keras's."""
    return is_keras_own(type(model).train_step)


def check_compiled(model: keras.Model) -> None:
    """Raise if a compiled loss has no known denominator. On Keras 3 all have one."""


def unpack(model: keras.Model, data: Any) -> tuple:
    """Returns inputs, targets and sample weights as the model takes them."""
    return keras.utils.unpack_x_y_sample_weight(data)


def forward(model: keras.Model, x: Any, training: bool) -> Any:
    """Returns the model's predictions."""
    with summed_activity_losses(model):
        return model(x, training=training) if model._call_has_training_arg else model(x)


Normalization = keras.layers.BatchNormalization  # the base of `AccumBatchNormalization`
State = object  # the base of a class that holds its variables


def feature_axis(layer: Any) -> int:
    """Returns the axis of features of a batch normalization layer."""
    return layer.axis


def forget(layer: Any) -> None:
    """Delete attributes that Keras's layer does not have. On Keras 3 there are none."""


def variance_to_move_by(layer: Any, variance: Any, count: Any) -> Any:
    """Returns the variance by which the moving variance moves.

    Args:
        layer: The batch normalization layer.
        variance: The variance of the layer's inputs.
        count: The number of values that it is the variance of.
    """
    return variance


# Before Keras 3.14 an activity regularizer's loss is a sum over the examples.
_SUMS_ACTIVITY_LOSSES = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 14)


@contextmanager
def summed_activity_losses(model: keras.Model) -> Iterator[None]:
    """A context of a forward pass, in which activity losses that are sums get an axis.

    `compute_loss` takes additional losses with axes as sums.
    """
    if not _SUMS_ACTIVITY_LOSSES:
        yield
        return

    def with_axis(regularizer):
        return lambda output: keras.ops.reshape(regularizer(output), (1,))

    regularized = [
        (layer, layer.activity_regularizer)
        for layer in layers_of(model)
        if layer.activity_regularizer is not None
    ]
    for layer, regularizer in regularized:
        layer.activity_regularizer = with_axis(regularizer)
    try:
        yield
    finally:
        for layer, regularizer in regularized:
            layer.activity_regularizer = regularizer


def loss_dtype(loss: keras.losses.Loss) -> str:
    """Returns the dtype that a compiled loss computes in."""
    return loss.dtype


def is_loss_of_keras(loss: keras.losses.Loss) -> bool:
    """Whether Keras's own code computes the values of a loss, and their mask."""
    return is_keras_own(type(loss)) and is_keras_own(getattr(loss, "fn", type(loss)))


def _like(loss: keras.losses.Loss, **attributes: Any) -> keras.losses.Loss:
    """Returns a copy of a loss with other attributes.

    The loss itself may be in use elsewhere.
    """
    other = object.__new__(type(loss))
    other.__dict__.update(loss.__dict__, **attributes)
    for name, value in attributes.items():
        if getattr(other, name) is not value:
            raise ValueError(
                f"The denominator of a loss whose class itself defines `{name}` is not "
                "known: make it an attribute, and pass it to `super().__init__`. "
                f"Received: loss={loss}"
            )
    return other


def denominator(
    loss: keras.losses.Loss, values: Any, y_true: Any, y_pred: Any, sample_weight: Any
) -> Any:
    """Returns the denominator of a loss with a mask or weights.

    It is measured: a loss whose values are all 1 has this ratio of its sum to its mean.

    Args:
        loss: A compiled loss.
        values: Its values, with their mask.
        y_true: The targets that it was called with.
        y_pred: The predictions that it was called with.
        sample_weight: The sample weights that it was called with.
    """
    ones = keras.ops.ones_like(values)
    mask = get_mask(values)
    if mask is not None:
        set_mask(ones, mask)
    if loss.reduction != "mean_with_sample_weight":
        sample_weight = None
    elif _is_number(sample_weight):
        # A weight for each value, because Keras would divide by the one number.
        sample_weight = ones * keras.ops.cast(sample_weight, ones.dtype)
    elif sample_weight is not None:
        # On PyTorch Keras multiplies weights in place.
        sample_weight = keras.ops.copy(sample_weight)

    def reduced(reduction):
        of_ones = _like(loss, reduction=reduction, call=lambda *_: ones)
        return of_ones(y_true, y_pred, sample_weight)

    mean = losses.unscale_loss_for_distribution(reduced(loss.reduction))
    return keras.ops.divide_no_nan(reduced("sum"), mean)


def loss_values(loss: keras.losses.Loss, y_true: Any, y_pred: Any) -> Any:
    """Returns the values of a loss before it is reduced, with their mask."""

    def convert(x):
        return keras.ops.convert_to_tensor(x, dtype=loss.dtype)

    return loss.call(
        keras.tree.map_structure(convert, y_true),
        keras.tree.map_structure(convert, y_pred),
    )


def _update_loss(model: keras.Model, loss: Any, examples: Any) -> None:
    loss = losses.unscale_loss_for_distribution(loss)
    model._loss_tracker.update_state(loss, sample_weight=examples)


def metric_types(model: keras.Model) -> set[type]:
    """Returns the classes of a model's metrics, also of the compiled metrics."""
    return {
        type(each)
        for metric in model.metrics
        for each in (metric, *getattr(metric, "metrics", ()))
    }


_number_weight: ContextVar[Any] = ContextVar("number_weight")
# The micro-batch's sample weights that are one number, the weight of each example.
_weights_of_each: ContextVar[list] = ContextVar("weights_of_each")
# The metrics that were updated by a number; None if nobody asks.
_numbers_seen: ContextVar[list | None] = ContextVar("numbers_seen", default=None)


def _is_number(tensor: Any) -> bool:
    return tensor is not None and len(np.shape(tensor)) == 0


class _AveragesNumbers(keras.metrics.Mean):
    """A mean in which one number for a micro-batch has the weight `_number_weight`.

    In Keras's `Mean` a number has the weight 1: those of the micro-batches of an update
    would weigh more than the one number of the batch.
    """

    def update_state(self, values, sample_weight=None):
        of_each = any(sample_weight is weight for weight in _weights_of_each.get())
        if _is_number(values) and (sample_weight is None or of_each):
            share = _number_weight.get()
            sample_weight = share * sample_weight if of_each else share
            seen = _numbers_seen.get()
            if seen is not None:
                seen.append(self)
        elif of_each and get_mask(values) is None:
            examples = keras.ops.shape(values)[:1]
            sample_weight = keras.ops.broadcast_to(sample_weight, examples)
        return super().update_state(values, sample_weight)


@functools.cache
def _averaging(cls: Any) -> Any:
    """Returns a subclass of a metric's class, with ours before Keras's `Mean`."""
    bases = (
        (_AveragesNumbers,) if cls is keras.metrics.Mean else (cls, _AveragesNumbers)
    )
    return type(cls.__name__, bases, {"__module__": cls.__module__})


def _means(model: keras.Model) -> list:
    """Returns the model's metrics that average values, without those of losses."""
    compiled = model._compile_loss
    losses_own = [model._loss_tracker, *(compiled.metrics if compiled else [])]
    found = {
        id(each): each
        for metric in model.metrics
        for each in (metric, *getattr(metric, "metrics", ()))
        if isinstance(each, keras.metrics.Mean)
    }
    return [m for key, m in found.items() if key not in set(map(id, losses_own))]


@contextmanager
def weighing_numbers(
    model: keras.Model, weight: Any, sample_weight: Any
) -> Iterator[None]:
    """A context that updates metrics: one number for a micro-batch weighs `weight`.

    Metrics have another class meanwhile, because a user's class calls Keras's by
    `super()`.

    Args:
        model: A compiled model.
        weight: The micro-batch's part of the batch's weight.
        sample_weight: Nested sample weights. A number among them weighs each example,
            because other micro-batches may have more examples.
    """
    means = _means(model)
    classes: list[Any] = [type(metric) for metric in means]
    token = _number_weight.set(weight)
    numbers = [each for each in keras.tree.flatten(sample_weight) if _is_number(each)]
    of_each = _weights_of_each.set(numbers)
    for metric, cls in zip(means, classes):
        metric.__class__ = _averaging(cls)
    try:
        yield
    finally:
        for metric, cls in zip(means, classes):
            metric.__class__ = cls
        _weights_of_each.reset(of_each)
        _number_weight.reset(token)


def may_average_numbers(model: keras.Model, y_pred: Any) -> bool:
    """Whether a metric may average one number for a whole micro-batch.

    The metrics that Keras has classes for average a value for each example, if
    predictions have an axis after the first.
    """
    wrapper = keras.metrics.MeanMetricWrapper
    flat = any(len(each.shape) < 2 for each in keras.tree.flatten(y_pred))
    return any(
        flat
        or type(metric) is wrapper
        or not isinstance(metric, wrapper)
        or not is_keras_own(type(metric))
        for metric in _means(model)
    )


def averages_numbers(model: keras.Model, microbatch: tuple, additional: list) -> bool:
    """Whether a metric averages one number for a micro-batch, found out by a call.

    The call must be in a stateless scope.

    Args:
        model: A compiled model.
        microbatch: Inputs, targets, predictions and sample weights of a micro-batch.
        additional: As for `compute_loss`.
    """
    zero_metrics(model)
    seen: list = []
    token = _numbers_seen.set(seen)
    try:
        loss = compute_loss(model, microbatch, additional, 1.0, None)
        update_metrics(model, microbatch, loss, 1, 1.0)
    finally:
        _numbers_seen.reset(token)
    return bool(seen)


def has_own_metrics(model: keras.Model) -> bool:
    """Whether the model has its own `compute_metrics`, which alone knows the logs."""
    return not is_keras_own(type(model).compute_metrics)


def update_metrics(
    model: keras.Model, microbatch: tuple, loss: Any, examples: Any, share: Any
) -> dict:
    """Add a micro-batch to the metrics.

    Args:
        model: A compiled model.
        microbatch: The inputs, targets, predictions and sample weights.
        loss: The micro-batch's loss.
        examples: The number of its examples.
        share: Its part of the batch's examples.

    Returns:
        The logs, if the model has its own `compute_metrics`; else an empty dictionary.
    """
    x, y, y_pred, sample_weight = microbatch
    with weighing_numbers(model, share, sample_weight):
        if has_own_metrics(model):
            _update_loss(model, loss, examples)
            return model.compute_metrics(x, y, y_pred, sample_weight)
        # Keras's `compute_metrics` also computes results, which are needed only once.
        if model._compile_metrics is not None:
            model._compile_metrics.update_state(y, y_pred, sample_weight)
    return {}


def metrics_result(model: keras.Model) -> dict:
    """Returns the values of the model's metrics on this process's data.

    Newer versions of Keras on PyTorch sum each variable over processes.
    """
    return Trainer.get_metrics_result(model)


def logs(model: keras.Model, own: dict, loss: Any, examples: Any) -> dict:
    """Returns the logs of an update, after its last micro-batch.

    Args:
        model: A compiled model.
        own: The logs that `update_metrics` returned for the last micro-batch.
        loss: The batch's loss.
        examples: The number of examples in the batch.
    """
    if has_own_metrics(model):
        return own
    _update_loss(model, loss, examples)
    return model.get_metrics_result()


def accumulator_dtype(variable: keras.Variable, accum_dtype: str) -> str:
    """Returns the dtype in which a variable's gradients are summed."""
    return "float64" if variable.dtype == "float64" else accum_dtype


def has_compiled_losses(model: keras.Model) -> bool:
    return model._compile_loss is not None


def compiled_loss_is_all(model: keras.Model) -> bool:
    """Whether compiled losses and `add_loss` alone determine the loss and the logs."""
    return is_keras_own(model.compute_loss) and not has_own_metrics(model)


def records_shares(model: keras.Model, y: Any) -> bool:
    """Whether compiled losses are recorded with the micro-batch's share as weight.

    They are if there are several, because each then has an entry in the logs.
    """
    return bool(model._compile_loss.metrics)


def compute_loss(
    model: keras.Model,
    microbatch: tuple,
    additional: list,
    share: Any,
    weigh: Callable | None,
) -> Any:
    """Returns a micro-batch's loss: times `share`, it is a part of the batch's loss.

    Args:
        model: A compiled model.
        microbatch: The inputs, targets, predictions and sample weights.
        additional: The additional losses of the micro-batch's forward pass,
            `model.losses`.
        share: The micro-batch's part of the batch's examples.
        weigh: Function of a compiled loss that returns the function to call instead; or
            None to call the losses themselves.
    """
    # Keras sums an additional loss with axes: its sums on micro-batches add up. One
    # without axes is taken as a mean over examples.
    x, y, y_pred, sample_weight = microbatch
    additional = [loss / share if len(loss.shape) else loss for loss in additional]
    model._losses_override.clear()
    model._losses_override.extend(additional)
    try:
        with (
            _weighed(model, share, weigh),
            weighing_numbers(model, share, sample_weight),
        ):
            return model._compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )
    finally:
        model._losses_override.clear()


def numerator(loss: keras.losses.Loss, y_true, y_pred, sample_weight=None) -> Any:
    """Returns the numerator of a loss: the loss with the reduction `sum`."""
    value = _like(loss, reduction="sum")(y_true, y_pred, sample_weight)
    if loss.reduction == "sum":
        return value
    return losses.scale_loss_for_distribution(value)


def taken_apart(loss: keras.losses.Loss, y_true, y_pred, sample_weight=None) -> tuple:
    """Returns the numerator and the denominator of a loss, from one call."""
    kept: list = []

    def call(*args):
        kept.append(loss.call(*args))
        return kept[-1]

    keeping = _like(loss, call=call)
    given = y_true, y_pred, sample_weight
    value = numerator(keeping, *given)
    return value, denominator(loss, kept[-1], *given)


@contextmanager
def _weighed(model: keras.Model, share: Any, weigh: Callable | None) -> Iterator[None]:
    """A context of `_compute_loss`: see `compute_loss`."""
    if not has_compiled_losses(model):
        yield
        return

    def counting_once(update_state):
        # If Keras does not know the size of a batch, the batch has the weight 1, and
        # the micro-batch has its share of that.
        def update(values, sample_weight=None):
            weight = share if sample_weight is None else sample_weight
            update_state(values, sample_weight=weight)

        return update

    with ExitStack() as stack:
        for metric in model._compile_loss.metrics:
            update = counting_once(metric.update_state)
            stack.enter_context(with_attribute(metric, "update_state", update))
        if weigh is not None:
            stack.enter_context(replaced_losses(model, weigh))
        yield


@contextmanager
def replaced_losses(model: keras.Model, replace: Callable) -> Iterator[None]:
    """A context in which `replace(loss)` stands in for each compiled loss."""
    compiled = model._compile_loss
    original = compiled._flat_losses
    compiled._flat_losses = [
        entry._replace(loss=replace(entry.loss)) for entry in original
    ]
    try:
        yield
    finally:
        compiled._flat_losses = original


def standing_in(model: keras.Model, stand_in: Callable, microbatch: tuple) -> list:
    """Compute the loss with stand-ins for the compiled losses, in a stateless scope.

    Each stand-in gets the outputs, targets and weights of its loss. A model's own
    `compute_loss` may change them, or call a loss several times.

    Args:
        model: A compiled model.
        stand_in: Function of a loss that returns a stand-in, which is called instead.
        microbatch: Inputs, targets, predictions and sample weights of a micro-batch.

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
        for metric in model._compile_loss.metrics:
            stack.enter_context(
                with_attribute(metric, "update_state", lambda *_, **__: None)
            )
        stack.enter_context(replaced_losses(model, replace))
        if is_keras_own(model.compute_loss):
            model._compile_loss(y, y_pred, sample_weight)
        else:
            zero_metrics(model)
            model._compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )
    return made


def zero_metrics(model: keras.Model) -> None:
    """Set metrics to 0 in a stateless scope. In `fit` on JAX they have no values."""
    scope = get_stateless_scope()
    for variable in model.metrics_variables:
        scope.add_update((variable, keras.ops.zeros(variable.shape, variable.dtype)))
