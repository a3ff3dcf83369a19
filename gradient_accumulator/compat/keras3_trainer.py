"""Functions for what Keras 3's `Trainer` keeps private, for every backend here."""

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

# Of a functional model that accumulates. Keras saves where a class is from and its
# name: of its own class, which loads the file where this package is not imported.
FUNCTIONAL_NAME = Functional.__name__

StatelessScope: Any = backend.StatelessScope
in_stateless_scope = backend.in_stateless_scope
get_stateless_scope: Any = backend.get_stateless_scope
compute_output_spec: Any = backend.compute_output_spec
get_mask = backend.get_keras_mask
set_mask = backend.set_keras_mask
print_message: Callable[[str], None] = print_msg  # where Keras shows how it goes on


def is_keras_own(function: Callable) -> bool:
    """Whether a method comes from Keras itself, not from a user's subclass."""
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] == "keras"


def layers_of(model: keras.Model) -> list:
    """The model and all its layers, at any depth."""
    return list(model._flatten_layers())


def rename(layer: Any, name: str) -> None:
    """Give a layer another name."""
    layer.name = name


def constructor(finish: Callable) -> Callable:
    """The constructor of a functional model, which calls `finish` with the model.

    Keras clones and saves by its graph a model whose constructor looks like its own.
    """

    def __init__(self, inputs, outputs, name=None, **kwargs):
        Functional.__init__(self, inputs, outputs, name=name, **kwargs)
        finish(self)

    # In some versions its own is decorated.
    return (
        _wrapped(__init__) if hasattr(Functional.__init__, "__wrapped__") else __init__
    )


def register(cls: type) -> None:
    """Let a class be found by its bare name too, which no format needs."""


def _wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def copy_adapted(original: Any, layer: Any) -> None:
    """Give a preprocessing layer what another has learned of data beside variables."""
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


def same_inputs(model: keras.Model, made: dict[int, Any]) -> Any:
    """Inputs for a copy of a functional model, with the names of its own.

    Args:
        model: The functional model.
        made: Input layers of copies by the `id` of their originals; new ones are added.
    """

    def same(tensor):
        layer = tensor._keras_history.operation
        if id(layer) not in made:
            new = keras.Input(
                batch_shape=tensor.shape, dtype=tensor.dtype, name=layer.name
            )
            made[id(layer)] = new._keras_history.operation
        return made[id(layer)].output

    return keras.tree.map_structure(same, model.input)


def has_static_inputs(model: keras.Model) -> bool:
    """Whether the model takes one shape only, but for the number of examples."""
    return type(model).call is Functional.call and all(
        None not in tensor.shape[1:] for tensor in model.inputs
    )


def is_variable(thing: Any) -> bool:
    return isinstance(thing, keras.Variable)


def value(variable: keras.Variable) -> Any:
    return variable.value


def native(variable: keras.Variable) -> Any:
    """The backend's own variable."""
    return variable.value


def moved_by_microbatches(model: keras.Model) -> list:
    """The variables that forward passes move: seeds, statistics and the like.

    Not what a frozen layer created as trainable, which may be most of a model.
    """
    frozen = {id(v) for layer in layers_of(model) for v in layer._trainable_variables}
    return [v for v in model.non_trainable_variables if id(v) not in frozen]


def metrics_variables(model: keras.Model) -> list:
    return model.metrics_variables


def update_variables(layer: Any) -> list:
    """What a layer moves in training by itself, whatever the data: see
    `statistics.py`."""
    if isinstance(layer, keras.layers.SpectralNormalization):
        return [layer.vector_u, layer.kernel]
    return list(getattr(layer, "update_variables", ()))


# Whether denominators are measured with the masks that training makes: with the same
# seeds, and without effects.
MEASURES_IN_TRAINING = True


def path(variable: Any) -> str:
    """The name with the layer's in front; nothing for a tensor."""
    named = is_variable(variable) or hasattr(variable, "handle")
    return (getattr(variable, "path", None) or variable.name) if named else ""


