"""Functions that replace and restore the batch normalization layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gradient_accumulator.checks import check_is_model
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras, ops
from gradient_accumulator.fit import accumulate_as, accumulation_of, own_class
from gradient_accumulator.layers import AccumBatchNormalization
from gradient_accumulator.received import described
from gradient_accumulator.settings import positive_int
from gradient_accumulator.statistics import normalizations


def replace_batchnorm_layers(
    model: keras.Model, accum_steps: int = 1, position: str = "replace"
) -> keras.Model:
    """Copy a model, with `AccumBatchNormalization` for each `BatchNormalization`.

    Layers are replaced at any depth: in nested models, in wrappers such as
    `TimeDistributed`, and in layers of your own. The copy computes the same outputs,
    and accumulates as the model does. It has the same weights, moving statistics,
    names, settings and trainable flags, and shares layers between nested models as the
    model does. The model itself does not change. `keras.models.clone_model` decides
    whether the copy has a compile state; compile it before you train it.

    Args:
        model: A functional or Sequential model, or a subclassed one that Keras can make
            again from its `get_config`.
        accum_steps: Positive int, the argument of each `AccumBatchNormalization`: the
            number of micro-batches in an update. A model that trains in micro-batches
            ignores it.
        position: No longer needed. Only `"replace"` is allowed.

    Returns:
        The new model.

    Raises:
        TypeError: If `model` is no Keras model, or `accum_steps` no int.
        ValueError: If a layer cannot be made again, or is an instance of a subclass of
            `BatchNormalization`, which may compute something else.

    Example:

    ```python
    model = keras.applications.MobileNetV2(weights=None)
    model = replace_batchnorm_layers(model)
    model = accumulate(model, microbatch_size=8)
    ```
    """
    accum_steps = positive_int("accum_steps", accum_steps)
    if position != "replace":
        raise ValueError(
            "Argument `position` must be 'replace'. "
            f"Received: position={described(position)}"
        )

    def replace(layer):
        if isinstance(layer, AccumBatchNormalization):
            layer.accum_steps = accum_steps
        elif type(layer) is keras.layers.BatchNormalization:
            _check_renorm(layer)
            AccumBatchNormalization.take_over(layer, accum_steps)
        elif isinstance(layer, keras.layers.BatchNormalization):
            raise ValueError(
                "A subclass of `BatchNormalization` cannot be replaced, because it may "
                "compute something else. "
                f"Received: layer={layer} (of type {type(layer)})"
            )

    return _copied(model, replace)


def restore_batchnorm_layers(model: keras.Model) -> keras.Model:
    """Copy a model, with Keras's `BatchNormalization` again, for deployment.

    This undoes `replace_batchnorm_layers`. The copy computes the same outputs in
    inference, and its file loads without this package.

    Args:
        model: As for `replace_batchnorm_layers`.

    Returns:
        The new model.

    Raises:
        TypeError, ValueError: As in `replace_batchnorm_layers`.

    Example:

    ```python
    restore_batchnorm_layers(model).save("model.keras")
    ```
    """

    def restore(layer):
        if isinstance(layer, AccumBatchNormalization):
            layer.hand_over()

    return _copied(model, restore)


def _copied(model, change: Callable[[Any], None]) -> keras.Model:
    """Returns a copy of a model, after `change` was called on each layer of it."""
    check_is_model(model)
    if not model.built:
        raise ValueError(
            "Argument `model` must be a built model: call the model on data, or begin "
            f"it with an `Input`. Received: model={model}"
        )
    copy = _clone(model, made={})
    originals, layers = trainer.layers_of(model), trainer.layers_of(copy)
    if [_kind(x) for x in originals] != [_kind(x) for x in layers] or [
        tuple(w.shape) for w in model.weights
    ] != [tuple(w.shape) for w in copy.weights]:
        raise _not_rebuilt(model)
    for original, layer in zip(originals, layers):
        # Layers that another layer's constructor made have new names.
        trainer.rename(layer, original.name)
        # An outer layer comes before its inner ones, and sets their flags too.
        layer.trainable = original.trainable
        if type(original) is AccumBatchNormalization is not type(layer):
            AccumBatchNormalization.take_over(layer, *original.settings)
    for variable, original in zip(copy.variables, model.variables):
        # Variables include seeds. A copy, because JAX may reuse a variable's memory.
        variable.assign(ops.copy(trainer.value(original)))
        if variable.trainable != original.trainable:
            variable.trainable = original.trainable
    for original, layer in zip(originals, layers):
        trainer.copy_adapted(original, layer)
    for layer in layers:
        change(layer)
    accumulation = accumulation_of(model)
    return copy if accumulation is None else accumulate_as(copy, accumulation)


def _kind(layer):
    """Returns the class of a layer, which is Keras's for `AccumBatchNormalization`."""
    is_own = type(layer) is AccumBatchNormalization
    return keras.layers.BatchNormalization if is_own else own_class(layer)


def _clone(model, made: dict[int, Any]):
    """Returns a copy of a model.

    Args:
        model: The model.
        made: The copied layers by the `id` of their originals, so that the copy shares
            the layers that the model, and models in it, share.
    """
    copy_layer = partial(_copy_once, made=made)
    if trainer.is_keras_own(type(model)) and isinstance(model, keras.Sequential):
        return keras.models.clone_model(model, clone_function=copy_layer)
    if trainer.is_keras_own(type(model)) and isinstance(model, trainer.Functional):
        return keras.models.clone_model(
            model, trainer.copied_inputs(model, made), clone_function=copy_layer
        )
    copy = _from_config(model)
    if copy.built:
        return copy
    try:
        copy.build_from_config(model.get_build_config())
    except Exception as error:  # a user's model may raise anything
        raise _not_rebuilt(model) from error
    return copy


def _copy_once(layer, made):
    if id(layer) not in made:
        made[id(layer)] = _copy_layer(layer, made)
    return made[id(layer)]


def _copy_layer(layer, made):
    if type(layer) is keras.layers.Lambda:
        # Keras loads a function from a config only if the user declares that safe.
        return keras.layers.Lambda(
            layer.function,
            layer._output_shape,
            layer.mask,
            layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
    if isinstance(layer, (trainer.Functional, keras.Sequential)) and layer.built:
        return _clone(layer, made)
    return _from_config(layer)


def _from_config(layer):
    try:
        return type(layer).from_config(layer.get_config())
    except Exception as error:  # a user's constructor may raise anything
        raise _not_rebuilt(layer, error) from error


def _not_rebuilt(layer, cause=""):
    inside = [each.name for each in normalizations(layer)]
    return ValueError(
        f"The layer {layer.name!r} cannot be made again from its `get_config` with the "
        "same layers and weights, so that its batch normalization cannot be replaced. "
        "Implement `get_config` (and `build` for a subclassed model), register the "
        "classes that the config names, or use `AccumBatchNormalization` in the layer. "
        f"{cause} Received: "
        f"{layer} (of type {type(layer)}), with batch normalization {inside}"
    )


def _check_renorm(layer):
    if getattr(layer, "renorm", False):
        raise ValueError(
            "A `BatchNormalization` with `renorm=True` has moving statistics of "
            "another kind: use `AccumBatchNormalization(renorm=True)`. "
            f"Received: layer={layer}"
        )
