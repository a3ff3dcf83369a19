"""Means of numbers that a metric computes of whole micro-batches."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np

from gradient_accumulator.compat.keras3_internals import (
    get_mask,
)
from gradient_accumulator.compat.model_base import numbers_seen

number_weight: ContextVar[Any] = ContextVar("number_weight")
# The micro-batch's sample weights that are one number, the weight of each example.
weights_of_each: ContextVar[list] = ContextVar("weights_of_each")


def is_number(tensor: Any) -> bool:
    return tensor is not None and len(np.shape(tensor)) == 0


class _AveragesNumbers(keras.metrics.Mean):
    """A mean in which one number for a micro-batch has the weight `number_weight`.

    In Keras's `Mean` a number has the weight 1: those of the micro-batches of an update
    would weigh more than the one number of the batch.
    """

    def update_state(self, values, sample_weight=None):
        of_each = any(sample_weight is weight for weight in weights_of_each.get())
        if is_number(values) and (sample_weight is None or of_each):
            share = number_weight.get()
            sample_weight = share * sample_weight if of_each else share
            seen = numbers_seen.get()
            if seen is not None:
                seen.append(self)
        elif of_each and get_mask(values) is None:
            examples = keras.ops.shape(values)[:1]
            sample_weight = keras.ops.broadcast_to(sample_weight, examples)
        return super().update_state(values, sample_weight)


@functools.cache
def averaging(cls: Any) -> Any:
    """Returns a subclass of a metric's class, with ours before Keras's `Mean`."""
    bases = (
        (_AveragesNumbers,) if cls is keras.metrics.Mean else (cls, _AveragesNumbers)
    )
    return type(cls.__name__, bases, {"__module__": cls.__module__})
