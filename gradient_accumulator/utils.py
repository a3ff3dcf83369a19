"""Batch normalization of a whole model, made to accumulate and made plain again."""

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
    """A copy of a model with `AccumBatchNormalization` for `BatchNormalization`.

    At any depth: in nested models, in wrappers such as `TimeDistributed`, in layers of
    your own. The copy computes what the model computes; weights, moving statistics,
    names, settings and trainable flags are kept, what nested models share is shared in
    the copy, and the copy accumulates as the model does.
    The model itself stays as it is. The copy has a compile state where
    `keras.models.clone_model` gives it one; compile it before you train it.

    Args:
        model: A functional or Sequential model, or a subclassed one that Keras can make
            again from its `get_config`.
        accum_steps: Positive int, of the layers: the number of micro-batches in an
            update where no train step of this library tells.
        position: No longer needed: `"replace"`, as before.

    Returns:
        The new model.

    Raises:
        TypeError: If `model` is no Keras 3 model, or `accum_steps` no int.
        ValueError: If a layer cannot be made again, or is a subclass of
            `BatchNormalization`, whose arithmetic is its own.

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
                "A subclass of `BatchNormalization` cannot be replaced: what it does "
                f"is its own. Received: layer={layer} (of type {type(layer)})"
            )

    return _copied(model, replace)


def restore_batchnorm_layers(model: keras.Model) -> keras.Model:
    """A copy of a model with Keras's `BatchNormalization` again, for deployment.

    What `replace_batchnorm_layers` did, undone: the copy computes the same in
    inference, and is saved to a file that loads without this package.

    Args:
        model: As for `replace_batchnorm_layers`.

    Returns:
        The new model.

    Raises:
        TypeError, ValueError: As `replace_batchnorm_layers`.

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
    check_is_model(model)
    if not model.built:
        raise ValueError(
            "Argument `model` must be a model that is built: call it on data, or begin "
            f"it with an `Input`. Received: model={model}"
        )
    copy = _clone(model, made={})
    originals, layers = trainer.layers_of(model), trainer.layers_of(copy)
    if [_kind(x) for x in originals] != [_kind(x) for x in layers] or [
        tuple(w.shape) for w in model.weights
    ] != [tuple(w.shape) for w in copy.weights]:
        raise _not_rebuilt(model)
    for original, layer in zip(originals, layers):
        # A layer that makes others in its constructor makes them anew.
        trainer.rename(layer, original.name)
        # The outer ones come first, and set all that are inside of them.
        layer.trainable = original.trainable
        if type(original) is AccumBatchNormalization is not type(layer):
            AccumBatchNormalization.take_over(layer, *original.settings)
    for variable, original in zip(copy.variables, model.variables):
        # Seeds too; a copy, for JAX gives the memory of variables away.
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
    is_own = type(layer) is AccumBatchNormalization
    return keras.layers.BatchNormalization if is_own else own_class(layer)


def _clone(model, made: dict[int, Any]):
    """A new model.

    `made` has the copies by the `id` of their originals, so that what is shared, by
    nested models too, is shared in the copy.
    """
    again = partial(_made_again, made=made)
    if trainer.is_keras_own(type(model)) and isinstance(model, keras.Sequential):
        return keras.models.clone_model(model, clone_function=again)
    if trainer.is_keras_own(type(model)) and isinstance(model, trainer.Functional):
        return keras.models.clone_model(
            model, trainer.same_inputs(model, made), clone_function=again
        )
    copy = _from_config(model)
    if copy.built:
        return copy
    try:
        copy.build_from_config(model.get_build_config())
    except Exception as error:  # whatever a user's model does
        raise _not_rebuilt(model) from error
    return copy


def _made_again(layer, made):
    if id(layer) not in made:
        made[id(layer)] = _made_anew(layer, made)
    return made[id(layer)]


def _made_anew(layer, made):
    if type(layer) is keras.layers.Lambda:
        # Keras makes it again from source code only if that is declared safe.
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
    except Exception as error:  # whatever a user's constructor does
        raise _not_rebuilt(layer, error) from error


def _not_rebuilt(layer, cause=""):
    inside = [each.name for each in normalizations(layer)]
    return ValueError(
        f"The layer {layer.name!r} cannot be made again from its `get_config` with the "
        "same layers and weights, and its batch normalization not be replaced. "
        "Implement `get_config` (and `build` for a subclassed model), register the "
        "classes that it names, or use `AccumBatchNormalization` in it. "
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
