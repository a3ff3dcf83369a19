"""The operations of `GradientAccumulateOptimizer` on TensorFlow, on each replica."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras
from gradient_accumulator.devices.tensorflow_devices import DEVICES, finite_together
from gradient_accumulator.engine.common import added, new_accumulator


def _of_each_replica(aggregation: tf.VariableAggregation) -> AbstractContextManager:
    """Where variables are made that each replica has its own value of.

    It is their sum or mean that is saved, and from which as many replicas as there are
    then take what gives it again.
    """

    def create(next_creator, **kwargs):
        kwargs["synchronization"] = tf.VariableSynchronization.ON_READ
        kwargs["aggregation"] = aggregation
        return next_creator(**kwargs)

    return tf.variable_creator_scope(create)


def accumulator(optimizer: Any, variable: keras.Variable, dtype: str):
    """A variable that sums one variable's gradients, on each replica its own.

    The wrapped optimizer sums over replicas, once an update.
    """
    with _of_each_replica(tf.VariableAggregation.SUM):
        return new_accumulator(optimizer, variable, dtype)


def add_local_variable(optimizer: Any, shape: tuple, **kwargs) -> keras.Variable:
    """A variable of an optimizer that each replica has its own value of.

    It is what gradients weigh, of losses divided by the number of replicas: the mean.
    """
    with _of_each_replica(tf.VariableAggregation.MEAN):
        return trainer.add_variable(optimizer, shape, **kwargs)


def add(pairs: list, factor: Any) -> None:
    """Add gradients, times `factor`, to their accumulators.

    A factor that was given, no `float`, may be 0, and nothing is then added: a mean
    over nothing is not a number, nor is 0 times it.
    """
    for held, gradient in pairs:
        value = trainer.native(held)
        alpha = tf.cast(factor, value.dtype)
        if not isinstance(gradient, tf.IndexedSlices):
            delta = tf.cast(gradient, value.dtype)
            if not isinstance(factor, float):
                delta = tf.where(alpha == 0, tf.zeros_like(delta), delta)
            # One operation for the product and the sum.
            tf.raw_ops.ResourceApplyGradientDescent(
                var=value.handle, alpha=-alpha, delta=delta
            )
            continue
        parts = tf.math.multiply_no_nan(tf.cast(gradient.values, value.dtype), alpha)
        if tf.distribute.get_strategy().num_replicas_in_sync == 1:
            value.scatter_add(tf.IndexedSlices(parts, gradient.indices))
        else:
            rows = tf.math.unsorted_segment_sum(parts, gradient.indices, value.shape[0])
            value.assign_add(rows)


def add_and_update(pairs: list, factor: Any, update: Callable) -> None:
    """Add a micro-batch, and call `update`, which updates if it is the last."""
    with added(add, pairs, factor, tf.executing_eagerly()):
        update()


@contextmanager
def divided(accumulators: list, total: tf.Tensor) -> Iterator[dict]:
    """Sums divided by that of the factors, by the `id` of what holds them.

    Not in place: that takes a branch, and in it all accumulators once more.
    """
    total = tf.convert_to_tensor(total)
    is_one = tf.abs(total - 1) <= 4 * np.finfo(total.dtype.as_numpy_dtype).eps
    # The sum of the factors is 0 only if all gradients were multiplied by 0.
    factor = tf.where(is_one, tf.ones_like(total), tf.math.reciprocal_no_nan(total))
    yield {
        id(held): trainer.native(held) * tf.cast(factor, held.dtype)
        for held in accumulators
    }


def clear(accumulators: list) -> None:
    for held in accumulators:
        trainer.native(held).assign(tf.zeros(held.shape, held.dtype))


def total(variable: keras.Variable, weighed: bool) -> Any:
    """The sum of the micro-batches' weights, the mean over replicas.

    Keras's losses are divided by the number of replicas, whose gradients are summed.
    """
    value = tf.convert_to_tensor(variable)
    replica = tf.distribute.get_replica_context()
    if weighed and replica is not None and replica.num_replicas_in_sync > 1:
        value = replica.all_reduce(tf.distribute.ReduceOp.MEAN, value)
    return value


def dense(gradient: Any) -> tf.Tensor:
    """A gradient whose rows that occur several times are summed."""
    return tf.convert_to_tensor(gradient)


def clip(clipping: Any, optimizer: Any, variables: list, gradients: list) -> list:
    """Clip the finished gradients of an update, which on replicas is their sum."""
    count = tf.distribute.get_strategy().num_replicas_in_sync
    if count == 1:
        return clipping.clip_update(optimizer, variables, gradients)
    summed = iter(DEVICES.total([dense(g) for g in gradients if g is not None]))
    gradients = [None if g is None else next(summed) for g in gradients]
    clipped = clipping.clip_update(optimizer, variables, gradients)
    # The optimizer will sum them.
    return [None if g is None else g / count for g in clipped]


def apply(optimizer: Any, gradients: list, variables: list, trainable: list) -> None:
    """Hand the gradients of some of the trainable variables to an optimizer, once."""
    gradients = finite_together(optimizer, gradients)
    trainer.step(optimizer, list(zip(gradients, variables)))


def when(predicate: Callable, function: Callable, variables: Callable) -> None:
    """Call a function that assigns `variables()`, if the predicate is true."""
    if tf.distribute.in_cross_replica_context():
        raise ValueError(
            "An optimizer is called on each replica: call it in a function that "
            "`strategy.run` runs. Received: a call across replicas"
        )
    strategy = tf.distribute.get_strategy()
    if strategy.num_replicas_in_sync == 1:
        _branch(predicate, function)
        return

    def across(strategy):
        # The optimizer reduces gradients, which it may not do in a branch of a replica.
        _branch(predicate, lambda: strategy.extended.call_for_each_replica(function))

    tf.distribute.get_replica_context().merge_call(across)


def _branch(predicate, function):
    def call():
        function()
        return tf.constant(0)

    tf.cond(predicate(), call, lambda: tf.constant(0))


def flush(predicate: Callable, function: Callable, variables: Callable) -> None:
    """As `when`, from where a callback is called."""
    variable = variables()[0]
    if _is_single(variable):
        _branch(predicate, function)
    else:
        everywhere(lambda: when(predicate, function, variables), variable)


def everywhere(function: Callable, variable: keras.Variable) -> None:
    """Call a function on each replica that has the variable, from a callback."""
    outside = (
        tf.distribute.in_cross_replica_context() or not tf.distribute.has_strategy()
    )
    if _is_single(variable) or not outside:
        function()
        return
    strategy = trainer.native(variable).distribute_strategy
    with strategy.scope():
        strategy.run(tf.function(function))


def _is_single(variable: keras.Variable) -> bool:
    strategy = getattr(trainer.native(variable), "distribute_strategy", None)
    return strategy is None or strategy.num_replicas_in_sync == 1


def read(variable: keras.Variable) -> np.ndarray:
    """A counter's value."""
    with tf.init_scope():
        return np.asarray(tf.convert_to_tensor(trainer.native(variable)).numpy())


