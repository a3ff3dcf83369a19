"""The slices of a variable's gradient (an embedding's), through a loop.

They are kept as they come: Keras's optimizers do not merge slices of one row, so that
only the same slices give the same update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf


class Slices(NamedTuple):
    """The slices of the micro-batches so far, which the loop carries.

    A buffer has room for those to come, for what is kept in parts has to be joined in
    the end, and takes twice the memory then.
    """

    values: tf.Tensor | tf.TensorArray  # a buffer, or parts
    indices: tf.TensorArray  # parts, which are small
    count: tf.Tensor

    @property
    def tensors(self) -> list[tf.Tensor]:
        """The tensors that are there when all slices have been written."""
        return [getattr(held, "flow", held) for held in self]


def no_slices(variable: Any, indices: tf.DType, even: bool) -> Slices:
    """Before the first micro-batch.

    Args:
        variable: Whose gradient it is.
        indices: The dtype of the indices.
        even: Whether the micro-batches' shapes are one, so that one micro-batch's
            slices tell how much room all of them need.
    """

    def parts(dtype):
        return tf.TensorArray(dtype, 0, dynamic_size=True, infer_shape=False)

    values = parts(variable.dtype)
    if even:
        inner = variable.shape[1:]
        values = tf.compat.v1.placeholder_with_default(
            tf.zeros((0, *inner), variable.dtype), (None, *inner)
        )  # a loop may change a shape that it does not know
    return Slices(values, parts(indices), tf.constant(0))


def with_slices(held: Slices, k: tf.Tensor, new: tf.IndexedSlices, most: Any) -> Slices:
    """With those of the next micro-batch.

    Args:
        held: Those before.
        k: The micro-batch's number.
        new: Its slices.
        most: How many micro-batches there are at most.
    """
    added = tf.shape(new.values)[0]
    count = held.count + added

    def room():
        # As much for each one to come. The micro-batches' values may make it more.
        ends = [[0, (most - k) * added]] + [[0, 0]] * (len(new.values.shape) - 1)
        return tf.pad(held.values[: held.count], ends)

    if isinstance(held.values, tf.TensorArray):
        values = held.values.write(k, new.values)
    else:
        fits = count <= tf.shape(held.values)[0]
        # In place, where `tf.tensor_scatter_nd_update` copies the buffer in a loop.
        values = tf.raw_ops.TensorStridedSliceUpdate(
            input=tf.cond(fits, lambda: held.values, room),
            begin=[held.count],
            end=[count],
            strides=[1],
            value=new.values,
        )
    return Slices(values, held.indices.write(k, new.indices), count)


def joined(held: Slices, variable: Any) -> tf.IndexedSlices:
    """The slices of all micro-batches."""
    values = held.values
    if isinstance(values, tf.TensorArray):
        values = values.concat()
    else:
        values = values[: held.count]
    shape = list(variable.shape)
    return tf.IndexedSlices(
        tf.ensure_shape(values, [None, *shape[1:]]),
        tf.ensure_shape(held.indices.concat(), [None]),
        tf.constant(shape),
    )
