"""The data of `fit` on Keras 2, whose `steps_per_execution` counts updates."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from gradient_accumulator.compat.keras2_names import keras
from gradient_accumulator.microbatches import leaves, no_data, not_empty

BuiltByFit: Any = keras.Model  # the train function builds the model


class FitData:
    """The arguments of a call of `fit`: see `keras3_data.py`."""

    def __init__(self, model: Any, training: Any, arguments: dict):
        self.model = model
        self.training = training
        self.arguments = dict(arguments)
        self.steps_per_epoch = self.arguments["steps_per_epoch"]
        data = self.arguments["x"]
        self.endless = isinstance(data, types.GeneratorType)
        if self.endless:
            self.arguments["x"] = not_empty(data)
        self.length = _length(data)
        if self.length == 0:
            raise no_data()
        self._steps: Any = None  # the variable `steps_per_execution` of this call

    @contextmanager
    def handed(self, callback: Any) -> Iterator[dict]:
        """A context in which Keras's `fit` is called with the arguments that it yields.

        With `accum_steps` an update is as many steps as it has micro-batches, which
        Keras counts by its `steps_per_execution`. Keras's reader of the data keeps the
        variable that the model has while the reader is made. Afterwards the model has
        the user's variable again, which validation reads.
        """
        own = self.model._steps_per_execution
        if self.training.accumulation.accum_steps is not None:
            self._steps = tf.Variable(own, dtype=own.dtype, trainable=False)
            _set_steps(self.model, self._steps)
        self.training.data_is_ready = lambda: _set_steps(self.model, own)
        try:
            with self._added(callback) as callbacks:
                yield {**self.arguments, "callbacks": callbacks}
        finally:
            self.training.data_is_ready()
            self.training.data_is_ready = lambda: None

    @contextmanager
    def _added(self, callback):
        callbacks = self.arguments["callbacks"]
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callback.set_model(self.model)
            callbacks.callbacks.insert(0, callback)
            try:
                yield callbacks
            finally:
                callbacks.callbacks.remove(callback)
            return
        yield [callback, *tf.nest.flatten(callbacks or [])]

    def begin(self, params: dict) -> None:
        """Called when training begins: multiplies the steps of an execution.

        Keras refuses more than one step if it does not know the length of an epoch.
        """
        if self._steps is not None and params.get("steps") is not None:
            self._steps.assign(self._steps * self.training.accumulation.accum_steps)

    def epoch_length(self, params: dict) -> int | None:
        """Returns the number of batches in an epoch, or None if it is not known."""
        return params.get("steps")


def _set_steps(model, steps):
    # The model's own `__setattr__` would make the variable a weight.
    object.__setattr__(model, "_steps_per_execution", steps)


def _length(data):
    """Returns the number of batches of a data set, or of examples of arrays.

    It is None if it is not known.
    """
    if callable(getattr(data, "cardinality", None)):
        cardinality = int(data.cardinality())
        return None if cardinality < 0 else cardinality
    arrays = leaves(data)
    if not arrays:
        return None if data is None else 0
    try:
        return len(arrays[0])
    except TypeError:  # the array has no length
        return None
