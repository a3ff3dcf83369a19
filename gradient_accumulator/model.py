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
    the other, and equals the update that plain Keras computes from all of them at once:
    weights, optimizer variables, metrics and logs, up to rounding. Only one
    micro-batch's activations are in memory at a time.

    ```
    for each update:
        gradient = 0
        for each micro-batch: gradient += its weight * gradient of its mean loss
        apply the optimizer to the gradient, once
    ```

    Each compiled loss weighs a micro-batch by what it divides by (loss values, unmasked
    values, or sample weights); additional losses (regularizers, `add_loss`) by the
    micro-batch's share of the examples. A loss that cannot be taken apart, because its
    class overrides `__call__` or its `call` returns one number for the whole batch,
    weighs micro-batches by their examples, which is exact if the batch's loss is the
    mean of its examples' losses. So does what a model's own `compute_loss` adds. A
    tensor with axes that is given to `add_loss` is summed by Keras, and its
    micro-batches add up; a scalar is taken for a mean over examples. A loss that gives
    one number for a batch is not exact with `sample_weight`: Keras multiplies that
    number by the weights of the batch, and here by those of the micro-batch.

    The first `fit` warns (`AccumulationWarning`) of a loss that couples the examples of
    a batch, as Keras's `Dice()` does, and of batch normalization, which sees a
    micro-batch and not the batch; the first epoch, if nothing was accumulated.
    `model.accumulation` says how a model accumulates, and so does `fit` with
    `verbose=1`, in one line.

    Under `tf.distribute`, `keras.distribution` (JAX) or in processes of
    `torch.distributed` that each have their share of every batch, gradients are
    exchanged once an update. On JAX they are exchanged with every micro-batch in four
    cases: a model with a `compute_metrics` of its own, metrics of classes of your own,
    layers that keep a state of their own of what they see, and layouts of what layers
    return.

    The model keeps its weights, compile state and optimizer state, and stays an
    instance of its class. Nothing of accumulation is saved with it: what `load_model`
    and `clone_model` make of it, and of a callback's checkpoints, trains as plain Keras
    does, with an update for every batch it is given, until `accumulate` is called on
    it. What `copy.deepcopy` and pickle make of it goes on accumulating, as a
    `GradientAccumulateModel` does in any case.

    Args:
        model: A Keras 3 model: functional, Sequential or subclassed, compiled or not.
        accum_steps: Positive int. `fit` is given micro-batches, and this many of them
            make an update; an epoch's last update takes the micro-batches that are
            left. Micro-batches may differ in size and shape. `steps_per_epoch` counts
            micro-batches, and batch-level callbacks run once an update. 1 gives plain
            training back.
        microbatch_size: Positive int. `fit` is given batches, and each is cut in
            micro-batches of this many examples; the last one may be smaller. Where a
            batch is distributed over devices, each cuts its share.
        accum_dtype: Name of the float dtype that gradients are summed in (float64
            variables always sum in float64).
        use_agc: Whether to clip the gradient of each update adaptively, before the
            optimizer sees it: see `adaptive_clip_grad`.
        clip_factor: Positive number, of adaptive clipping.
        eps: Positive number, of adaptive clipping.
        agc_exclude: What is not clipped: a layer, a name (of a layer or a variable), a
            function of a variable that returns a bool, or a list of these.
        warn: Whether to warn of what makes updates differ from those on the batch, and
            of accumulating nothing.

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is no Keras 3 model, or an argument of a wrong type.
        ValueError: If a size is not positive, both or none are given, the model has a
            `train_step` of its own or a stateful RNN. In `fit`, if `agc_exclude` names
            what the model does not have.

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
    """Keeps what the constructor of a `GradientAccumulateModel` is given.

    Keras itself keeps the defaults only. A class of its own, for the signature of a
    class is that of its `__new__` before that of its `__init__`.
    """

    def __new__(cls, *args, **kwargs):
        model = super().__new__(cls, *args, **kwargs)
        model.__dict__["_settings"] = _settings(cls, args, kwargs)
        return model


@_register
class GradientAccumulateModel(_WithSettings):
    """A `keras.Model` that trains in micro-batches.

    Made from `inputs` and `outputs` it is a functional model, as `keras.Model` is;
    a subclass with its own `call` gives `super().__init__` the first arguments only.
    How it trains is described at `accumulate`, which does the same to a model that
    exists.

    Exactly one of `accum_steps` and `microbatch_size` decides: with
    `microbatch_size`, leave `accum_steps` at 1.

    Saved, it loads as what it is where this package is imported, and with Keras 3 as a
    plain functional model where it is not.

    Args:
        accum_steps: Positive int, the number of micro-batches in an update, where `fit`
            is given micro-batches. 1 is plain training.
        mixed_precision: No longer needed, and without effect: Keras scales the loss by
            itself under the policy `mixed_float16`.
        use_agc: Whether to clip the gradient of each update adaptively: see
            `adaptive_clip_grad`.
        clip_factor: Positive number, of adaptive clipping.
        eps: Positive number, of adaptive clipping.
        experimental_distributed_support: No longer needed, and without effect.
        microbatch_size: Positive int, the number of examples in a micro-batch, where
            `fit` is given batches.
        accum_dtype: Name of the float dtype that gradients are summed in.
        agc: Another spelling of `use_agc`.
        agc_exclude: What adaptive clipping leaves out: see `accumulate`.
        warn: Whether to warn: see `accumulate`.
        **kwargs: Arguments of `keras.Model`: `inputs`, `outputs`, `name`, `trainable`.

    Raises:
        TypeError, ValueError: As `accumulate`, and for arguments that `keras.Model`
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

    # How it accumulates, None if it is plain.
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
            # Names, for a file holds no function.
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
                "The config is of no functional `GradientAccumulateModel` of this "
                "version; those of version 0.5 do not hold their layers. Received: "
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
        # Not `super()`, whose class would be the one that was asked for.
        return keras.Model.from_config.__func__(kind, config, custom_objects)


# Where a functional model's config holds how it accumulates: in an entry that Keras
# itself does not read, so that plain Keras loads the file.
_ANNOTATION = "gradient_accumulation"


def _has_our_constructor(cls: Any) -> bool:
    return cls.__init__ is GradientAccumulateModel.__init__


def _is_made(cls: Any) -> bool:
    """Whether a class is one that `_functional_class` made for its settings."""
    return "_made_for" in vars(cls)


def _settings(cls: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a constructor that `GradientAccumulateModel` takes."""
    try:
        given = inspect.signature(cls.__init__).bind(None, *args, **kwargs).arguments
    except TypeError:  # the constructor raises it
        return {}
    ours = inspect.signature(GradientAccumulateModel.__init__).parameters.values()
    names = {p.name for p in ours if p.kind is not p.VAR_KEYWORD} - {"self"}
    return {name: v for name, v in {**given, **kwargs}.items() if name in names}


@functools.cache
def _functional_class(cls: Any, accumulation: Accumulation) -> type:
    """The functional variant of a `GradientAccumulateModel` class.

    Keras too makes a functional model of another class than the one it was asked for.
    That the class knows its `accumulation` lets `keras.models.clone_model` keep it.
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
