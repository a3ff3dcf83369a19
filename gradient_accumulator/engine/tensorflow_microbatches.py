"""An update's micro-batches in a TensorFlow graph: cut, held, or drawn one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import tensorflow as tf

from gradient_accumulator import losses
from gradient_accumulator.compat import internals
from gradient_accumulator.compat.api import keras
from gradient_accumulator.microbatches import (
    arrays_of,
    check_examples,
    first_input,
    is_number,
    leaves,
    map_leaves,
)


@dataclass
class Microbatches:
    """The micro-batches of one update.

    A loop carries `state` from one micro-batch to the next.
    """

    example: Any  # the shapes and dtypes of any micro-batch, as KerasTensors
    even: bool  # whether all have one shape, except for the number of examples
    expected: tf.Tensor  # the number of examples by which shares are divided
    most: tf.Tensor  # the number of micro-batches, if the data does not end earlier
    more: Callable[[tf.Tensor, Any], tf.Tensor]  # whether there is a micro-batch k
    read: Callable[[tf.Tensor, Any], Any]  # returns micro-batch k
    sizes: tf.Tensor | None = None  # the number of examples of each, if it is known
    count: int | None = None  # the number of micro-batches, if the graph fixes it
    state: Any = ()
    # Returns the state for micro-batch k:
    following: Callable[[tf.Tensor, Any], Any] = lambda k, state: state
    # Returns what the optimizer waits for, given the number of micro-batches:
    complete: Callable[[tf.Tensor], Any] = lambda count: tf.no_op()
    losses: losses.Losses | None = None  # the model's
    drawn: tf.Tensor | None = None  # after the loop, the number of micro-batches


class Checks:
    """Checks that a graph makes while it runs. The host raises their errors."""

    def __init__(self):
        self.error: Exception | None = None

    def that(self, holds: tf.Tensor, otherwise: Callable, *values: tf.Tensor) -> Any:
        """Calls a function on the host if a condition does not hold.

        Args:
            holds: The condition.
            otherwise: A function that may raise. It takes the values, as arrays.
            *values: Tensors.

        Returns:
            A tensor that an operation waits for if it must run after the check.
        """

        def call(*values):
            try:
                otherwise(*(value.numpy() for value in values))
            except Exception as error:
                self.error = error
                raise
            return True

        return tf.cond(
            holds,
            lambda: tf.constant(True),
            lambda: tf.py_function(call, values, tf.bool),
        )

    @contextmanager
    def raised(self) -> Iterator[None]:
        """A context of the graph's run, which raises the error of a check."""
        try:
            yield
        except tf.errors.OpError:
            error, self.error = self.error, None
            if error is None:
                raise
            raise error from None


def _known(
    sizes: tf.Tensor, read: Callable, example: Any, even: bool, count: int | None
) -> Microbatches:
    return Microbatches(
        example,
        even,
        expected=tf.cast(tf.reduce_sum(sizes), losses.dtype()),
        most=tf.size(sizes),
        more=lambda k, state: k < tf.size(sizes),
        read=lambda k, state: read(k),
        sizes=sizes,
        count=count,
    )


def cut(data: Any, microbatch_size: int) -> Microbatches:
    """The micro-batches of a batch, as slices of its arrays."""
    size = tf.shape(leaves(data)[0])[0]
    starts = tf.range(0, size, microbatch_size)
    sizes = tf.minimum(microbatch_size, size - starts)

    def read(k):
        start, stop = starts[k], starts[k] + sizes[k]
        return map_leaves(
            lambda array: array if is_number(array) else array[start:stop], data
        )

    count = leaves(data)[0].shape[0]
    count = None if count is None else math.ceil(count / microbatch_size)
    return _known(sizes, read, map_leaves(symbolic, data), True, count)


def hold(microbatches: tuple, count: tf.Tensor | int, skip_empty: bool) -> Microbatches:
    """Micro-batches that may have different shapes, in lists that a loop can index.

    Args:
        microbatches: Nested tensors for each micro-batch.
        count: The number of micro-batches. The entries after these only fill the tuple.
        skip_empty: Whether to leave out micro-batches without examples.
    """
    columns = list(
        zip(
            *(
                tf.nest.flatten(microbatch, expand_composites=True)
                for microbatch in microbatches
            )
        )
    )
    shapes = [
        None if column[0] is None else _common_shape(column) for column in columns
    ]
    lists = [None if column[0] is None else _list(column) for column in columns]
    even = all(shape is None or None not in shape[1:] for shape in shapes)

    sizes = tf.stack([size_of(microbatch) for microbatch in microbatches])[:count]
    filled = None
    if skip_empty:
        filled = tf.squeeze(tf.where(sizes > 0), 1)
        sizes = tf.gather(sizes, filled)

    def read(k):
        k = k if filled is None else tf.cast(filled[k], tf.int32)
        arrays = [
            None if held is None else tf.ensure_shape(held.read(k), shape)
            for held, shape in zip(lists, shapes)
        ]
        return tf.nest.pack_sequence_as(microbatches[0], arrays, expand_composites=True)

    known = count if isinstance(count, int) else None
    return _known(sizes, read, map_leaves(symbolic, microbatches[0]), even, known)


