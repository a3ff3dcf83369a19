"""The data of `fit` on Keras 3: an adapter that counts updates instead of batches."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from gradient_accumulator.microbatches import Epoch, leaves, no_data, not_empty


class Updates(DataAdapter):
    """An adapter of data with which Keras calls the train function once an update.

    Args:
        adapter: Keras's adapter of the data.
        batches: Function without arguments that returns the iterable from which the
            train function draws, for one epoch or several.
        to_build: Function without arguments that returns the iterable from which Keras
            builds the model; None if the train function builds it.
        count: The number of updates in the data, as Keras counts them; None if the data
            has no known length.
    """

    def __init__(
        self,
        adapter: DataAdapter,
        batches: Callable,
        to_build: Callable | None,
        count: int | None,
    ):
        self.adapter = adapter
        self.batches = batches
        self.to_build = to_build
        self.count = count

    def get_tf_dataset(self):
        return self.batches()

    get_jax_iterator = get_torch_dataloader = get_numpy_iterator = get_tf_dataset

    @property
    def num_batches(self):
        return self.count

    @property
    def batch_size(self):
        return self.adapter.batch_size

    @property
    def has_partial_batch(self):
        return self.adapter.has_partial_batch

    @property
    def partial_batch_size(self):
        return self.adapter.partial_batch_size

    def on_epoch_begin(self):
        self.adapter.on_epoch_begin()

    def on_epoch_end(self):
        self.adapter.on_epoch_end()


class _First(Updates):
    """`Updates` that only build a model. Keras ends the epoch once more later."""

    def on_epoch_end(self):
        pass


class BuiltByFit(keras.Model):
    """A model that Keras's `fit` builds from the data that `Updates` has for this."""

    def _symbolic_build(self, iterator=None, data_batch=None):
        updates = getattr(iterator, "data_adapter", None)
        if not isinstance(updates, Updates) or updates.to_build is None:
            super()._symbolic_build(iterator, data_batch)
            return
        first = type(iterator)(x=_First(updates.adapter, updates.to_build, None, None))
        try:
            super()._symbolic_build(first, data_batch)
        finally:
            first.reset()  # a reference cycle would keep the data in memory

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Keras would average the first batches of the replicas, which fails if they
        # differ in size, or if there are several workers.
        updates = getattr(iterator, "data_adapter", None)
        if isinstance(updates, Updates) and updates.to_build is None:
            return
        super()._maybe_symbolic_build(iterator, data_batch)


class FitData:
    """The arguments of a call of `fit`, whose data is counted in updates.

    Args:
        model: The model.
        training: Its `Training`.
        arguments: All arguments of `fit`, by name.

    Attributes:
        arguments: The arguments, whose training data does not contain validation data.
        steps_per_epoch: `steps_per_epoch` as the user gave it, or None.
        length: The number of batches in the data, or None if it is not known.
        endless: Whether the data is a generator, whose length Keras does not check
            against `steps_per_epoch`.

    Raises:
        ValueError: If there is no data.
    """

    def __init__(self, model: keras.Model, training: Any, arguments: dict):
        self.model = model
        self.training = training
        self.arguments = dict(arguments)
        self.steps_per_epoch = _limited(
            "max_steps_per_epoch", self.arguments["steps_per_epoch"]
        )
        self._split()
        if self.arguments["x"] is not None and not leaves(self.arguments["x"]):
            raise no_data()
        self.endless = isinstance(self.arguments["x"], types.GeneratorType)
        if self.endless:
            self.arguments["x"] = not_empty(self.arguments["x"])
        of_data = "x", "y", "sample_weight", "batch_size", "shuffle", "class_weight"
        self.adapter = get_data_adapter(
            steps_per_epoch=self.steps_per_epoch,
            **{name: self.arguments[name] for name in of_data},
        )
        self.length = self.adapter.num_batches
        if self.length == 0:
            raise no_data()

    def _split(self):
        given = self.arguments
        if given["validation_split"] and given["validation_data"] is None:
            names = "x", "y", "sample_weight"
            arrays, given["validation_data"] = train_validation_split(
                tuple(given[name] for name in names),
                validation_split=given["validation_split"],
            )
            given.update(zip(names, arrays))
            given["validation_split"] = 0.0

    @contextmanager
    def handed(self, callback: keras.callbacks.Callback) -> Iterator[dict]:
        """A context in which Keras's `fit` is called with the arguments that it yields.

        Args:
            callback: A callback that is called before the user's callbacks.
        """
        epoch = self.training.epoch
        batches, to_build = self.training.engine.batches(
            self.model, epoch, self.training.accumulation, self.adapter
        )
        steps = self.steps_per_epoch
        updates = Updates(self.adapter, batches, to_build, self._count())
        callbacks = _Counting(callback, self, epoch)
        yield {
            **self.arguments,
            "x": updates,
            "y": None,
            "sample_weight": None,
            "class_weight": None,
            "steps_per_epoch": steps and self._updates(steps),
            "callbacks": callbacks,
        }

    def begin(self, params: dict) -> None:
        """Called when training begins; on Keras 3 nothing is left to do."""

    def epoch_length(self, params: dict) -> int | None:
        """Returns the number of batches in an epoch, or None if it is not known."""
        return self.steps_per_epoch or self.length

    def _updates(self, batches):
        """Returns the number of updates in some batches of an epoch."""
        return math.ceil(batches / (self.training.accumulation.accum_steps or 1))

    def _counted(self, batches):
        """Returns that number, rounded up to calls of the train function.

        Keras counts `steps_per_execution` updates for a call.
        """
        executed = self.model.steps_per_execution
        return executed * math.ceil(self._updates(batches) / executed)

    def _count(self):
        """Returns the number of updates that Keras counts in all data."""
        if self.length is None:
            return None
        if not self.steps_per_epoch:
            return self._updates(self.length)
        epochs, rest = divmod(self.length, self.steps_per_epoch)
        return epochs * self._counted(self.steps_per_epoch) + self._counted(rest)


def _limited(name: str, number: int | None) -> int | None:
    """Returns a number of steps or epochs, at most the one in Keras's configuration.

    Keras 3.8 has no such configuration.
    """
    limit = getattr(keras.config, name, lambda: None)()
    return min(limit, number or limit) if limit else number


class _Counting(keras.callbacks.CallbackList):
    """The callbacks of a call of `fit`. They get numbers of batches, not of updates.

    Args:
        first: A callback that is called before the user's callbacks.
        data: The data of the call.
        epoch: The position of `fit` in its epoch.
    """

    def __init__(self, first: keras.callbacks.Callback, data: FitData, epoch: Epoch):
        given = data.arguments
        self._of_model = data.model
        self._of_epoch = epoch
        self._seen = 0  # the number of batches of the epoch so far
        if isinstance(given["callbacks"], keras.callbacks.CallbackList):
            # The user's `CallbackList` has its own parameters and its own model.
            super().__init__([first, given["callbacks"]])
            return
        super().__init__(
            [first, *keras.tree.flatten(given["callbacks"] or [])],
            add_history=True,
            add_progbar=given["verbose"] != 0,
            verbose=given["verbose"],
            epochs=_limited("max_epochs", given["epochs"]),
            steps=data.epoch_length({}),
        )

    def on_train_begin(self, logs=None):
        self.set_model(self._of_model)  # Keras has built the model by now
        super().on_train_begin(logs)

    def on_epoch_begin(self, epoch, logs=None):
        self._seen = 0
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(self._seen, logs)

    def on_train_batch_end(self, batch, logs=None):
        self._seen = self._of_epoch.seen
        super().on_train_batch_end(self._seen - 1, logs)
