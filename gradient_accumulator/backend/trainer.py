"""What Keras 3's `Trainer` keeps private, and every backend here needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
from keras.src import backend
from keras.src.losses import loss as losses
from keras.src.models.functional import Functional as Functional
from keras.src.trainers.trainer import Trainer

StatelessScope = backend.StatelessScope
compute_output_spec = backend.compute_output_spec
get_mask = backend.get_keras_mask
set_mask = backend.set_keras_mask
apply_mask = losses.apply_mask


def is_keras_own(function: Callable) -> bool:
    """Whether a method comes from Keras itself, not from a user's subclass."""
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] == "keras"


def layers_of(model: keras.Model) -> list:
    """The model and all its layers, at any depth."""
    return list(model._flatten_layers())


def same_inputs(model: keras.Model) -> Any:
    """New inputs for a functional model, with the names of its own."""

    def same(tensor):
        layer = tensor._keras_history.operation
        return keras.Input(
            batch_shape=tensor.shape, dtype=tensor.dtype, name=layer.name
        )

    return keras.tree.map_structure(same, model.input)


def has_static_inputs(model: keras.Model) -> bool:
    """Whether the model takes one shape only, but for the number of examples."""
    return type(model).call is Functional.call and all(
        None not in tensor.shape[1:] for tensor in model.inputs
    )


@contextmanager
def with_attribute(instance: Any, name: str, value: Any) -> Iterator[None]:
    """The instance with another attribute, of its own."""
    own = name in instance.__dict__
    before = instance.__dict__.get(name)
    setattr(instance, name, value)
    try:
        yield
    finally:
        if own:
            setattr(instance, name, before)
        else:
            delattr(instance, name)


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


def build(model: keras.Model, data: Any) -> None:
    """Create the variables of the model, its losses, metrics and optimizer."""
    model._symbolic_build(data_batch=data)


def build_from_values(model: keras.Model, data: Any) -> None:
    """The same where the model runs eagerly, and may branch on its data's values."""
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


def forward(model: keras.Model, x: Any, training: bool) -> Any:
    with summed_activity_losses(model):
        return model(x, training=training) if model._call_has_training_arg else model(x)


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


def has_own_metrics(model: keras.Model) -> bool:
    """Whether only the model's own `compute_metrics` knows what the logs are."""
    return not is_keras_own(type(model).compute_metrics)


def update_metrics(model: keras.Model, piece: tuple, loss: Any, examples: Any) -> dict:
    """Add a piece to the metrics; returns the logs if they are the model's own.

    Args:
        model: A compiled model.
        piece: Its inputs, targets, predictions and sample weights.
        loss: Its loss.
        examples: Number of its examples.
    """
    x, y, y_pred, sample_weight = piece
    if has_own_metrics(model):
        _update_loss(model, loss, examples)
        return model.compute_metrics(x, y, y_pred, sample_weight)
    # What Keras's own does but for the results, which only the last piece's count.
    if model._compile_metrics is not None:
        model._compile_metrics.update_state(y, y_pred, sample_weight)
    return {}


def metrics_result(model: keras.Model) -> dict:
    """The values of the model's metrics, of this process's data only."""
    # Newer Keras on PyTorch sums over processes, a variable at a time.
    if is_keras_own(type(model).get_metrics_result):
        return Trainer.get_metrics_result(model)
    return type(model).get_metrics_result(model)


def logs(model: keras.Model, own: dict, loss: Any, examples: Any) -> dict:
    """The logs of an update, after its last piece.

    Args:
        model: A compiled model.
        own: What `update_metrics` returned for the last piece.
        loss: The full batch's loss.
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


def records_each_loss(model: keras.Model) -> bool:
    """Whether there are several compiled losses, each with an entry in the logs."""
    return bool(model._compile_loss.metrics)


def compute_loss(
    model: keras.Model,
    piece: tuple,
    additional: list,
    share: Any,
    weigh: Callable | None,
) -> Any:
    """A piece's loss, of which `share` is its part of the full batch's loss.

    Args:
        model: A compiled model.
        piece: Its inputs, targets, predictions and sample weights.
        additional: The additional losses of the piece's forward pass, `model.losses`.
        share: The piece's part of the full batch's examples.
        weigh: Function of a compiled loss that returns what is called in its place,
            or None if they are called themselves.
    """
    # Keras sums an additional loss with axes, so that pieces of it add up. One
    # without is taken as a mean over examples.
    x, y, y_pred, sample_weight = piece
    additional = [loss / share if len(loss.shape) else loss for loss in additional]
    model._losses_override.clear()
    model._losses_override.extend(additional)
    try:
        with _weighed(model, share, weigh):
            return model._compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )
    finally:
        model._losses_override.clear()


def numerator(loss: keras.losses.Loss, y_true, y_pred, sample_weight=None) -> Any:
    """A loss before it is divided by anything."""
    reduction, loss.reduction = loss.reduction, "sum"
    try:
        value = loss(y_true, y_pred, sample_weight)
    finally:
        loss.reduction = reduction
    return value if reduction == "sum" else losses.scale_loss_for_distribution(value)


@contextmanager
def _weighed(model: keras.Model, share: Any, weigh: Callable | None) -> Iterator[None]:
    if not has_compiled_losses(model):
        yield
        return

    def counting_once(update_state):
        # Where Keras does not know the size of the full batch either, it gives it a
        # weight of 1, of which the piece has its share.
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


def standing_in(model: keras.Model, stand_in: Callable, y, y_pred, sample_weight):
    """Call the compiled losses with stand-ins for them; returns the stand-ins.

    Keras takes outputs, targets and weights apart for each loss; nothing is recorded.
    """
    made: list = []

    def replace(loss):
        made.append(stand_in(loss))
        return made[-1]

    with ExitStack() as stack:
        for metric in model._compile_loss.metrics:
            stack.enter_context(
                with_attribute(metric, "update_state", lambda *_, **__: None)
            )
        stack.enter_context(replaced_losses(model, replace))
        model._compile_loss(y, y_pred, sample_weight)
    return made
