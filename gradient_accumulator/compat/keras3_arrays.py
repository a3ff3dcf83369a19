"""Arrays that `fit` draws micro-batches from, without making the batches.

Keras's adapter of arrays still decides which examples a batch has, and in which order,
as in plain training.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import keras
import numpy as np
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.array_slicing import convert_to_sliceable
from keras.src.trainers.data_adapters.data_adapter import DataAdapter
from keras.src.trainers.data_adapters.data_adapter_utils import (
    is_jax_sparse,
    is_scipy_sparse,
    is_tensorflow_sparse,
)

# The number of values from which on a batch is large: 1 MiB of float32. A smaller batch
# is drawn as a whole, which takes less time, and little memory.
LARGE = 2**18


class Arrays:
    """Arrays that Keras draws batches from.

    Args:
        adapter: Keras's adapter over the arrays.
    """

    def __init__(self, adapter: ArrayDataAdapter):
        self.adapter = adapter

    @property
    def sizes(self) -> list[int]:
        """The number of examples of each batch, in the order of the batches."""
        last = self.adapter.partial_batch_size
        whole = self.adapter.num_batches - bool(last)
        return [self.adapter.batch_size] * whole + ([last] if last else [])

    @property
    def sparse(self) -> bool:
        """Whether one of the arrays is sparse."""
        return any(
            is_scipy_sparse(array)
            or is_jax_sparse(array)
            or is_tensorflow_sparse(array)
            for array in keras.tree.flatten(self.adapter._inputs)
        )

    def sliceable(self, backend: str) -> Any:
        """Returns the nested arrays as Keras slices them for a backend."""
        return convert_to_sliceable(self.adapter._inputs, target_backend=backend)

    def numbers(self) -> ArrayDataAdapter:
        """Returns Keras's adapter with the examples' numbers in place of the arrays."""
        adapter = copy.copy(self.adapter)
        adapter._inputs = (np.arange(sum(self.sizes)),)
        return adapter

    def symbolic(self, examples: Any, size: int) -> Any:
        """Returns the shapes and dtypes of the first micro-batch.

        Args:
            examples: Examples in the form in which the model gets them.
            size: The number of examples in a micro-batch.
        """

        def of_microbatch(array):
            if array is None:
                return None
            dtype = keras.backend.standardize_dtype(array.dtype)
            shape = (min(size, self.sizes[0]), *array.shape[1:])
            return keras.KerasTensor(shape, dtype)

        return keras.tree.map_structure(of_microbatch, examples)


def large_arrays(adapter: DataAdapter) -> Arrays | None:
    """Returns the arrays that an adapter draws from, if their batches are large.

    For any other data it returns None.
    """
    if not isinstance(adapter, ArrayDataAdapter):
        return None
    arrays = [
        array for array in keras.tree.flatten(adapter._inputs) if array is not None
    ]
    values = sum(math.prod(array.shape[1:]) for array in arrays)
    return Arrays(adapter) if values * adapter.batch_size >= LARGE else None
