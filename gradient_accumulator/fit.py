"""The class that `fit` of a model that accumulates enters by."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from gradient_accumulator import devices, engine
from gradient_accumulator.checks import check_backend, check_layers, check_optimizer
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras
from gradient_accumulator.microbatches import Epoch
from gradient_accumulator.notices import Notices
from gradient_accumulator.settings import Accumulation
from gradient_accumulator.statistics import pooling_layers

Model = TypeVar("Model", bound=keras.Model)

# Where a model keeps its `Training`: past what Keras tracks, and saves.
_TRAINING = "_gradient_accumulation"
# Where a class that `_accumulating` made has the model's own.
_MADE_OF = "_gradient_accumulation_of"


class Training:
    """What a model that accumulates keeps from one call of `fit` to the next.

    Args:
        accumulation: How it accumulates.
    """

    def __init__(self, accumulation: Accumulation):
        self.accumulation = accumulation
        self.engine = engine.new_engine()
        self.epoch = Epoch()
        self.notices = Notices(accumulation)
        # Called where Keras has set up the data of `fit`.
        self.data_is_ready: Callable[[], None] = lambda: None


class Accumulating(trainer.BuiltByFit):
    """Lies between a model's own class and `keras.Model`.

    There `fit` has the data that Keras would get, after what the model's own `fit` did
    with it, and everything else that a class overrides is still above.
    """

    def fit(self, *args, **kwargs):
        training = training_of(self)
        if training is None:
            return super().fit(*args, **kwargs)
        check_backend()
        check_layers(self)
        check_optimizer(self)
        trainer.check_compiled(self)
        _reset_statistics(self)
        epoch = training.epoch
        data = trainer.FitData(self, training, _arguments_of_fit(self, args, kwargs))
        training.notices.before_fit(self, data.arguments)
        call = epoch.of_call(
            data.steps_per_epoch,
            fitting=True,
            # Alone, a process could not take fewer micro-batches than the others.
            sized=data.length is not None
            and not devices.active().several_processes(self),
        )
        callback = _EpochCallback(training, data)
        with call, _not_empty(epoch), data.handed(callback) as arguments:
            history = super().fit(**arguments)
            training.engine.after_fit(self, epoch)
            return history

    def make_train_function(self, force=False):
        training = training_of(self)
        if training is None:
            return super().make_train_function(force)
        training.data_is_ready()
        if force or self.__dict__.get("train_function") is None:
            self.train_function = training.engine.make_train_function(self, training)
        return self.train_function

    def train_on_batch(self, *args, **kwargs):
        training = training_of(self)
        if training is None:
            return super().train_on_batch(*args, **kwargs)
        accum_steps = training.accumulation.accum_steps
        if accum_steps not in (None, 1):
            raise ValueError(
                "`train_on_batch` updates the weights from the one batch that it is "
                "given, and with `accum_steps` an update takes several. Use "
                "`accumulate(model, microbatch_size=...)` and give it batches, "
                f"or call `fit`. Received: accum_steps={accum_steps}"
            )
        check_backend()
        check_optimizer(self)
        trainer.check_compiled(self)
        _reset_statistics(self)
        with training.epoch.of_call():
            return super().train_on_batch(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        training = training_of(self)
        if training is None:
            return super().evaluate(*args, **kwargs)
        with training.epoch.evaluation():
            return super().evaluate(*args, **kwargs)

    def reset_metrics(self):
        training = _fitting(self)
        if training is not None:
            training.engine.before_epoch(self, training.epoch)
        super().reset_metrics()

    def get_metrics_result(self):
        training = _fitting(self)
        if training is None:
            return super().get_metrics_result()
        return training.engine.metrics_result(
            self, training.epoch, super().get_metrics_result
        )

    def __reduce__(self):
        reduced = super().__reduce__()
        cls: Any = type(self)
        if _MADE_OF not in vars(cls):  # accumulates wherever it is loaded
            return reduced
        return _unpickled, (_of_class(vars(cls)[_MADE_OF], reduced), _config_of(self))

    def __deepcopy__(self, memo):
        return _rebuilt(*copy.deepcopy(self.__reduce__(), memo))


def training_of(model: keras.Model) -> Training | None:
    """What a model that accumulates keeps, None if it trains as Keras's do."""
    return model.__dict__.get(_TRAINING)


def accumulation_of(model: keras.Model) -> Accumulation | None:
    """How a model accumulates, None if it trains as Keras's do."""
    training = training_of(model)
    return None if training is None else training.accumulation


def _fitting(model: keras.Model) -> Training | None:
    """The same during `fit`."""
    training = training_of(model)
    return training if training is not None and training.epoch.fitting else None


