"""Keras 2 by Keras 3's names, as far as this package uses them.

`keras` is the module with further names of Keras 3, and `ops` has Keras 3's operations
on TensorFlow's tensors.
"""

from __future__ import annotations

import importlib
import types
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

_keras = tf.keras
if ".engine." not in _keras.Model.__module__:
    raise ImportError(
        "TF_USE_LEGACY_KERAS selects Keras 2, and `tf.keras` is Keras 3 already: set "
        "it before TensorFlow is imported, and install tf_keras. "
        f"Received: tf.keras.Model from {_keras.Model.__module__}"
    )
_ROOT = _keras.Model.__module__.partition(".engine.")[0]


class _Extended(types.ModuleType):
    """A module with further names."""

    def __init__(self, module: types.ModuleType, **names: Any):
        super().__init__(module.__name__, module.__doc__)
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _variable(
    initializer: str, shape: tuple, dtype: str, trainable: bool, autocast: bool, name
) -> tf.Variable:
    """Stands in for `keras.Variable`. Each replica has its own value."""
    return tf.Variable(
        lambda: _keras.initializers.get(initializer)(shape, dtype),
        trainable=trainable,
        name=name,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


@contextmanager
def _stateless_scope(**_: Any):
    """Stands in for `keras.StatelessScope`.

    It does nothing: functions are traced and never run, which has no side effects.
    """
    yield


def _result_type(*dtypes: Any) -> str:
    """Returns the widest of some float dtypes."""
    names = [tf.as_dtype(dtype).name for dtype in dtypes]
    return max(names, key=lambda name: tf.as_dtype(name).size)


def _register(package: str = "Custom", name: str | None = None):
    """Stands in for `register_keras_serializable`, and replaces a registered class."""

    def decorator(cls):
        objects, full_name = _keras.utils.get_custom_objects(), f"{package}>{name}"
        if name and _keras.utils.get_registered_name(cls) == full_name:
            objects[full_name] = cls
            return cls
        objects.pop(full_name, None)
        return _keras.utils.register_keras_serializable(package, name)(cls)

    return decorator


_serialization = importlib.import_module(f"{_ROOT}.saving.serialization_lib")


keras: Any = _Extended(
    _keras,
    __version__=importlib.import_module(_ROOT.partition(".")[0]).__version__,
    KerasTensor=tf.TensorSpec,
    Variable=_variable,
    StatelessScope=_stateless_scope,
    backend=_Extended(
        _keras.backend,
        backend=lambda: "tensorflow",
        standardize_dtype=lambda dtype: tf.as_dtype(dtype).name,
        result_type=_result_type,
    ),
    config=types.SimpleNamespace(floatx=_keras.backend.floatx),
    name_scope=tf.name_scope,
    saving=types.SimpleNamespace(
        deserialize_keras_object=_serialization.deserialize_keras_object,
        get_registered_name=_keras.utils.get_registered_name,
        register_keras_serializable=_register,
        serialize_keras_object=_serialization.serialize_keras_object,
    ),
    tree=types.SimpleNamespace(
        map_structure=tf.nest.map_structure,
        flatten=tf.nest.flatten,
        pack_sequence_as=tf.nest.pack_sequence_as,
    ),
    optimizers=_Extended(
        _keras.optimizers,
        LossScaleOptimizer=_keras.mixed_precision.LossScaleOptimizer,
    ),
    utils=_Extended(_keras.utils, PyDataset=_keras.utils.Sequence),
)


def _tensor(x: Any, dtype: Any = None) -> tf.Tensor:
    tensor = tf.convert_to_tensor(x)
    return tensor if dtype is None else tf.cast(tensor, dtype)


def _copy(x: Any) -> tf.Tensor:
    return tf.identity(x)


def _divide_no_nan(x: Any, y: Any) -> tf.Tensor:
    y = _tensor(y)
    return tf.math.divide_no_nan(tf.cast(x, y.dtype), y)


def _moments(x: Any, axes: Any) -> tuple:
    return tf.nn.moments(x, axes)


def _batch_normalization(x, mean, variance, axis, offset, scale, epsilon):
    shape = [1] * len(x.shape)
    shape[axis] = mean.shape[0]

    def broadcast(values):
        return None if values is None else tf.reshape(values, shape)

    return tf.nn.batch_normalization(
        x, *map(broadcast, (mean, variance, offset, scale)), epsilon
    )


def _shape(x: Any) -> tuple:
    dynamic = tf.shape(x)
    return tuple(dynamic[i] if n is None else n for i, n in enumerate(x.shape))


def _broadcast_to(x: Any, shape: Any) -> tf.Tensor:
    return tf.broadcast_to(x, tf.stack([tf.cast(n, "int32") for n in shape]))


def _where(condition: Any, x: Any, y: Any) -> tf.Tensor:
    tensor = x if isinstance(x, (tf.Tensor, tf.Variable)) else _tensor(y)
    return tf.where(condition, tf.cast(x, tensor.dtype), tf.cast(y, tensor.dtype))


ops: Any = types.SimpleNamespace(
    abs=tf.abs,
    batch_normalization=_batch_normalization,
    broadcast_to=_broadcast_to,
    cast=tf.cast,
    clip=tf.clip_by_value,
    convert_to_numpy=lambda x: _tensor(x).numpy(),
    convert_to_tensor=_tensor,
    copy=_copy,
    divide_no_nan=_divide_no_nan,
    equal=tf.equal,
    expand_dims=tf.expand_dims,
    greater=tf.greater,
    greater_equal=tf.greater_equal,
    isfinite=tf.math.is_finite,
    logical_and=tf.logical_and,
    logical_not=tf.logical_not,
    maximum=tf.maximum,
    mean=tf.reduce_mean,
    moments=_moments,
    ones=tf.ones,
    ones_like=tf.ones_like,
    repeat=tf.repeat,
    reshape=tf.reshape,
    shape=_shape,
    sqrt=tf.sqrt,
    square=tf.square,
    squeeze=tf.squeeze,
    stack=tf.stack,
    stop_gradient=tf.stop_gradient,
    sum=tf.reduce_sum,
    where=_where,
    zeros=tf.zeros,
    zeros_like=tf.zeros_like,
)
