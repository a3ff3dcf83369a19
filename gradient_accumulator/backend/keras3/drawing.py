"""How the iterator that `fit` of Keras 3 makes of its data draws and counts batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np
from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.epoch_iterator import EpochIterator

from gradient_accumulator.backend.attributes import with_attribute
from gradient_accumulator.backend.keras3.arrays import arrays_of


def made_to_train(model: keras.Model, arguments: dict) -> bool:
    """Whether an `EpochIterator` is for the `fit` of a model to train on.

    Called by its constructor. In the meantime others may be made: by a model's own
    `fit` that evaluates first, by other models and other threads.

    Args:
        model: The model.
        arguments: The constructor's. That for validation data has no `class_weight`.
    """
    frame = sys._getframe(1)
    while frame.f_back and isinstance(frame.f_locals.get("self"), EpochIterator):
        frame = frame.f_back
    return "class_weight" in arguments and frame.f_locals.get("self") is model


@contextmanager
def drawing(
    model: keras.Model,
    epoch: Any,
    draw_arrays: Callable | None,
    check_first: Callable | None,
) -> Iterator[None]:
    """Around `fit`: how its iterator draws and counts batches.

    Keras counts `steps_per_execution` for each update, and goes on with the data in the
    next epoch, also where the last update of `steps_per_epoch` took fewer.

    Args:
        model: The model.
        epoch: An `Epoch` of this call of `fit`, which calls its `uncount`.
        draw_arrays: A backend's `draw_arrays`, already given the model, `epoch` and the
            number of examples in a piece; or None. Called with the iterator and the
            `Arrays` that it draws from, if they are its data. Returns an object, and
            the name and value of an attribute that it is to have meanwhile, for pieces
            to be drawn; None if full batches are.
        check_first: Function of a batch, called before Keras builds the model from it;
            None where Keras does not.
    """
    original = EpochIterator.__init__
    replaced = ExitStack()

    def __init__(self, *args, **kwargs):
        if not made_to_train(model, kwargs):
            original(self, *args, **kwargs)
            return
        EpochIterator.__init__ = original
        original(self, *args, **kwargs)

        def uncount(batches):
            self._steps_seen -= batches

        epoch.uncount = uncount
        if check_first is not None:
            build = _building(model, self, epoch, check_first)
            replaced.enter_context(with_attribute(model, "_symbolic_build", build))
        arrays = arrays_of(self)
        if draw_arrays is not None and arrays is not None:
            replacement = draw_arrays(self, arrays)
            if replacement is not None:
                replaced.enter_context(with_attribute(*replacement))

    EpochIterator.__init__ = __init__
    try:
        # The data is not to be held by what refers to itself.
        with replaced:
            yield
    finally:
        EpochIterator.__init__ = original


def _building(
    model: keras.Model, training: EpochIterator, epoch: Any, check: Callable
) -> Callable:
    """A `_symbolic_build`, which Keras calls with the iterator that it is to draw from.

    The arrays of a batch that do not fit each other would be the backend's error.
    """

    def _symbolic_build(iterator=None, data_batch=None):
        if iterator is training:
            iterator = _first(iterator, epoch, check)
        type(model)._symbolic_build(model, iterator, data_batch)

    return _symbolic_build


def _first(iterator, epoch, check):
    """The batch that Keras builds a model from, if it draws one.

    What it draws of a generator, or of a `PyDataset` with workers, would be lost.
    """
    adapter = iterator.data_adapter
    if isinstance(adapter, GeneratorDataAdapter):
        first = adapter._first_batches[0]
    elif isinstance(adapter, PyDatasetAdapter):
        first = adapter.py_dataset[0]
    else:
        batches = (next(iter(batches), None) for *_, batches in iterator)
        first = next(batches, None)
    if first is None:
        epoch.check_not_empty()
    check(first)
    yield *_STEPS, [keras.tree.map_structure(_as_array, first)]


# What an iterator gives beside batches: before Keras 3.11 not the last step.
_STEPS = (
    (0, 0) if tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 11) else (0,)
)


def _as_array(leaf):
    """A generator may give a number, of which Keras makes an array later."""
    return np.array(leaf) if isinstance(leaf, (int, float)) else leaf
