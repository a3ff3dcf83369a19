"""What `fit` calls on JAX: draws an update's data and keeps the state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import keras
import numpy as np

from gradient_accumulator.backend.attributes import with_attribute
from gradient_accumulator.backend.jax.replicas import active_replicas, check_in_step
from gradient_accumulator.backend.jax.update import make_update
from gradient_accumulator.pieces import (
    Accumulation,
    Epoch,
    Pieces,
    checked,
    cut,
    map_leaves,
    pieces_of,
)

KERAS_DRAWS_TO_BUILD = True  # whether `fit` builds the model from a batch of its data


def make_train_function(
    model: keras.Model, accumulation: Accumulation, epoch: Epoch
) -> Callable[[tuple, Iterator], tuple]:
    """The function that `fit` calls with its state and iterator."""
    if accumulation.accum_dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError(
            "JAX has float64 only where its flag `jax_enable_x64` is set. Set it, or "
            "sum in float32. Received: accum_dtype='float64'"
        )
    update = make_update(model, accumulation, epoch)
    steps_per_execution = model.steps_per_execution
    cuts = accumulation.microbatch_size is not None

    def train_function(state, iterator):
        logs = None
        for number in range(steps_per_execution):
            with _kept_on_failure(model, state):
                epoch.check_begun()
                try:
                    batches = iterator if cuts else map(checked, iterator)
                    pieces = epoch.draw(batches, accumulation.accum_steps or 1)
                except StopIteration:
                    if logs is None:
                        raise
                    # The rest of what Keras counted for this call.
                    rest = steps_per_execution - 1 - number
                    epoch.uncount(rest * (accumulation.accum_steps or 1))
                    break
                if cuts:
                    (batch,) = pieces.iterator
                    pieces = _cut(batch, accumulation.microbatch_size)
                    epoch.cut(pieces.count, pieces.on_device)
                logs, state = update(state, pieces)
        return logs, state

    return train_function


@contextmanager
def _kept_on_failure(model: keras.Model, state: tuple) -> Iterator[None]:
    """Give the model the state of before the update, if that fails.

    During `fit` the state is here only: Keras takes the values out of its variables.
    """
    try:
        yield
    except StopIteration:
        raise  # an epoch's end
    except BaseException:
        names = ("trainable", "non_trainable", "optimizer", "metrics")
        model._jax_state = {
            f"{name}_variables": values for name, values in zip(names, state)
        }
        model.jax_state_sync()
        raise


def _cut(batch, microbatch_size):
    if isinstance(batch, Pieces):  # of arrays
        return batch
    replicas = active_replicas(batch)
    if replicas is None:
        return cut(batch, microbatch_size, _take)
    return cut(batch, microbatch_size, replicas.take, replicas.count)


def _take(array, start, stop):
    if isinstance(array, jax.Array):
        # With the start an operand, one program serves all pieces.
        return jax.lax.dynamic_slice_in_dim(array, start, stop - start)
    return array[start:stop]


@contextmanager
def fitting(model: keras.Model, epoch: Epoch, group: int) -> Iterator[None]:
    """Around `fit`: here the train function draws its pieces itself."""
    yield


def draw_arrays(
    model: keras.Model, epoch: Epoch, microbatch_size: int, iterator: Any, arrays: Any
) -> tuple[Any, str, Callable] | None:
    """How `fit` draws pieces, not full batches: see `trainer.drawing`."""
    if keras.distribution.distribution() is not None:
        return None  # each device gets its part of a full batch
    if arrays.sparse:
        return None

    def get_iterator():
        # As far ahead as Keras draws, for NumPy's random state to be the same.
        with with_attribute(iterator, "data_adapter", arrays.numbers()):
            drawn = type(iterator)._get_iterator(iterator)
        return _in_pieces(epoch, microbatch_size, arrays, drawn)

    return iterator, "_get_iterator", get_iterator


def _in_pieces(epoch, microbatch_size, arrays, drawn):
    """The pieces of one full batch after the other, of whose examples are numbers."""
    inputs = arrays.sliceable("jax")  # in each epoch, for callbacks may change arrays
    for (numbers,) in drawn:
        if not epoch.number:  # Keras draws to build the model
            yield arrays.symbolic(_taken(inputs, slice(1)))
            continue
        # A piece goes to the device when it is its turn.
        piece = partial(_piece, inputs, np.asarray(numbers))
        yield pieces_of(len(numbers), microbatch_size, piece)


def _piece(inputs, numbers, start, stop):
    return _taken(inputs, numbers[start:stop])


def _taken(sliceable, numbers):
    return map_leaves(
        lambda array: array.convert_to_jax_compatible(array[numbers]), sliceable
    )


def epoch_ended(epoch: Epoch) -> None:
    """Called after the last update of an epoch, before Keras goes on."""
    check_in_step(epoch.number, epoch.updates, 0)


def call_once(function: Callable, *data: Any) -> list:
    """A function's list of results for nested arrays, without gradients, in NumPy."""
    # Else JAX would compile each of its operations for itself.
    return [np.asarray(value) for value in jax.jit(function)(*data)]
