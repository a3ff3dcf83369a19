"""The data of `fit` on Keras 2, whose `steps_per_execution` counts updates."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from gradient_accumulator.compat.keras2_names import keras
from gradient_accumulator.microbatches import leaves, no_data, not_empty

BuiltByFit: Any = keras.Model  # the train function builds it


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
        self._steps: Any = None  # per execution, of a call of `fit`

    @contextmanager
    def handed(self, callback: Any) -> Iterator[dict]:
        """Around `fit` of Keras, which is to be called with these arguments.

        Keras counts an update as so many steps, as it does for itself. What reads the
        data keeps the variable that it was given when it was made; validation has the
        user's.
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
        """Called where training begins.

        Keras refuses more than one step where it does not know how long an epoch is.
        """
        if self._steps is not None and params.get("steps") is not None:
            self._steps.assign(self._steps * self.training.accumulation.accum_steps)

    def epoch_length(self, params: dict) -> int | None:
        """The number of batches in an epoch, None if it is not known."""
        return params.get("steps")


def _set_steps(model, steps):
    # Past the model's own `__setattr__`, for which a variable is a weight.
    object.__setattr__(model, "_steps_per_execution", steps)


def _length(data):
    """The number of batches of a data set, or of examples of arrays.

    None where they do not tell.
    """
    if callable(getattr(data, "cardinality", None)):
        cardinality = int(data.cardinality())
        return None if cardinality < 0 else cardinality
    arrays = leaves(data)
    if not arrays:
        return None if data is None else 0
    try:
        return len(arrays[0])
    except TypeError:  # has no length
        return None
