"""Means of numbers that a metric computes of whole micro-batches."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import numpy as np
import tensorflow as tf

from gradient_accumulator.compat.keras2_names import keras
from gradient_accumulator.compat.model_base import numbers_seen

number_weight: ContextVar[Any] = ContextVar("number_weight")
Reduce: Any = keras.metrics.Mean.__mro__[1]
Wrapper: Any = keras.metrics.MeanMetricWrapper


def weight_of(values: Any, sample_weight: Any) -> Any:
    """Returns the weight of a mean's values: `number_weight` for one number."""
    if sample_weight is not None or len(np.shape(values)):
        return sample_weight
    seen = numbers_seen.get()
    if seen is not None:
        seen.append(values)
    return tf.cast(number_weight.get(), keras.backend.floatx())


class _AveragesNumbers(Reduce):
    """A mean in which one number for a micro-batch has the weight `number_weight`."""

    def update_state(self, values, sample_weight=None):
        return super().update_state(values, weight_of(values, sample_weight))


@functools.cache
def averaging(cls: Any) -> Any:
    """Returns a subclass of a metric's class, with ours before the base of `Mean`."""
    return type(cls.__name__, (cls, _AveragesNumbers), {"__module__": cls.__module__})


def weighing_number(update_state):
    def update(values, sample_weight=None):
        return update_state(values, weight_of(values, sample_weight))

    return update
