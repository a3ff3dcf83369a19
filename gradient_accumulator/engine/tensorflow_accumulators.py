"""The operations of `GradientAccumulateOptimizer` on TensorFlow, on each replica."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from gradient_accumulator.compat import OptimizerStep, internals
from gradient_accumulator.compat.api import keras
from gradient_accumulator.devices.tensorflow_devices import DEVICES, finite_everywhere
from gradient_accumulator.engine.optimizer_base import Accumulators


def _of_each_replica(aggregation: tf.VariableAggregation) -> AbstractContextManager:
    """A context that makes variables of which each replica has its own value.

    Their sum or mean is saved. Replicas that load it, however many there are, take
    values with that sum or mean.
    """

    def create(next_creator, **kwargs):
        kwargs["synchronization"] = tf.VariableSynchronization.ON_READ
        kwargs["aggregation"] = aggregation
        return next_creator(**kwargs)

    return tf.variable_creator_scope(create)


def clip(clipping: Any, optimizer: Any, variables: list, gradients: list) -> list:
    """Clip the finished gradients of an update, which on replicas are their sums."""
    count = tf.distribute.get_strategy().num_replicas_in_sync
    if count == 1:
        return clipping.clip_update(optimizer, variables, gradients)
    dense = [tf.convert_to_tensor(g) for g in gradients if g is not None]
    summed = iter(DEVICES.total(dense))
    gradients = [None if g is None else next(summed) for g in gradients]
    clipped = clipping.clip_update(optimizer, variables, gradients)
    # The optimizer will sum them.
    return [None if g is None else g / count for g in clipped]


def _branch(predicate, function):
    def call():
        function()
        return tf.constant(0)

    tf.cond(predicate(), call, lambda: tf.constant(0))


def _is_single(variable: keras.Variable) -> bool:
    strategy = getattr(internals.native(variable), "distribute_strategy", None)
    return strategy is None or strategy.num_replicas_in_sync == 1


class TensorFlowAccumulators(Accumulators):
    """Sums in variables of an optimizer on TensorFlow, on each replica."""

    def accumulator(self, optimizer: Any, variable: keras.Variable, dtype: str):
        # Each replica has its own sum. The wrapped optimizer sums over replicas.
        with _of_each_replica(tf.VariableAggregation.SUM):
            return super().accumulator(optimizer, variable, dtype)

    def add_local_variable(
        self, optimizer: Any, shape: tuple, dtype: str, name: str
    ) -> keras.Variable:
        # The total weight of gradients, whose losses Keras divides by the number of
        # replicas: the mean.
        with _of_each_replica(tf.VariableAggregation.MEAN):
            return super().add_local_variable(optimizer, shape, dtype, name)

    def add(self, pairs: list, factor: Any) -> None:
        for held, gradient in pairs:
            value = internals.native(held)
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
            parts = tf.math.multiply_no_nan(
                tf.cast(gradient.values, value.dtype), alpha
            )
            if tf.distribute.get_strategy().num_replicas_in_sync == 1:
                value.scatter_add(tf.IndexedSlices(parts, gradient.indices))
            else:
                rows = tf.math.unsorted_segment_sum(
                    parts, gradient.indices, value.shape[0]
                )
                value.assign_add(rows)

    def compiles(self, factor: Any) -> bool:
        return not tf.executing_eagerly()

    @contextmanager
    def divided(self, accumulators: list, total: tf.Tensor) -> Iterator[dict]:
        # Not in place: that takes a branch, and in it all accumulators once more.
        total = tf.convert_to_tensor(total)
        is_one = tf.abs(total - 1) <= 4 * np.finfo(total.dtype.as_numpy_dtype).eps
        factor = tf.where(is_one, tf.ones_like(total), tf.math.reciprocal_no_nan(total))
        yield {
            id(held): internals.native(held) * tf.cast(factor, held.dtype)
            for held in accumulators
        }

    def total(self, variable: keras.Variable, weighed: bool) -> Any:
        # The mean over replicas: Keras divides losses by the number of replicas, whose
        # gradients are summed.
        value = tf.convert_to_tensor(variable)
        replica = tf.distribute.get_replica_context()
        if weighed and replica is not None and replica.num_replicas_in_sync > 1:
            value = replica.all_reduce(tf.distribute.ReduceOp.MEAN, value)
        return value

    def clip(
        self, clipping: Any, optimizer: Any, variables: list, gradients: list
    ) -> list:
        return clip(clipping, optimizer, variables, gradients)

    def apply(
        self, optimizer: Any, gradients: list, variables: list, trainable: list
    ) -> None:
        gradients = finite_everywhere(optimizer, gradients)
        OptimizerStep(optimizer).apply(list(zip(gradients, variables)))

    def when(
        self, predicate: Callable, function: Callable, variables: Callable
    ) -> None:
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
            # The optimizer reduces gradients, which no branch of a replica may do.
            _branch(
                predicate, lambda: strategy.extended.call_for_each_replica(function)
            )

        tf.distribute.get_replica_context().merge_call(across)

    def flush(
        self, predicate: Callable, function: Callable, variables: Callable
    ) -> None:
        variable = variables()[0]
        if _is_single(variable):
            _branch(predicate, function)
        else:
            self.everywhere(lambda: self.when(predicate, function, variables), variable)

    def everywhere(self, function: Callable, variable: keras.Variable) -> None:
        outside = (
            tf.distribute.in_cross_replica_context() or not tf.distribute.has_strategy()
        )
        if _is_single(variable) or not outside:
            function()
            return
        strategy = internals.native(variable).distribute_strategy
        with strategy.scope():
            strategy.run(tf.function(function))

    def read(self, variable: keras.Variable) -> np.ndarray:
        with tf.init_scope():
            return np.asarray(tf.convert_to_tensor(internals.native(variable)).numpy())

    def is_traced(self, variable: keras.Variable) -> bool:
        return not tf.executing_eagerly()

    def guard(self) -> tf.Variable:
        return tf.Variable(
            0,
            trainable=False,
            dtype=tf.int64,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def unchanged(
        self, guard: tf.Variable, given: list[int], count: keras.Variable
    ) -> AbstractContextManager:
        # Each of two `tf.function`s may have variables of its own, which is no change
        # to either: so the check is made while they run.
        if tf.executing_eagerly():
            return nullcontext()
        key = tf.constant(1 + zlib.crc32(repr(list(given)).encode()), tf.int64)
        before = tf.convert_to_tensor(guard)
        problem = (
            "The variables changed while micro-batches wait for their update. "
            "Received: "
        )
        # The operation itself: `tf.debugging.Assert` puts a conditional around it.
        check = tf.raw_ops.Assert(
            condition=(tf.convert_to_tensor(count) == 0)
            | (before == 0)
            | (before == key),
            data=[f"{problem}{given}"],
        )
        with tf.control_dependencies([check]):
            remembered = guard.assign(key)
        return tf.control_dependencies([remembered])

    def stateless(self, values: list) -> list:
        raise ValueError(
            "`stateless_apply` and `stateless_flush` do not work on TensorFlow, where "
            "variables have effects: use `apply` and `flush`. Received: TensorFlow"
        )


ACCUMULATORS = TensorFlowAccumulators
