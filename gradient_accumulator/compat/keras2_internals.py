"""Functions for variables, layers and classes of models of Keras 2.

They are the functions of `keras3_internals.py`, which describes their arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from gradient_accumulator.compat import keras2_normalization as normalization
from gradient_accumulator.compat.api import is_keras_own as is_keras_own
from gradient_accumulator.compat.keras2_data import BuiltByFit as BuiltByFit
from gradient_accumulator.compat.keras2_data import FitData as FitData
from gradient_accumulator.compat.keras2_names import keras

_ENGINE = keras.Model.__module__.rpartition(".")[0]
_ROOT = _ENGINE.rpartition(".")[0]

A_MODEL = "a Keras 2 model, a `tf.keras.Model`"

# The class name of a functional model that accumulates. HDF5 files hold only the name
# of a class. A model that loaded as a plain one would train on micro-batches as if they
# were batches.
FUNCTIONAL_NAME = "GradientAccumulateModel"

# A decorator of methods that makes Keras take them for its own.
default: Any = importlib.import_module(f"{_ROOT}.utils.generic_utils").default
Functional: Any = importlib.import_module(f"{_ENGINE}.functional").Functional
StatelessScope = keras.StatelessScope
# Prints where Keras shows its progress.
print_message: Any = importlib.import_module(f"{_ROOT}.utils.io_utils").print_msg

Normalization: Any = normalization.Normalization
State = normalization.State
feature_axis = normalization.feature_axis
forget = normalization.forget


def in_stateless_scope() -> bool:
    return False


def rename(layer: Any, name: str) -> None:
    """Give a layer another name."""
    layer._name = name


def constructor(finish: Callable) -> Callable:
    """Returns a constructor of a functional model that calls `finish` with the model.

    Keras clones and saves a model by its graph if its constructor has the signature of
    Keras's own.
    """

    def __init__(self, inputs, outputs, name=None, trainable=True, **kwargs):
        Functional.__init__(self, inputs, outputs, name, trainable, **kwargs)
        finish(self)

    return __init__


def register(cls: type) -> None:
    """Register a class by its name alone, which is all that older file formats hold."""
    keras.utils.get_custom_objects()[cls.__name__] = cls


def copy_adapted(original: Any, layer: Any) -> None:
    """Give a preprocessing layer the adapted state of another.

    On Keras 2 the config of the layer has its vocabulary.
    """
    if isinstance(layer, keras.layers.experimental.preprocessing.PreprocessingLayer):
        layer.finalize_state()


def copied_inputs(model: Any, made: dict[int, Any]) -> Any:
    """Returns inputs for a copy of a functional model, with the names of its inputs.

    Args:
        model: The functional model.
        made: Input layers of copies by the `id` of their originals; new ones are added.
    """

    def copied(tensor):
        layer = tensor._keras_history.layer
        if id(layer) not in made:
            new = keras.Input(
                batch_shape=tensor.shape, dtype=tensor.dtype, name=layer.name
            )
            made[id(layer)] = new._keras_history.layer
        return made[id(layer)].output

    return tf.nest.map_structure(copied, model.input)


def is_variable(thing: Any) -> bool:
    return isinstance(thing, tf.Variable)


def value(variable: tf.Variable) -> tf.Tensor:
    return tf.convert_to_tensor(variable)


def native(variable: tf.Variable) -> tf.Variable:
    """Returns TensorFlow's own variable."""
    return variable


def update_variables(layer: Any) -> list:
    """Returns the variables that a layer moves in training, whatever the data is.

    See `statistics.py`.
    """
    spectral = getattr(keras.layers, "SpectralNormalization", ())  # since 2.13
    if isinstance(layer, spectral):
        return [layer.vector_u, layer.kernel]
    return list(getattr(layer, "update_variables", ()))


# Whether denominators are measured in passes in training, whose masks are those of the
# update. On Keras 2 two passes cannot have the same seeds.
MEASURES_IN_TRAINING = False


def path(variable: Any) -> str:
    """Returns a variable's name, after its layer's; an empty string for a tensor."""
    return variable.name.partition(":")[0] if is_variable(variable) else ""


def overwrites(variable: Any) -> bool:
    """Whether the optimizer assigns a variable its gradient. On Keras 2 none does."""
    return False


def accumulator_dtype(variable: tf.Variable, accum_dtype: str) -> str:
    """Returns the dtype in which a variable's gradients are summed."""
    return "float64" if variable.dtype.base_dtype == tf.float64 else accum_dtype


def is_optimizer(identifier: Any) -> bool:
    """Whether an object is a new optimizer or a legacy one."""
    kinds = keras.optimizers.Optimizer, keras.optimizers.legacy.Optimizer
    return isinstance(identifier, (*kinds, keras.optimizers.LossScaleOptimizer))


def public_module(cls: type) -> str:
    """Returns the module of a class. Files of Keras 2 do not hold it."""
    return cls.__module__


def compute_output_spec(function: Callable, data: Any) -> Any:
    """Returns the `tf.TensorSpec`s of a function's outputs.

    The function is traced in a graph that never runs.

    Args:
        function: Function of the data.
        data: Nested specs of the data.
    """

    def placeholder(spec):
        if spec is None:
            return None
        return tf.compat.v1.placeholder(spec.dtype, spec.shape)

    with tf.__internal__.FuncGraph("output_spec").as_default():
        outputs = function(tf.nest.map_structure(placeholder, data))
    return tf.nest.map_structure(tf.TensorSpec.from_tensor, outputs)


def variance_to_move_by(layer: Any, variance: Any, count: Any) -> Any:
    """Returns the variance by which the moving variance moves.

    If Keras 2 normalizes images by TensorFlow's fused operation, it is the unbiased
    estimate of the variance.
    """
    if not layer.fused:
        return variance
    return variance * count / tf.maximum(count - 1, 1)


def get_mask(tensor: Any) -> Any:
    return getattr(tensor, "_keras_mask", None)
