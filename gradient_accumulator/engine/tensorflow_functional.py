"""`accumulated_value_and_grad` on TensorFlow: a `tf.while_loop` over micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from gradient_accumulator.compat import internals
from gradient_accumulator.compat.api import keras
from gradient_accumulator.engine.engine_base import Engine, Sums
from gradient_accumulator.functional import (
    Accumulation,
    LossFunction,
    check_leaves,
    listed,
    warn_of_nan,
)
from gradient_accumulator.microbatches import example_count, leaves, map_leaves
from gradient_accumulator.received import check_of_backend, described


def value_and_grad(engine: Engine, loss: LossFunction) -> Callable:
    """The function that `accumulated_value_and_grad` returns."""

    def function(variables, batch, *args, **kwargs):
        variables = listed(variables)
        check_of_backend("variables", variables)
        for variable in variables:
            if not isinstance(variable, tf.Variable) and not internals.is_variable(
                variable
            ):
                raise TypeError(
                    "Argument `variables` must be a list of variables. A `tf.function` "
                    "turns those that it is given into tensors: let it use them from "
                    f"outside. Received: {described(variable)} (of type "
                    f"{type(variable)})"
                )
        check_leaves(batch, leaves(batch))
        batch = map_leaves(tf.convert_to_tensor, batch)
        example_count(batch)
        size = tf.shape(leaves(batch)[0])[0]
        length = tf.minimum(loss.microbatch_size, size)
        sums = Sums(variables, [loss.accumulator_dtype(v.dtype) for v in variables])
        accumulation = Accumulation(sums, engine.value_and_grad, size)
        auxes = _Auxes(loss, batch, args, kwargs)

        def add(start, carry, held):
            stop = tf.minimum(start + length, size)
            microbatch = map_leaves(lambda array: array[start:stop], batch)
            carry, aux = accumulation.add(
                carry,
                lambda _: loss(microbatch, *args, **kwargs),
                variables,
                stop - start,
            )
            return stop, carry, auxes.write(held, aux)

        with tf.name_scope("accumulate_gradients"):
            _, carry, held = tf.while_loop(
                lambda start, *_: start < size,
                add,
                (tf.constant(0), accumulation.zeros(), auxes.empty()),
                # Micro-batches side by side would hold their activations side by side.
                parallel_iterations=1,
            )
        value, gradients = accumulation.finish(carry)
        if tf.executing_eagerly() and accumulation.has_means:
            warn_of_nan(bool(tf.math.is_nan(value)))
        return ((value, auxes.joined(held)) if loss.has_aux else value), gradients

    return function


class _Auxes:
    """What micro-batches return besides their losses, held in arrays that a loop can
    write.

    Args:
        loss: The loss function.
        batch: The batch.
        args, kwargs: What the loss function is called with besides a micro-batch.
    """

    def __init__(self, loss: LossFunction, batch: Any, args: tuple, kwargs: dict):
        self.listed: list = []  # where there is no graph
        self.spec: Any = ()
        if loss.has_aux and not tf.executing_eagerly():
            specs = map_leaves(
                lambda array: tf.TensorSpec([None, *array.shape[1:]], array.dtype),
                batch,
            )
            traced = tf.function(
                lambda microbatch: loss(microbatch, *args, **kwargs)[2], autograph=False
            ).get_concrete_function(specs)
            self.spec = traced.structured_outputs

    def empty(self) -> list:
        return [
            tf.TensorArray(spec.dtype, 0, dynamic_size=True, infer_shape=False)
            for spec in keras.tree.flatten(self.spec)
        ]

    def write(self, held: list, aux: Any) -> list:
        if tf.executing_eagerly():
            self.listed.append(aux)
        return [
            array.write(array.size(), value)
            for array, value in zip(held, keras.tree.flatten(aux))
        ]

    def joined(self, held: list) -> Any:
        """Along their first axis; scalars as a vector."""
        if self.listed:
            return keras.tree.map_structure(_joined, *self.listed)
        joined = [
            array.concat() if len(spec.shape) else array.stack()
            for array, spec in zip(held, keras.tree.flatten(self.spec))
        ]
        return keras.tree.pack_sequence_as(self.spec, joined)


def _joined(*tensors):
    parts = [tf.convert_to_tensor(tensor) for tensor in tensors]
    return tf.concat(parts, axis=0) if len(parts[0].shape) else tf.stack(parts)
