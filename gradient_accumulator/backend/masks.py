"""The masks of a functional model's outputs, without computing the outputs.

Keras attaches to a layer's output the mask that the layer's `compute_mask` makes of
its inputs' masks. Nearly all layers pass the mask on; those that begin one need their
input's values, which are the model's own inputs where they are embedded.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from gradient_accumulator.backend import trainer
from gradient_accumulator.normalizers import symbolic
from gradient_accumulator.pieces import map_leaves

_BEGIN_A_MASK = (layers.Embedding, layers.Masking)
_NEED_THE_MASK_ONLY = (layers.RNN, layers.Bidirectional, layers.GlobalAveragePooling1D)


class _Unknown(Exception):
    """The graph does not tell."""


def predictions(model: keras.Model, x: Any) -> Any:
    """Zeros in the shapes of the model's predictions, with their masks.

    Returns:
        Predictions as the model returns them, or None where only a forward pass tells
        their masks: in a subclassed model, or behind a layer whose masks are its own
        affair.
    """
    if type(model).call is not trainer.Functional.call:
        return None
    inputs = keras.tree.flatten(x)
    if len(inputs) != len(model.inputs):
        return None
    values = {id(key): value for key, value in zip(model.inputs, inputs)}
    try:
        masks = [_mask(output, values) for output in model.outputs]
    except _Unknown:
        return None
    specs = trainer.compute_output_spec(model, map_leaves(symbolic, x))
    zeros = keras.tree.map_structure(
        # One number in the place of all, for a shape costs nothing then.
        lambda spec: ops.broadcast_to(ops.zeros((), spec.dtype), spec.shape),
        specs,
    )
    for array, mask in zip(keras.tree.flatten(zeros), masks):
        if mask is not None:
            trainer.set_mask(array, mask)
    return zeros


def _mask(tensor: keras.KerasTensor, values: dict) -> Any:
    layer, node_index, tensor_index = tensor._keras_history
    if id(tensor) in values or not isinstance(layer, layers.Layer):
        return None  # plain operations, and a model's inputs, have none
    arguments = layer._inbound_nodes[node_index].arguments
    if "mask" in arguments.kwargs or not arguments.args:
        raise _Unknown
    first = arguments.args[0]
    if isinstance(layer, _BEGIN_A_MASK):
        if id(first) not in values:
            raise _Unknown
        return layer.compute_mask(ops.convert_to_tensor(values[id(first)]))
    if not trainer.is_keras_own(type(layer)) or isinstance(layer, keras.Model):
        raise _Unknown
    previous = keras.tree.map_structure(lambda t: _mask(t, values), first)
    if not layer.supports_masking:
        return None
    if isinstance(layer, _NEED_THE_MASK_ONLY):
        computed = layer.compute_mask(None, previous)
    elif type(layer).compute_mask is layers.Layer.compute_mask:
        computed = previous
    else:
        raise _Unknown
    computed = keras.tree.flatten(computed)
    return computed[tensor_index] if tensor_index < len(computed) else None