def is_traced(variable: keras.Variable) -> bool:
    """Whether a function that uses the variable is being compiled."""
    return not tf.executing_eagerly()


def guard() -> tf.Variable:
    """What `same` remembers the variables by."""
    return tf.Variable(
        0,
        trainable=False,
        dtype=tf.int64,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def same(
    guard: tf.Variable, given: list[int], count: keras.Variable
) -> AbstractContextManager:
    """Around what is not done if variables changed while micro-batches wait.

    Two `tf.function`s may each have one set of variables, which is no change to either.
    """
    if tf.executing_eagerly():
        return nullcontext()
    key = tf.constant(1 + zlib.crc32(repr(list(given)).encode()), tf.int64)
    before = tf.convert_to_tensor(guard)
    problem = (
        "The variables changed while micro-batches wait for their update. Received: "
    )
    # The operation itself: `tf.debugging.Assert` puts a conditional around it.
    check = tf.raw_ops.Assert(
        condition=(tf.convert_to_tensor(count) == 0) | (before == 0) | (before == key),
        data=[f"{problem}{given}"],
    )
    with tf.control_dependencies([check]):
        remembered = guard.assign(key)
    return tf.control_dependencies([remembered])


def stateless(values: list) -> list:
    raise ValueError(
        "`stateless_apply` and `stateless_flush` do not work on TensorFlow, where "
        "variables have effects: use `apply` and `flush`. Received: TensorFlow"
    )
