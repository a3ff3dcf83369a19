"""`fit` on JAX: the train function, the data that it draws, and the model's state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from keras.src.backend.jax.trainer import JAXEpochIterator

from gradient_accumulator.compat import internals
from gradient_accumulator.devices.jax_devices import active_replicas, check_in_step
from gradient_accumulator.engine.engine_base import Engine
from gradient_accumulator.microbatches import (
    Epoch,
    Microbatches,
    batch_size,
    checked,
    cut,
    map_leaves,
)
from gradient_accumulator.settings import Accumulation
from gradient_accumulator.update import Update


class State(NamedTuple):
    """The values of a model's variables. During `fit` the variables have none."""

    trainable: list
    non_trainable: list
    optimizer: list | None
    metrics: list


class JaxFit(Engine):
    """The operations of `fit`. On JAX its state is in lists of values."""

    epoch: Epoch
    state: State  # during an update

    def make_train_function(self, model: keras.Model, training: Any) -> Callable:
        accumulation, epoch = training.accumulation, training.epoch
        if accumulation.accum_dtype == "float64" and not jax.config.jax_enable_x64:
            raise ValueError(
                "JAX has float64 only where its flag `jax_enable_x64` is set. Set it, "
                "or sum in float32. Received: accum_dtype='float64'"
            )
        self.epoch = epoch
        update = Update(model, accumulation, self, training.notices)
        self.trained = update.variables
        steps_per_execution = model.steps_per_execution
        cuts = accumulation.microbatch_size is not None

        def train_function(state, iterator):
            logs = None
            for _ in range(steps_per_execution):
                with _kept_on_failure(model, state):
                    try:
                        batches = iterator if cuts else map(checked, iterator)
                        microbatches = epoch.draw(
                            batches, accumulation.accum_steps or 1
                        )
                    except StopIteration:
                        if logs is None:
                            raise
                        break
                    if cuts:
                        (batch,) = microbatches.iterator
                        if epoch.sizes:
                            microbatches = _drawn(epoch, batch, iterator, accumulation)
                        else:
                            microbatches = _cut(batch, accumulation.microbatch_size)
                        epoch.cut(microbatches.count, microbatches.on_device)
                    self.state = State(*state)
                    try:
                        logs = update(microbatches)
                        state = tuple(self.state)
                    finally:
                        del self.state  # Keras has the values until the next update
            return logs, state

        return train_function

    def batches(
        self, model: keras.Model, epoch: Epoch, accumulation: Accumulation, adapter: Any
    ) -> tuple[Callable, Callable]:
        microbatch_size = accumulation.microbatch_size
        drawn = adapter.get_jax_iterator
        if microbatch_size is None:
            return drawn, lambda: map(checked, drawn())
        arrays = internals.large_arrays(adapter)
        # With a distribution, the devices each get a part of a whole batch.
        if arrays and not arrays.sparse and keras.distribution.distribution() is None:
            epoch.sizes = arrays.sizes

            def in_microbatches():
                return _in_microbatches(arrays, microbatch_size)

            return in_microbatches, in_microbatches

        def with_examples(batch):
            batch_size(batch)
            return batch

        return drawn, lambda: map(with_examples, drawn())

    def epoch_ended(self, epoch: Epoch) -> None:
        check_in_step(epoch.number, epoch.updates, 0)

    def check_in_step(self, microbatches: int) -> None:
        """Raise unless all processes have equally many micro-batches in this update."""
        check_in_step(self.epoch.number, self.epoch.updates, microbatches)


@contextmanager
def _kept_on_failure(model: keras.Model, state: tuple) -> Iterator[None]:
    """Give the model its state from before the update if the update fails.

    During `fit` Keras keeps the values outside of the model's variables.
    """
    try:
        yield
    except StopIteration:
        raise  # this is the end of the epoch, and no failure
    except BaseException:
        names = ("trainable", "non_trainable", "optimizer", "metrics")
        model._jax_state = {
            f"{name}_variables": values for name, values in zip(names, state)
        }
        model.jax_state_sync()
        raise


def _cut(batch, microbatch_size):
    replicas = active_replicas(batch)
    if replicas is None:
        return cut(batch, microbatch_size, _take)
    return cut(batch, microbatch_size, replicas.take, replicas.count)


def _take(array, start, stop):
    if isinstance(array, jax.Array):
        # `start` is an operand, so that one program serves all micro-batches.
        return jax.lax.dynamic_slice_in_dim(array, start, stop - start)
    return array[start:stop]


def _drawn(epoch, first, iterator, accumulation):
    """The micro-batches of a batch, which are drawn one by one."""
    size = epoch.next_size(iterator)
    count = math.ceil(size / accumulation.microbatch_size)
    return Microbatches(chain([first], islice(iterator, count - 1)), count, size)


def _in_microbatches(arrays, microbatch_size):
    """The micro-batches of all batches, in order."""
    inputs = arrays.sliceable("jax")  # in each epoch: callbacks may change the arrays
    # Keras's iterator draws ahead. This one must too, to use the same random numbers.
    drawn = JAXEpochIterator(x=arrays.numbers())._get_iterator()
    for (numbers,) in drawn:
        numbers = np.asarray(numbers)
        for start in range(0, len(numbers), microbatch_size):
            yield _taken(inputs, numbers[start : start + microbatch_size])


def _taken(sliceable, numbers):
    return map_leaves(
        lambda array: array.convert_to_jax_compatible(array[numbers]), sliceable
    )
