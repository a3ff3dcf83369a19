"""Functions for variables, layers and classes of models of Keras 3."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src import backend
from keras.src.models.functional import Functional as Functional
from keras.src.utils.io_utils import print_msg
from keras.src.utils.python_utils import default as default

from gradient_accumulator.compat.api import is_keras_own as is_keras_own
from gradient_accumulator.compat.keras3_arrays import large_arrays as large_arrays
from gradient_accumulator.compat.keras3_data import BuiltByFit as BuiltByFit
from gradient_accumulator.compat.keras3_data import FitData as FitData

A_MODEL = "a Keras 3 model, a `keras.Model`"

# The class name of a functional model that accumulates. Keras saves a class by its
# module and its name. With those of Keras's own class, the file loads without this
# package.
FUNCTIONAL_NAME = Functional.__name__

StatelessScope: Any = backend.StatelessScope
in_stateless_scope = backend.in_stateless_scope
get_stateless_scope: Any = backend.get_stateless_scope
compute_output_spec: Any = backend.compute_output_spec
get_mask = backend.get_keras_mask
set_mask = backend.set_keras_mask
print_message: Callable[[str], None] = print_msg  # prints where Keras shows progress


def rename(layer: Any, name: str) -> None:
    """Give a layer another name."""
    layer.name = name


def constructor(finish: Callable) -> Callable:
    """Returns a constructor of a functional model that calls `finish` with the model.

    Keras clones and saves a model by its graph if its constructor has the signature of
    Keras's own.
    """

    def __init__(self, inputs, outputs, name=None, **kwargs):
        Functional.__init__(self, inputs, outputs, name=name, **kwargs)
        finish(self)

    # In some versions Keras's own constructor is decorated.
    return (
        _wrapped(__init__) if hasattr(Functional.__init__, "__wrapped__") else __init__
    )


def register(cls: type) -> None:
    """Register a class by its name alone. On Keras 3 no file format needs that."""


def _wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def copy_adapted(original: Any, layer: Any) -> None:
    """Give a preprocessing layer the adapted state of another, such as a vocabulary."""
    if not hasattr(layer, "finalize_state"):
        return
    stored: dict[str, Any] = {}
    original.save_own_variables(stored)
    values = {
        key: np.array(keras.ops.convert_to_numpy(value))
        for key, value in stored.items()
    }
    layer.load_own_variables(values)
    if hasattr(layer, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            original.save_assets(folder)
            layer.load_assets(folder)


def copied_inputs(model: keras.Model, made: dict[int, Any]) -> Any:
    """Returns inputs for a copy of a functional model, with the names of its inputs.

    Args:
        model: The functional model.
        made: Input layers of copies by the `id` of their originals; new ones are added.
    """

    def copied(tensor):
        layer = tensor._keras_history.operation
        if id(layer) not in made:
            new = keras.Input(
                batch_shape=tensor.shape, dtype=tensor.dtype, name=layer.name
            )
            made[id(layer)] = new._keras_history.operation
        return made[id(layer)].output

    return keras.tree.map_structure(copied, model.input)


def is_variable(thing: Any) -> bool:
    return isinstance(thing, keras.Variable)


def value(variable: keras.Variable) -> Any:
    return variable.value


def native(variable: keras.Variable) -> Any:
    """Returns the backend's own variable."""
    return variable.value


def update_variables(layer: Any) -> list:
    """Returns the variables that a layer moves in training, whatever the data is.

    See `statistics.py`.
    """
    if isinstance(layer, keras.layers.SpectralNormalization):
        return [layer.vector_u, layer.kernel]
    return list(getattr(layer, "update_variables", ()))


# Whether denominators are measured in passes in training, whose masks are those of the
# update. Here such a pass can have the same seeds, and has no side effects.
MEASURES_IN_TRAINING = True


def path(variable: Any) -> str:
    """Returns a variable's name, after its layer's; an empty string for a tensor."""
    named = is_variable(variable) or hasattr(variable, "handle")
    return (getattr(variable, "path", None) or variable.name) if named else ""


def is_optimizer(identifier: Any) -> bool:
    return isinstance(identifier, keras.optimizers.Optimizer)


def is_seed(variable: keras.Variable) -> bool:
    """Whether a variable is the state of a random seed."""
    return variable.name == "seed_generator_state"


def overwrites(variable: keras.Variable) -> bool:
    """Whether the optimizer assigns a variable its gradient (float8 scales do)."""
    return getattr(variable, "overwrite_with_gradient", False)


def public_module(cls: type) -> str:
    """Returns the module from which users import a class, if the class is Keras's."""
    public = getattr(keras, cls.__name__, None)
    return "keras" if public is cls else cls.__module__


Normalization = keras.layers.BatchNormalization  # the base of `AccumBatchNormalization`
State = object  # the base of a class that holds its variables


def feature_axis(layer: Any) -> int:
    """Returns the axis of features of a batch normalization layer."""
    return layer.axis


def forget(layer: Any) -> None:
    """Delete attributes that Keras's layer does not have. On Keras 3 there are none."""


def variance_to_move_by(layer: Any, variance: Any, count: Any) -> Any:
    """Returns the variance by which the moving variance moves.

    Args:
        layer: The batch normalization layer.
        variance: The variance of the layer's inputs.
        count: The number of values that it is the variance of.
    """
    return variance


def accumulator_dtype(variable: keras.Variable, accum_dtype: str) -> str:
    """Returns the dtype in which a variable's gradients are summed."""
    return "float64" if variable.dtype == "float64" else accum_dtype
