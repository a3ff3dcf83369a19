"""`fit` and `train_on_batch` of a model, in pieces."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from gradient_accumulator import backend
from gradient_accumulator.backend import trainer
from gradient_accumulator.backend.api import keras
from gradient_accumulator.backend.statistics import pooling_layers
from gradient_accumulator.checks import check_backend, check_layers, check_optimizer
from gradient_accumulator.fit_arguments import FitArguments
from gradient_accumulator.notices import Notices
from gradient_accumulator.pieces import (
    Accumulation,
    Epoch,
    batch_size,
    checked,
    leaves,
)

Model = TypeVar("Model", bound=keras.Model)

# The attributes that `accumulate` sets on a model, over its class's methods.
_METHODS = ("fit", "make_train_function", "train_on_batch")


def accumulation_of(model: keras.Model) -> Accumulation | None:
    """How a model accumulates, None if it trains as Keras's do."""
    return getattr(model.__dict__.get("fit"), "accumulation", None)


def accumulate_as(model: Model, accumulation: Accumulation) -> Model:
    """What `accumulate` does, with arguments that are checked."""
    check_backend()
    engine = backend.active()
    accum_steps = accumulation.accum_steps
    if isinstance(model.__dict__.get("accumulation"), Accumulation):
        del model.__dict__["accumulation"]
    # A user's own attribute of that name, or a layer, stays what it is.
    is_free = getattr(model, "accumulation", None) is None
    for name in _METHODS:
        model.__dict__.pop(name, None)
    # The function that was made for another way of training is of no use.
    model.train_function = None
    if accumulation.is_plain:
        return model

    epoch = Epoch()
    notices = Notices(accumulation)
    draw_arrays = None
    if accumulation.microbatch_size is not None:
        draw_arrays = partial(
            engine.draw_arrays, model, epoch, accumulation.microbatch_size
        )
    check_first = None
    if engine.KERAS_DRAWS_TO_BUILD:
        check_first = checked if accum_steps is not None else batch_size
    steps_per_execution: list[Any] = []  # the user's, while `fit` sets up its own

    def fit(*args, **kwargs):
        check_backend()
        check_layers(model)
        check_optimizer(model)
        trainer.check_compiled(model)
        _reset_statistics(model)
        arguments = FitArguments(model, args, kwargs)
        length = _known_length(arguments.get("x"))
        call = epoch.of_call(
            arguments.get("steps_per_epoch"),
            fitting=True,
            # Alone, a process could not take fewer pieces than the others.
            sized=length is not None
            and length >= 0
            and not engine.replicas.several_processes(model),
        )
        _check_not_empty(arguments)
        notices.before_fit(model, arguments)
        callback = _EpochCallback(epoch, arguments, engine.epoch_ended, notices)
        steps = trainer.steps_per_execution(model)
        if accum_steps is not None:
            # Keras then counts an update as so many steps, as it does for itself.
            steps_per_execution.append(steps)
            handed = trainer.times(steps, accum_steps)
            trainer.set_steps_per_execution(model, handed)
            callback.begin = partial(trainer.begin, handed, accum_steps)
        try:
            with (
                call,
                _not_empty(epoch),
                _added(callback, arguments, model),
                trainer.drawing(model, epoch, draw_arrays, check_first),
                engine.fitting(model, epoch, accum_steps or 1),
            ):
                return arguments.call()
        finally:
            trainer.set_steps_per_execution(model, steps)
            steps_per_execution.clear()

    def make_train_function(force=False):
        if steps_per_execution:
            # Only the iterator over training data needed the larger number.
            trainer.set_steps_per_execution(model, steps_per_execution[0])
        if model.train_function is None or force:
            model.train_function = engine.make_train_function(
                model, accumulation, epoch
            )
        return model.train_function

    def train_on_batch(*args, **kwargs):
        if accum_steps not in (None, 1):
            raise ValueError(
                "`train_on_batch` updates the weights from the one batch that it is "
                "given, and with `accum_steps` an update takes several. Use "
                "`accumulate(model, microbatch_size=...)` and give it full batches, "
                f"or call `fit`. Received: accum_steps={accum_steps}"
            )
        check_backend()
        check_optimizer(model)
        trainer.check_compiled(model)
        _reset_statistics(model)
        with epoch.of_call():
            return type(model).train_on_batch(model, *args, **kwargs)

    for name, method in zip(_METHODS, (fit, make_train_function, train_on_batch)):
        # Attributes of the object: its class, and what is saved of it, stay plain.
        setattr(model, name, functools.wraps(getattr(type(model), name))(method))
    model.__dict__["fit"].accumulation = accumulation
    model.__dict__["make_train_function"].notices = notices
    if is_free:
        model.__dict__["accumulation"] = accumulation
    return model