def is_optimizer(identifier: Any) -> bool:
    return isinstance(identifier, keras.optimizers.Optimizer)


def scale_loss(optimizer: Any, loss: Any) -> Any:
    """The loss as large as the optimizer wants its gradients to be."""
    return optimizer.scale_loss(loss)


def apply_gradients(optimizer: Any, gradients: list, variables: list) -> None:
    """One step of the optimizer, with gradients of the scaled loss."""
    optimizer.apply_gradients(zip(gradients, variables))


def step(optimizer: Any, pairs: list) -> None:
    """One step of the optimizer, with gradients as they are."""
    # By its class's method, for the object may have the accumulating one.
    type(optimizer).apply(optimizer, *zip(*pairs))


def add_variable(
    optimizer: Any, shape: tuple, dtype: str, name: str, like: Any = None, **arguments
) -> keras.Variable:
    """A new variable of an optimizer, of zeros.

    Args:
        optimizer: Whose it is.
        shape: Its shape.
        dtype: Its dtype.
        name: Its name.
        like: A variable that has the same place.
        **arguments: Of `add_variable`.
    """
    # Older versions of Keras take the layout from the variable's path.
    if "layout" in inspect.signature(optimizer.add_variable).parameters:
        arguments["layout"] = getattr(like, "_layout", None)
    return optimizer.add_variable(shape, dtype=dtype, name=name, **arguments)


def may_skip(optimizer: Any) -> bool:
    """Whether an optimizer skips updates that are not finite."""
    return _dynamic_scale(optimizer) is not None


def mark(optimizer: Any) -> Any:
    """Where an optimizer stands that may skip an update; None for any other."""
    scale = _dynamic_scale(optimizer)
    return None if scale is None else keras.ops.copy(scale.value)


def skipped(optimizer: Any, mark: Any) -> Any:
    """Whether it skipped the update since: it then lowers the scale."""
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
    """Whether gradients depend on more than a factor on how large the loss is: in half
    precision, or in float8 by the largest value so far."""
    return any(
        layer.compute_dtype in ("float16", "bfloat16") for layer in layers_of(model)
    ) or any(overwrites(variable) for variable in model.trainable_variables)


def steps_per_execution(model: keras.Model) -> int:
    """The number of updates in a call of the train function."""
    return model.steps_per_execution


def public_module(cls: type) -> str:
    """Where a class can be imported from, if it is Keras's and has such a place."""
    public = getattr(keras, cls.__name__, None)
    return "keras" if public is cls else cls.__module__


def count_update(model: keras.Model) -> None:
    """Count an update where Keras counts for callbacks: nothing in Keras 3."""


def build(model: keras.Model, data: Any) -> None:
    """Create the variables of the model, its losses, metrics and optimizer."""
    model._symbolic_build(data_batch=data)


def build_from_values(model: keras.Model, data: Any) -> None:
    """`build` for a model that runs eagerly, and may branch on its data's values."""
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
    """Whether its `train_step` does what Keras's does."""
    return is_keras_own(type(model).train_step)


def check_compiled(model: keras.Model) -> None:
    """Raise if what the model is compiled with cannot be taken apart."""


def unpack(model: keras.Model, data: Any) -> tuple:
    """Inputs, targets and sample weights, as the model takes them."""
    return keras.utils.unpack_x_y_sample_weight(data)


def forward(model: keras.Model, x: Any, training: bool) -> Any:
    with summed_activity_losses(model):
        return model(x, training=training) if model._call_has_training_arg else model(x)


Normalization = keras.layers.BatchNormalization  # that ours is made of
State = object  # what holds variables of it


def feature_axis(layer: Any) -> int:
    """The axis of features of a batch normalization layer."""
    return layer.axis


def forget(layer: Any) -> None:
    """Leave of a layer what Keras's own has, before it is one."""


def variance_to_move_by(layer: Any, variance: Any, count: Any) -> Any:
    """The variance that the moving variance takes, from that of `count` values."""
    return variance


