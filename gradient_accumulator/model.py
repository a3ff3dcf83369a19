"""`accumulate` and `GradientAccumulateModel`: models that train in micro-batches."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from gradient_accumulator.agc import AdaptiveClipping
from gradient_accumulator.arguments import names_arguments
from gradient_accumulator.checks import check_model
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras
from gradient_accumulator.fit import (
    Accumulating,
    Model,
    accumulate_as,
    accumulation_of,
)
from gradient_accumulator.received import described
from gradient_accumulator.settings import Accumulation, positive_int


@names_arguments()
def accumulate(
    model: Model,
    *,
    accum_steps: int | None = None,
    microbatch_size: int | None = None,
    accum_dtype: str = "float32",
    use_agc: bool = False,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    agc_exclude: Any = None,
    warn: bool = True,
) -> Model:
    """Make a Keras model train in micro-batches, in place.

    An update of the weights is computed from several micro-batches of data, one after
    the other. It equals the update that plain Keras computes from the whole batch:
    weights, optimizer variables, metrics and logs are equal up to rounding. Only one
    micro-batch's activations are in memory at a time.

    ```
    for each update:
        gradient = 0
        for each micro-batch: gradient += its weight * gradient of its mean loss
        apply the optimizer to the gradient, once
    ```

    The weight of a micro-batch depends on the loss:

    - A compiled loss weighs a micro-batch by the number that it divides by: the number
      of loss values, the number of unmasked values, or the sum of the sample weights.
    - Additional losses (regularizers, scalars given to `add_loss`, and what a model's
      own `compute_loss` adds) weigh a micro-batch by its share of the examples. This is
      exact if the batch's loss is the mean of its examples' losses. Keras sums a tensor
      with axes that is given to `add_loss`: the sums of the micro-batches add up.
    - A loss whose class overrides `__call__`, or whose `call` returns one number for a
      batch, weighs a micro-batch by its share of the examples too, and is exact under
      the same condition. If it returns one number, it is not exact with
      `sample_weight`: Keras multiplies the number by the weights of the batch, and
      micro-batches multiply it by their own weights.

    The first `fit` warns (`AccumulationWarning`) of a loss that couples the examples of
    a batch, as Keras's `Dice()` does, and of batch normalization, which sees a
    micro-batch and not the batch. After the first epoch it warns if nothing was
    accumulated. `model.accumulation` shows how a model accumulates; `fit` with
    `verbose=1` prints it in one line.

    Several devices, each with its share of every batch, exchange gradients once an
    update: under `tf.distribute`, under `keras.distribution` (JAX), and in processes of
    `torch.distributed`. On JAX they exchange them with every micro-batch if the model
    has a `compute_metrics` of its own, metrics of your own classes, layers that keep a
    state of the data that they see, or layouts for the outputs of layers.

    The model keeps its weights, compile state and optimizer state, and stays an
    instance of its class. A saved model does not hold how it accumulates. A model that
    `load_model` or `clone_model` returns, or that a callback saved, trains as in plain
    Keras, with one update for every batch, until you call `accumulate` on it. A copy
    that `copy.deepcopy` or pickle makes goes on accumulating. A
    `GradientAccumulateModel` goes on accumulating in all of these cases.

    Args:
        model: A Keras model: functional, Sequential or subclassed, compiled or not.
        accum_steps: Positive int. `fit` is given micro-batches, and this many of them
            make an update; an epoch's last update takes the micro-batches that are
            left. Micro-batches may differ in size and shape. `steps_per_epoch` counts
            micro-batches, and batch-level callbacks run once an update. 1 restores
            plain training.
        microbatch_size: Positive int. `fit` is given batches, and cuts each batch into
            micro-batches of this many examples; the last one may be smaller. If a batch
            is distributed over devices, each device cuts its share.
        accum_dtype: Name of the float dtype in which gradients are summed (gradients of
            float64 variables are always summed in float64).
        use_agc: Whether to clip the gradient of each update adaptively, before the
            optimizer sees it: see `adaptive_clip_grad`.
        clip_factor: Positive number, of adaptive clipping.
        eps: Positive number, of adaptive clipping.
        agc_exclude: The variables that are not clipped: a layer, a name (of a layer or
            variable), a function of a variable that returns a bool, or a list of these.
        warn: Whether to warn if updates differ from those on the batch, or if nothing
            is accumulated.

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is no Keras model, or an argument has a wrong type.
        ValueError: If a size is not positive, if both sizes or none are given, or if
            the model has a `train_step` of its own or a stateful RNN. `fit` raises it
            if `agc_exclude` names a layer or a variable that the model does not have.

    Example:

    ```python
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    model = accumulate(model, microbatch_size=8)
    model.fit(x, y, batch_size=64)  # updates from 64 examples
    ```
    """
    clipping = AdaptiveClipping(clip_factor, eps, agc_exclude) if use_agc else None
    accumulation = Accumulation(
        accum_steps, microbatch_size, accum_dtype, clipping, warn
    )
    check_model(model)
    if isinstance(model, GradientAccumulateModel) and _is_made(type(model)):
        model.__class__ = _functional_class(type(model).__bases__[0], accumulation)
    return accumulate_as(model, accumulation)


_register = keras.saving.register_keras_serializable(
    "gradient_accumulator", "GradientAccumulateModel"
)


class _WithSettings(Accumulating):
    """A base class that keeps the constructor's arguments, in `_settings`.

    Keras itself keeps the defaults only. `GradientAccumulateModel` does not define this
    `__new__` itself, because Python would then show its signature as that of the class.
    """

    def __new__(cls, *args, **kwargs):
        model = super().__new__(cls, *args, **kwargs)
        model.__dict__["_settings"] = _settings(cls, args, kwargs)
        return model


@_register
class GradientAccumulateModel(_WithSettings):
    """A `keras.Model` that trains in micro-batches.

    With `inputs` and `outputs` it is a functional model, as `keras.Model` is. A
    subclass with its own `call` calls `super().__init__` without these two. The model
    trains as `accumulate` describes, which does the same to an existing model.

    Give either `accum_steps` or `microbatch_size`: with `microbatch_size`, leave
    `accum_steps` at 1.

    A saved functional model loads as a `GradientAccumulateModel` if this package is
    imported. If it is not, Keras 3 loads it as a plain functional model.

    Args:
        accum_steps: Positive int, the number of micro-batches in an update, if `fit` is
            given micro-batches. 1 is plain training.
        mixed_precision: No longer needed, and without effect: Keras itself scales the
            loss under the policy `mixed_float16`.
        use_agc: Whether to clip the gradient of each update adaptively: see
            `adaptive_clip_grad`.
        clip_factor: Positive number, of adaptive clipping.
        eps: Positive number, of adaptive clipping.
        experimental_distributed_support: No longer needed, and without effect.
        microbatch_size: Positive int, the number of examples in a micro-batch, if `fit`
            is given batches.
        accum_dtype: Name of the float dtype in which gradients are summed.
        agc: Another spelling of `use_agc`.
        agc_exclude: The variables that are not clipped: see `accumulate`.
        warn: Whether to warn: see `accumulate`.
        **kwargs: Arguments of `keras.Model`: `inputs`, `outputs`, `name`, `trainable`.

    Raises:
        TypeError, ValueError: As in `accumulate`, and for arguments that `keras.Model`
            does not know.

    Example:

    ```python
    image = keras.Input((32, 32, 3))
    h = keras.layers.Conv2D(32, 3, strides=2, activation="relu")(image)
    h = keras.layers.GlobalAveragePooling2D()(h)
    classes = keras.layers.Dense(10, activation="softmax")(h)
    model = GradientAccumulateModel(accum_steps=4, inputs=image, outputs=classes)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=8)  # updates from 32 examples
    ```
    """

    # The settings; None if the model trains as in plain Keras.
    accumulation: Accumulation | None = None

    @names_arguments()
    def __init__(
        self,
        accum_steps: int = 1,
        mixed_precision: bool = False,
        use_agc: bool = False,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        experimental_distributed_support: bool = False,
        *,
        microbatch_size: int | None = None,
        accum_dtype: str = "float32",
        agc: bool = False,
        agc_exclude: Any = None,
        warn: bool = True,
        **kwargs,
    ):
        clipping = None
        if use_agc or agc:
            clipping = AdaptiveClipping(clip_factor, eps, agc_exclude)
        accum_steps = positive_int("accum_steps", accum_steps)
        accumulation = Accumulation(
            None if microbatch_size is not None and accum_steps == 1 else accum_steps,
            microbatch_size,
            accum_dtype,
            clipping,
            warn,
        )
        if "inputs" in kwargs or "outputs" in kwargs:
            _check_functional_arguments(kwargs)
            kind: Any = type(self)
            self.__class__ = _functional_class(kind, accumulation)
            trainer.Functional.__init__(self, **kwargs)
        else:
            super().__init__(**kwargs)
        accumulate_as(self, accumulation)

    @trainer.default
    def get_config(self):
        config = super().get_config()
        if "layers" in config:
            first, *others = config["layers"]
            how = accumulation_of(self) or Accumulation(accum_steps=1)
            settings = how.get_config(self.weights)
            return {**config, "layers": [{**first, _ANNOTATION: settings}, *others]}
        config.update(self._settings)
        accumulation = accumulation_of(self)
        if "agc_exclude" in config and accumulation and accumulation.clipping:
            # A file cannot hold functions: it gets the names of the variables.
            clipping = accumulation.clipping.get_config(self.weights)
            config["agc_exclude"] = clipping["agc_exclude"]
        return config

    def __reduce__(self):
        function, *others = super().__reduce__()
        if getattr(function, "__self__", None) is type(self):
            # Pickle finds no class that was made for a functional model. The file in
            # the pickle says which class is to be loaded.
            function = getattr(GradientAccumulateModel, function.__name__)
        return function, *others

    @classmethod
    def from_config(cls, config, custom_objects=None):
        kind: Any = cls
        if kind is GradientAccumulateModel and "layers" not in config:
            raise ValueError(
                "The config is not that of a functional `GradientAccumulateModel` of "
                "this version. Configs of version 0.5 do not contain layers. Received: "
                f"config with {sorted(config)}"
            )
        if "layers" in config and _has_our_constructor(kind):
            config = dict(config)
            first, *others = config["layers"]
            settings = first.get(_ANNOTATION, {"accum_steps": 1})
            config["layers"] = [
                {key: first[key] for key in first if key != _ANNOTATION},
                *others,
            ]
            kind = _functional_class(kind, Accumulation.from_config(settings))
        # `super()` would call the method for `cls` instead of `kind`.
        return keras.Model.from_config.__func__(kind, config, custom_objects)


# The entry of a functional model's config that holds its settings. Keras does not read
# it, so that plain Keras can load the file.
_ANNOTATION = "gradient_accumulation"


def _has_our_constructor(cls: Any) -> bool:
    return cls.__init__ is GradientAccumulateModel.__init__


def _is_made(cls: Any) -> bool:
    """Whether `_functional_class` made a class for certain settings."""
    return "_made_for" in vars(cls)


def _settings(cls: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Returns those of a constructor's arguments that are our constructor's too."""
    try:
        given = inspect.signature(cls.__init__).bind(None, *args, **kwargs).arguments
    except TypeError:  # the constructor will raise the same error
        return {}
    ours = inspect.signature(GradientAccumulateModel.__init__).parameters.values()
    names = {p.name for p in ours if p.kind is not p.VAR_KEYWORD} - {"self"}
    return {name: v for name, v in {**given, **kwargs}.items() if name in names}