class _EpochCallback(keras.callbacks.Callback):
    """Tells the engine where an epoch begins, and checks what it was given."""

    def __init__(
        self, epoch: Epoch, arguments: FitArguments, ended: Callable, notices: Notices
    ):
        super().__init__()
        self.notices = notices
        self.epoch = epoch
        self.ended = ended
        self.endless = isinstance(arguments.get("x"), Iterator)
        self.begin: Callable[[int | None], None] = lambda length: None

    def on_train_begin(self, logs=None):
        self.begin((self.params or {}).get("steps"))

    def on_epoch_begin(self, epoch, logs=None):
        # Not all data ends with the epoch: several workers read ahead.
        self.epoch.begin((self.params or {}).get("steps"), epoch + 1)

    def on_test_begin(self, logs=None):
        self.ended(self.epoch)

    def on_epoch_end(self, epoch, logs=None):
        self.ended(self.epoch)
        self.epoch.check_not_empty()
        # Of other data Keras knows the length, and warns.
        if self.endless and not self.epoch.sized and not self.model.stop_training:
            self.epoch.check_complete()
        self.notices.after_epoch(self.model, self.epoch)


@contextmanager
def _added(
    callback: keras.callbacks.Callback, arguments: FitArguments, model: keras.Model
) -> Iterator[None]:
    """The arguments of `fit` with one more callback."""
    callbacks = arguments.get("callbacks")
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callback.set_model(model)
        callbacks.callbacks.insert(0, callback)
        try:
            yield
        finally:
            callbacks.callbacks.remove(callback)
        return
    if callbacks is None:
        callbacks = []
    elif not isinstance(callbacks, (list, tuple)):
        callbacks = [callbacks]
    # First, so that the others do not see the end of an epoch that failed.
    arguments.set("callbacks", [callback, *callbacks])
    yield


@contextmanager
def _not_empty(epoch: Epoch) -> Iterator[None]:
    """Says so where Keras finds nothing to build the model from."""
    try:
        yield
    except StopIteration:
        epoch.check_not_empty()
        raise


def _check_not_empty(arguments: FitArguments) -> None:
    """Raise before training where there is no data; what fails later differs."""
    data = arguments.get("x")
    if _known_length(data) == 0:
        Epoch().check_not_empty()
    if isinstance(data, types.GeneratorType):
        for first in data:
            arguments.set("x", _restored(first, data))
            return
        Epoch().check_not_empty()


def _known_length(data: Any) -> int | None:
    """The number of batches of a data set, of examples of arrays, or of strings.

    None where they do not tell.
    """
    if hasattr(data, "num_batches"):  # a `PyDataset`
        return data.num_batches
    if callable(getattr(data, "cardinality", None)):
        return int(data.cardinality())  # of tf.data, where less than 0 is not known
    arrays = leaves(data)
    if not arrays:
        return None if data is None else 0
    if isinstance(arrays[0], (str, bytes)):
        # For a `fit` of the model's own, which may read a file of that name.
        return None if arrays[0] is data else len(arrays)
    try:
        return len(arrays[0])
    except TypeError:  # has no length
        return None


def _restored(first: Any, others: Iterator) -> Iterator:
    yield first
    yield from others


def _reset_statistics(model: keras.Model) -> None:
    """Forget what calls in training outside of an update have pooled."""
    for layer in pooling_layers(model):
        if layer.pending:  # to look costs less than to assign
            layer.reset()