# Before Keras 3.14 an activity regularizer's loss is a sum over the examples.
_SUMS_ACTIVITY_LOSSES = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 14)


@contextmanager
def summed_activity_losses(model: keras.Model) -> Iterator[None]:
    """Around a forward pass: sums over examples come with an axis, as all sums do."""
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
    """The dtype that a compiled loss computes in."""
    return loss.dtype


def is_loss_of_keras(loss: keras.losses.Loss) -> bool:
    """Whether Keras's own code computes a loss's values, and their mask."""
    return is_keras_own(type(loss)) and is_keras_own(getattr(loss, "fn", type(loss)))


def _like(loss: keras.losses.Loss, **attributes: Any) -> keras.losses.Loss:
    """A loss with other attributes. The loss itself may be in use elsewhere."""
    other = object.__new__(type(loss))
    other.__dict__.update(loss.__dict__, **attributes)
    for name, value in attributes.items():
        if getattr(other, name) is not value:
            raise ValueError(
                f"A loss whose class defines `{name}` otherwise than Keras's cannot be "
                "taken apart: make it an attribute, which its constructor hands to "
                f"`super().__init__`. Received: loss={loss}"
            )
    return other


def denominator(
    loss: keras.losses.Loss, values: Any, y_true: Any, y_pred: Any, sample_weight: Any
) -> Any:
    """The denominator of a loss with a mask or weights.

    Keras says it: the sum of a loss whose values are all 1, over its mean.

    Args:
        loss: A compiled loss.
        values: Its values, with their mask.
        y_true: The targets that it was called with.
        y_pred: The predictions.
        sample_weight: The sample weights.
    """
    ones = keras.ops.ones_like(values)
    mask = get_mask(values)
    if mask is not None:
        set_mask(ones, mask)
    if loss.reduction != "mean_with_sample_weight":
        sample_weight = None
    elif _is_number(sample_weight):
        # The weight of each value: Keras would divide by one number for all.
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
    """A loss before it is reduced, with its mask."""

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
    """The classes of a model's metrics, also of those that it was compiled with."""
    return {
        type(each)
        for metric in model.metrics
        for each in (metric, *getattr(metric, "metrics", ()))
    }


_number_weight: ContextVar[Any] = ContextVar("number_weight")
# The micro-batch's sample weights that are one number.
_weights_of_each: ContextVar[list] = ContextVar("weights_of_each")
# The metrics that were updated by a number, where that is asked for.
_numbers_seen: ContextVar[list | None] = ContextVar("numbers_seen", default=None)


def _is_number(tensor: Any) -> bool:
    return tensor is not None and len(np.shape(tensor)) == 0


class _AveragesNumbers(keras.metrics.Mean):
    """A mean in which one number for a micro-batch weighs as its update says.

    In Keras's each counts 1, so that those of an update would count more than the one
    of its batch.
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
    """A class of metrics that lies between a class and Keras's `Mean`."""
    bases = (
        (_AveragesNumbers,) if cls is keras.metrics.Mean else (cls, _AveragesNumbers)
    )
    return type(cls.__name__, bases, {"__module__": cls.__module__})


def _means(model: keras.Model) -> list:
    """The model's metrics that average what they are given, but for losses' own."""
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
    """Around what updates metrics: one number for a micro-batch weighs `weight`.

    A sample weight that is one number weighs each example, of which other micro-batches
    may have more.

    A metric has another class meanwhile, for a class of the user's calls that of Keras
    by `super()`.
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
    """Whether a metric may average numbers that are each of a whole micro-batch.

    Those that Keras has classes for average a value of each example, if predictions
    have an axis besides.
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
    """Whether some do, learnt from a call in a stateless scope.

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
    """Whether only the model's own `compute_metrics` knows what the logs are."""
    return not is_keras_own(type(model).compute_metrics)