@functools.cache
def _functional_class(cls: Any, accumulation: Accumulation) -> type:
    """Returns the functional variant of a `GradientAccumulateModel` class.

    Keras, too, gives a functional model another class than the one that was called. The
    new class knows its `accumulation`, so that `keras.models.clone_model` keeps it.
    """
    name = cls.__name__
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    if _has_our_constructor(cls):
        namespace["_made_for"] = accumulation
        namespace["__init__"] = trainer.constructor(
            lambda model: accumulate_as(model, accumulation)
        )
    elif cls.get_config is GradientAccumulateModel.get_config:
        namespace["get_config"] = trainer.Functional.get_config
    if cls is GradientAccumulateModel:
        name = trainer.FUNCTIONAL_NAME
        namespace["__module__"] = trainer.Functional.__module__
    made = type(name, (cls, trainer.Functional), namespace)
    if cls is GradientAccumulateModel:
        _register(made)
        _register(cls)  # the last one registered is the one that loads
        trainer.register(cls)
        return made
    package, found, registered = keras.saving.get_registered_name(cls).rpartition(">")
    if found:
        register = keras.saving.register_keras_serializable(package, registered)
        register(made)
        register(cls)
    return made


def _check_functional_arguments(arguments: dict) -> None:
    unknown = set(arguments) - {"inputs", "outputs", "name", "trainable"}
    if unknown:
        raise TypeError(
            "A functional `GradientAccumulateModel` takes `inputs`, `outputs`, `name` "
            "and `trainable` besides its own arguments. Received: "
            + ", ".join(f"{n}={described(arguments[n])}" for n in sorted(unknown))
        )
    for name in ("inputs", "outputs"):
        if name not in arguments:
            raise ValueError(
                "A functional model needs both `inputs` and `outputs`. "
                f"Received: {name}=None"
            )
