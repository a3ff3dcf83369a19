"""`Accumulating`, the class whose `fit` accumulates, and how a model gets it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from gradient_accumulator import devices, engine
from gradient_accumulator.checks import check_backend, check_layers, check_optimizer
from gradient_accumulator.compat import CompiledModel, internals
from gradient_accumulator.compat.api import keras
from gradient_accumulator.microbatches import Epoch
from gradient_accumulator.notices import Notices
from gradient_accumulator.settings import Accumulation
from gradient_accumulator.statistics import pooling_layers

Model = TypeVar("Model", bound=keras.Model)

# The entry of a model's `__dict__` for its `Training`. Keras does not track or save it.
_TRAINING = "_gradient_accumulation"
# The attribute of a class made by `_accumulating` that holds the model's own class.
_MADE_OF = "_gradient_accumulation_of"


class Training:
    """The state that a model keeps from one call of `fit` to the next.

    Args:
        accumulation: How the model accumulates.
    """

    def __init__(self, accumulation: Accumulation):
        self.accumulation = accumulation
        self.engine = engine.new_engine()
        self.epoch = Epoch()
        self.notices = Notices(accumulation)
        # A function that is called when Keras has set up the data of `fit`.
        self.data_is_ready: Callable[[], None] = lambda: None


class Accumulating(internals.BuiltByFit):
    """A class between a model's own class and `keras.Model`.

    A model's own `fit` runs first and may change the data. So this `fit` gets the data
    that Keras would get. All other methods of the model's own class also come first.
    """

    def fit(self, *args, **kwargs):
        training = training_of(self)
        if training is None:
            return super().fit(*args, **kwargs)
        check_backend()
        check_layers(self)
        check_optimizer(self)
        CompiledModel(self).check_compiled()
        _reset_statistics(self)
        epoch = training.epoch
        data = internals.FitData(self, training, _arguments_of_fit(self, args, kwargs))
        training.notices.before_fit(self, data.arguments)
        call = epoch.of_call(
            data.steps_per_epoch,
            fitting=True,
            # One of several processes cannot take fewer micro-batches than the others.
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
        made = self.__dict__.get("train_function")
        if force or made is None or training.engine.is_outdated(self):
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
        CompiledModel(self).check_compiled()
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
        if _MADE_OF not in vars(cls):  # this class accumulates without `accumulate`
            return reduced
        return _unpickled, (_of_class(vars(cls)[_MADE_OF], reduced), _config_of(self))

    def __deepcopy__(self, memo):
        return _rebuilt(*copy.deepcopy(self.__reduce__(), memo))


def training_of(model: keras.Model) -> Training | None:
    """The model's `Training`; None if it does not accumulate."""
    return model.__dict__.get(_TRAINING)


def accumulation_of(model: keras.Model) -> Accumulation | None:
    """How a model accumulates; None if it does not."""
    training = training_of(model)
    return None if training is None else training.accumulation


def _fitting(model: keras.Model) -> Training | None:
    """The model's `Training` during `fit`, else None."""
    training = training_of(model)
    return training if training is not None and training.epoch.fitting else None


def accumulate_as(model: Model, accumulation: Accumulation) -> Model:
    """`accumulate`, with arguments that have been checked."""
    check_backend()
    if isinstance(model.__dict__.get("accumulation"), Accumulation):
        del model.__dict__["accumulation"]
    model.__dict__.pop(_TRAINING, None)
    # The model may have a train function for another way of training.
    model.train_function = None
    if accumulation.is_plain:
        model.__class__ = own_class(model)
        return model
    model.__class__ = _accumulating(type(model))
    model.__dict__[_TRAINING] = Training(accumulation)
    # A user's own attribute, or layer, of that name stays.
    if getattr(model, "accumulation", None) is None:
        model.__dict__["accumulation"] = accumulation
    return model


def _accumulating(cls: Any) -> Any:
    """The class of an accumulating model, made of the model's own class.

    It has the name of the model's own class. A saved, loaded or cloned model is of the
    model's own class.
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
            "__module__": internals.public_module(cls),
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
        register(cls)  # Keras loads the class that was registered last
    return made


def own_class(model: Any) -> type:
    """A model's own class, without `Accumulating`."""
    return vars(type(model)).get(_MADE_OF, type(model))


def _config_of(model: keras.Model) -> dict | None:
    accumulation = accumulation_of(model)
    return None if accumulation is None else accumulation.get_config(model.weights)


def _of_class(cls: Any, reduced: tuple) -> tuple:
    """The result of `__reduce__` for a model, changed to make one of its own class."""
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
    if state is not None:  # Keras 2 gives it for a model that is not built
        vars(model).update(state)
    return model


def _unpickled(reduced: tuple, config: dict | None) -> keras.Model:
    model = _rebuilt(*reduced)
    if config is None:
        return model
    return accumulate_as(model, Accumulation.from_config(config))


class _EpochCallback(keras.callbacks.Callback):
    """Says when an epoch begins, and checks at its end the data that it got.

    It is the first of the callbacks, so that the others do not see the end of an epoch
    that failed.
    """

    def __init__(self, training: Training, data: Any):
        super().__init__()
        self.training = training
        self.data = data

    def on_train_begin(self, logs=None):
        self.data.begin(self.params or {})

    def on_epoch_begin(self, epoch, logs=None):
        # The length is needed, because several workers read ahead of the epoch's end.
        length = self.data.epoch_length(self.params or {})
        self.training.epoch.begin(length, epoch + 1)

    def on_test_begin(self, logs=None):
        self.training.engine.epoch_ended(self.training.epoch)

    def on_epoch_end(self, epoch, logs=None):
        epoch = self.training.epoch
        self.training.engine.epoch_ended(epoch)
        epoch.check_not_empty()
        # If the length is known, Keras warns.
        if self.data.endless and not epoch.sized and not self.model.stop_training:
            epoch.check_complete()
        self.training.notices.after_epoch(self.model, epoch)


def _arguments_of_fit(model, args, kwargs) -> dict:
    """All arguments of a call of Keras's `fit`, by name."""
    try:
        bound = _FIT.bind(model, *args, **kwargs)
    except TypeError as error:  # a call of `fit` would raise this
        raise TypeError(f"{keras.Model.fit.__qualname__}() {error}") from None
    bound.apply_defaults()
    _, *names = bound.arguments
    return {name: bound.arguments[name] for name in names}


_FIT = inspect.signature(keras.Model.fit)


@contextlib.contextmanager
def _not_empty(epoch: Epoch) -> Iterator[None]:
    """A context that raises the right error if the data of `fit` has no batch."""
    try:
        yield
    except StopIteration:
        epoch.check_not_empty()
        raise


def _reset_statistics(model: keras.Model) -> None:
    """Forget the statistics that calls in training outside of an update have pooled."""
    for layer in pooling_layers(model):
        if layer.pending:  # reading costs less than assigning
            layer.reset()