def stream(
    checks: Checks,
    ended_early: Callable,
    first: tf.experimental.Optional,
    iterator: tf.data.Iterator,
    count: tf.Tensor,
) -> Microbatches:
    """At most `count` micro-batches, each drawn while the one before is trained on.

    Args:
        checks: The checks that raise on the host.
        ended_early: A function of the number of micro-batches. It is called if there
            are fewer than `count`, and may raise.
        first: The first micro-batch.
        iterator: The iterator that the others are drawn from.
        count: The number of micro-batches of a whole update.
    """
    element = iterator.element_spec
    spec = keras.tree.map_structure(without_optional, element)
    inner_shapes = [leaf.shape[1:] for leaf in arrays_of(spec)]
    known = {leaf.shape[0] for leaf in arrays_of(spec)}

    def microbatch(optional):
        return keras.tree.map_structure(without_optional, optional.get_value())

    def check(sizes):
        check_examples([(int(n), *shape) for n, shape in zip(sizes, inner_shapes)])

    def read(k, optional):
        data = microbatch(optional)
        if None not in known:
            return data
        sizes = tf.stack([tf.shape(leaf)[0] for leaf in arrays_of(data)])
        good = tf.reduce_all((sizes == sizes[0]) & (sizes > 0))
        with tf.control_dependencies([checks.that(good, check, sizes)]):
            return map_leaves(tf.identity, data)

    def following(k, optional):
        return tf.cond(
            k < count,
            iterator.get_next_as_optional,
            lambda: tf.experimental.Optional.empty(element),
        )

    size = size_of(microbatch(first))
    return Microbatches(
        map_leaves(symbolic, spec),
        is_even(spec),
        expected=tf.cast(size * count, losses.dtype()),
        most=count,
        more=lambda k, optional: optional.has_value(),
        read=read,
        state=first,
        following=following,
        complete=lambda drawn: checks.that(drawn >= count, ended_early, drawn),
    )


def size_of(microbatch):
    """The number of examples of a micro-batch, as a tensor."""
    return tf.shape(first_input(microbatch))[0]


def is_even(spec):
    """Whether a spec fixes all axes but that of the examples."""
    return all(None not in leaf.shape[1:] for leaf in leaves(spec))


def stateless(model: keras.Model, mapping: Any = (), **settings: Any) -> Any:
    """A stateless scope in which the model's variables have their values.

    In eager execution, weight regularizers read values from the scope.
    """
    values: list = []
    if tf.executing_eagerly():
        values = [(v, internals.value(v)) for v in model.variables]
    return internals.StatelessScope(state_mapping=[*values, *mapping], **settings)


def trace_microbatch(function, example, microbatches):
    """The result (or its spec) of a function for any micro-batch, without effects."""
    if tf.executing_eagerly():
        with internals.StatelessScope():
            return function(microbatches.read(0, ()))
    return internals.compute_output_spec(function, example)


def _list(arrays):
    held = tf.TensorArray(
        arrays[0].dtype, len(arrays), infer_shape=False, clear_after_read=False
    )
    for k, array in enumerate(arrays):
        held = held.write(k, array)
    return held


def _common_shape(arrays):
    shapes = [array.shape for array in arrays]
    shape = reduce(tf.TensorShape.most_specific_compatible_shape, shapes)
    # Another update may have another number of examples.
    return tf.TensorShape([None, *shape[1:]]) if shape.rank else shape


def symbolic(array):
    """The shape and dtype of an array, for any number of examples."""
    shape = () if is_number(array) else (None, *array.shape[1:])
    return keras.KerasTensor(shape, keras.backend.standardize_dtype(array.dtype))


def without_optional(leaf):
    """The leaf of a batch or a spec, with None for an empty optional."""
    # If a generator yields None, `tf.data` may hold it as an empty `Optional`.
    return None if isinstance(leaf, _NONES) else leaf


def signature_of(specs):
    """The signature of a graph whose arguments have these specs, which may be None."""
    # For an argument that is None, a graph needs a spec too.
    return keras.tree.map_structure(lambda spec: _NONE if spec is None else spec, specs)


_NONE = tf.type_spec_from_value(None)
_NONES = (tf.experimental.Optional, tf.OptionalSpec, type(_NONE))
