"""The slices of a variable's sparse gradient (an embedding's), in a loop.

The slices are kept, not summed: Keras's optimizers do not merge slices of one row, so
that only the batch's own slices give the batch's update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf


class Slices(NamedTuple):
    """The slices of the micro-batches so far, which the loop carries.

    A buffer has room for the slices of later micro-batches too. Arrays that are kept
    one by one must be joined in the end, which takes twice the memory.
    """

    values: tf.Tensor | tf.TensorArray  # a buffer, or an array for each micro-batch
    indices: tf.TensorArray  # an array for each micro-batch, which is small
    count: tf.Tensor  # the number of slices

    @property
    def tensors(self) -> list[tf.Tensor]:
        """Tensors that are computed only after all slices have been written."""
        return [getattr(held, "flow", held) for held in self]


def no_slices(variable: Any, indices: tf.DType, even: bool) -> Slices:
    """The empty slices before the first micro-batch.

    Args:
        variable: The variable that has the gradient.
        indices: The dtype of the indices.
        even: Whether all micro-batches have one shape. The first micro-batch then shows
            how much room the slices of all of them need.
    """

    def parts(dtype):
        return tf.TensorArray(dtype, 0, dynamic_size=True, infer_shape=False)

    values = parts(variable.dtype)
    if even:
        inner = variable.shape[1:]
        values = tf.compat.v1.placeholder_with_default(
            tf.zeros((0, *inner), variable.dtype), (None, *inner)
        )  # a loop may change the shape of a placeholder
    return Slices(values, parts(indices), tf.constant(0))


def with_slices(held: Slices, k: tf.Tensor, new: tf.IndexedSlices, most: Any) -> Slices:
    """The slices so far with those of the next micro-batch.

    Args:
        held: The slices so far.
        k: The number of the micro-batch.
        new: The slices of the micro-batch.
        most: The largest number of micro-batches.
    """
    added = tf.shape(new.values)[0]
    count = held.count + added

    def room():
        # Assumes as many slices in each later micro-batch. If one has more, the buffer
        # grows again.
        ends = [[0, (most - k) * added]] + [[0, 0]] * (len(new.values.shape) - 1)
        return tf.pad(held.values[: held.count], ends)

    if isinstance(held.values, tf.TensorArray):
        values = held.values.write(k, new.values)
    else:
        fits = count <= tf.shape(held.values)[0]
        # This writes in place. In a loop, `tf.tensor_scatter_nd_update` would copy.
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