def update_metrics(
    model: keras.Model, microbatch: tuple, loss: Any, examples: Any, share: Any
) -> dict:
    """Add a micro-batch to the metrics; returns the logs if they are the model's own.

    Args:
        model: A compiled model.
        microbatch: Its inputs, targets, predictions and sample weights.
        loss: Its loss.
        examples: Number of its examples.
        share: The micro-batch's part of the batch's examples.
    """
    x, y, y_pred, sample_weight = microbatch
    with weighing_numbers(model, share, sample_weight):
        if has_own_metrics(model):
            _update_loss(model, loss, examples)
            return model.compute_metrics(x, y, y_pred, sample_weight)
        # What Keras's own does but for the results, which only the last micro-batch's
        # count.
        if model._compile_metrics is not None:
            model._compile_metrics.update_state(y, y_pred, sample_weight)
    return {}


def metrics_result(model: keras.Model) -> dict:
    """The values of the model's metrics, of this process's data only.

    Newer Keras on PyTorch sums over processes, a variable at a time.
    """
    return Trainer.get_metrics_result(model)


def logs(model: keras.Model, own: dict, loss: Any, examples: Any) -> dict:
    """The logs of an update, after its last micro-batch.

    Args:
        model: A compiled model.
        own: What `update_metrics` returned for the last micro-batch.
        loss: The batch's loss.
        examples: Number of its examples.
    """
    if has_own_metrics(model):
        return own
    _update_loss(model, loss, examples)
    return model.get_metrics_result()


def accumulator_dtype(variable: keras.Variable, accum_dtype: str) -> str:
    """The dtype that a variable's gradients are summed in."""
    return "float64" if variable.dtype == "float64" else accum_dtype


def has_compiled_losses(model: keras.Model) -> bool:
    return model._compile_loss is not None


def compiled_loss_is_all(model: keras.Model) -> bool:
    """Whether a loss and logs come from nothing but a compiled loss and `add_loss`."""
    return is_keras_own(model.compute_loss) and not has_own_metrics(model)


def records_shares(model: keras.Model, y: Any) -> bool:
    """Whether compiled losses are recorded by what a micro-batch's share is.

    So they are where there are several, each with an entry in the logs.
    """
    return bool(model._compile_loss.metrics)


def compute_loss(
    model: keras.Model,
    microbatch: tuple,
    additional: list,
    share: Any,
    weigh: Callable | None,
) -> Any:
    """A micro-batch's loss, of which `share` is its part of the batch's loss.

    Args:
        model: A compiled model.
        microbatch: Its inputs, targets, predictions and sample weights.
        additional: The additional losses of the micro-batch's forward pass,
            `model.losses`.
        share: The micro-batch's part of the batch's examples.
        weigh: Function of a compiled loss that returns what is called in its place,
            or None if they are called themselves.
    """
    # Keras sums an additional loss with axes, so that micro-batches of it add up. One
    # without is taken as a mean over examples.
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
    """A loss before it is divided by anything."""
    value = _like(loss, reduction="sum")(y_true, y_pred, sample_weight)
    if loss.reduction == "sum":
        return value
    return losses.scale_loss_for_distribution(value)


def taken_apart(loss: keras.losses.Loss, y_true, y_pred, sample_weight=None) -> tuple:
    """A loss's numerator and its denominator, from one call."""
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
    if not has_compiled_losses(model):
        yield
        return

    def counting_once(update_state):
        # Where Keras does not know the size of the batch either, it gives it a
        # weight of 1, of which the micro-batch has its share.
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
    """The model with each of its compiled losses replaced by `replace(loss)`."""
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
    """Call the compiled losses with stand-ins; returns them, one for each call.

    Keras takes outputs, targets and weights apart for each loss, and a model's own
    `compute_loss` may give it others than it got. Call it in a stateless scope.

    Args:
        model: A compiled model.
        stand_in: Makes what is called in the place of a loss.
        microbatch: Inputs, targets, predictions and sample weights of a micro-batch.
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
    """Give metrics values in a stateless scope: during `fit` on JAX they have none."""
    scope = get_stateless_scope()
    for variable in model.metrics_variables:
        scope.add_update((variable, keras.ops.zeros(variable.shape, variable.dtype)))
