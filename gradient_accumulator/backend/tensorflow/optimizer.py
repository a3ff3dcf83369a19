"""What `GradientAccumulateOptimizer` does on TensorFlow, on each replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from gradient_accumulator.backend.common import new_accumulator


def accumulator(optimizer: Any, variable: keras.Variable, dtype: str):
    """A variable that sums one variable's gradients, on each replica its own.

    Replicas are summed when it is saved, and by the wrapped optimizer, once an update.
    """

    def of_each_replica(next_creator, **kwargs):
        kwargs["synchronization"] = tf.VariableSynchronization.ON_READ
        kwargs["aggregation"] = tf.VariableAggregation.SUM
        return next_creator(**kwargs)

    with tf.variable_creator_scope(of_each_replica):
        return new_accumulator(optimizer, variable, dtype)


def add(pairs: list, weight: Any) -> None:
    """Add gradients, times `weight`, to their accumulators."""
    for held, gradient in pairs:
        value = held.value
        gradient = tf.cast(gradient, value.dtype)
        if weight is not None:
            gradient *= tf.cast(weight, value.dtype)
        if not isinstance(gradient, tf.IndexedSlices):
            value.assign_add(gradient)
        elif tf.distribute.get_strategy().num_replicas_in_sync > 1:
            value.assign_add(tf.convert_to_tensor(gradient))
        else:
            value.scatter_add(gradient)


def divide(accumulator: keras.Variable, total: Any) -> None:
    """Divide a sum by the total weight, which is 0 only if the sum is."""
    value = accumulator.value
    value.assign(tf.math.divide_no_nan(value, tf.cast(total, value.dtype)))


def clear(accumulators: list) -> None:
    for held in accumulators:
        held.value.assign(tf.zeros(held.shape, held.dtype))


def total(variable: keras.Variable, weighed: bool) -> Any:
    """The sum of the pieces' weights, the mean over replicas.

    Keras's losses are divided by the number of replicas, whose gradients are summed.
    """
    value = tf.convert_to_tensor(variable)
    replica = tf.distribute.get_replica_context()
    if weighed and replica is not None and replica.num_replicas_in_sync > 1:
        value = replica.all_reduce(tf.distribute.ReduceOp.MEAN, value)
    return value


def apply(optimizer: Any, gradients: list, variables: list) -> None:
    """Hand finished gradients to an optimizer, once."""
    # By its class's method, for the object may have the accumulating one.
    type(optimizer).apply(optimizer, gradients, variables)


def when(predicate: Callable, function: Callable, variables: list) -> None:
    """Call a function that assigns some variables, if the predicate is true."""
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


def flush(predicate: Callable, function: Callable, variables: list) -> None:
    """As `when`, from where a callback is called."""
    value = getattr(variables[0], "value", variables[0])
    strategy = getattr(value, "distribute_strategy", None)
    if strategy is None or strategy.num_replicas_in_sync == 1:
        _branch(predicate, function)
    elif tf.distribute.in_cross_replica_context() or not tf.distribute.has_strategy():
        with strategy.scope():
            strategy.run(tf.function(lambda: when(predicate, function, variables)))
    else:
        when(predicate, function, variables)


def read(variable: keras.Variable) -> int | None:
    """A counter's value."""
    with tf.init_scope():
        return int(tf.convert_to_tensor(variable.value))


def is_traced(variable: keras.Variable) -> bool:
    """Whether a function that uses the variable is being compiled."""
    return not tf.executing_eagerly()