def accumulate_as(model: Model, accumulation: Accumulation) -> Model:
    """What `accumulate` does, with arguments that are checked."""
    check_backend()
    if isinstance(model.__dict__.get("accumulation"), Accumulation):
        del model.__dict__["accumulation"]
    model.__dict__.pop(_TRAINING, None)
    # The function that was made for another way of training is of no use.
    model.train_function = None
    if accumulation.is_plain:
        model.__class__ = own_class(model)
        return model
    model.__class__ = _accumulating(type(model))
    model.__dict__[_TRAINING] = Training(accumulation)
    # A user's own attribute of that name, or a layer, stays what it is.
    if getattr(model, "accumulation", None) is None:
        model.__dict__["accumulation"] = accumulation
    return model


def _accumulating(cls: Any) -> Any:
    """The class that a model of a class accumulates by.

    It goes by the name of the model's own, and what is saved, loaded or cloned of the
    model is of that.
    """
    if issubclass(cls, Accumulating):
        return cls
    for made in cls.__subclasses__():
        if vars(made).get(_MADE_OF) is cls:
            return made

    def __new__(_, *args, **kwargs):
        return cls(*args, **kwargs)

    made = type(
        cls.__name__,
        (cls, Accumulating),
        {
            "__module__": trainer.public_module(cls),
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__new__": __new__,
            "from_config": cls.from_config,
            _MADE_OF: cls,
        },
    )
    package, found, name = keras.saving.get_registered_name(cls).rpartition(">")
    if found:
        register = keras.saving.register_keras_serializable(package, name)
        register(made)
        register(cls)  # the last one registered is the one that loads
    return made


def own_class(model: Any) -> type:
    """The class that a model is of, but for how it trains."""
    return vars(type(model)).get(_MADE_OF, type(model))


def _config_of(model: keras.Model) -> dict | None:
    accumulation = accumulation_of(model)
    return None if accumulation is None else accumulation.get_config(model.weights)


def _of_class(cls: Any, reduced: tuple) -> tuple:
    """What `__reduce__` returned for a model, as for one of the class it is made of."""
    function, arguments, *state = reduced
    if isinstance(getattr(function, "__self__", None), type):  # a method of the class
        function = getattr(cls, function.__name__)
    arguments = tuple(
        cls if isinstance(each, type) and issubclass(each, Accumulating) else each
        for each in arguments
    )
    return function, arguments, *state


def _rebuilt(function: Callable, arguments: tuple, state: Any = None) -> keras.Model:
    model = function(*arguments)
    if state is not None:  # Keras 2 hands it on of a model that is not built
        vars(model).update(state)
    return model


def _unpickled(reduced: tuple, config: dict | None) -> keras.Model:
    model = _rebuilt(*reduced)
    if config is None:
        return model
    return accumulate_as(model, Accumulation.from_config(config))


class _EpochCallback(keras.callbacks.Callback):
    """Tells where an epoch begins, and checks what it was given.

    The first of the callbacks, so that others do not see the end of an epoch that
    failed.
    """

    def __init__(self, training: Training, data: Any):
        super().__init__()
        self.training = training
        self.data = data

    def on_train_begin(self, logs=None):
        self.data.begin(self.params or {})

    def on_epoch_begin(self, epoch, logs=None):
        # Not all data ends with the epoch: several workers read ahead.
        length = self.data.epoch_length(self.params or {})
        self.training.epoch.begin(length, epoch + 1)

    def on_test_begin(self, logs=None):
        self.training.engine.epoch_ended(self.training.epoch)

    def on_epoch_end(self, epoch, logs=None):
        epoch = self.training.epoch
        self.training.engine.epoch_ended(epoch)
        epoch.check_not_empty()
        # Of other data Keras knows the length, and warns.
        if self.data.endless and not epoch.sized and not self.model.stop_training:
            epoch.check_complete()
        self.training.notices.after_epoch(self.model, epoch)


def _arguments_of_fit(model, args, kwargs) -> dict:
    """All arguments of a call of Keras's `fit`, by name."""
    try:
        bound = _FIT.bind(model, *args, **kwargs)
    except TypeError as error:  # as calling it would
        raise TypeError(f"{keras.Model.fit.__qualname__}() {error}") from None
    bound.apply_defaults()
    _, *names = bound.arguments
    return {name: bound.arguments[name] for name in names}


_FIT = inspect.signature(keras.Model.fit)


@contextlib.contextmanager
def _not_empty(epoch: Epoch) -> Iterator[None]:
    """Says so where Keras finds nothing to build the model from."""
    try:
        yield
    except StopIteration:
        epoch.check_not_empty()
        raise


def _reset_statistics(model: keras.Model) -> None:
    """Forget what calls in training outside of an update have pooled."""
    for layer in pooling_layers(model):
        if layer.pending:  # to look costs less than to assign
            layer.reset()
