"""Arrays given to `fit`: micro-batches are drawn from them, and no batch is made.

Keras's adapter of arrays still decides which examples a batch has, and in which
order: they are those of plain training.
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

# Values in a batch, 1 MiB of float32, from which on its micro-batches are drawn. To
# draw a small one at once takes less time, and no memory to speak of.
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
        """The number of examples of each batch, in their order."""
        last = self.adapter.partial_batch_size
        whole = self.adapter.num_batches - bool(last)
        return [self.adapter.batch_size] * whole + ([last] if last else [])

    @property
    def sparse(self) -> bool:
        """Whether some are."""
        return any(
            is_scipy_sparse(array)
            or is_jax_sparse(array)
            or is_tensorflow_sparse(array)
            for array in keras.tree.flatten(self.adapter._inputs)
        )

    def sliceable(self, backend: str) -> Any:
        """The arrays as Keras takes examples out of them for a backend, nested."""
        return convert_to_sliceable(self.adapter._inputs, target_backend=backend)

    def numbers(self) -> ArrayDataAdapter:
        """Keras's adapter over the examples' numbers, in the place of the arrays."""
        adapter = copy.copy(self.adapter)
        adapter._inputs = (np.arange(sum(self.sizes)),)
        return adapter

    def symbolic(self, examples: Any, size: int) -> Any:
        """The shapes and dtypes of the first micro-batch.

        Args:
            examples: Some examples, as the model gets them.
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
    """The arrays that an adapter draws from, if batches of them are large.

    None for any other data.
    """
    if not isinstance(adapter, ArrayDataAdapter):
        return None
    arrays = [
        array for array in keras.tree.flatten(adapter._inputs) if array is not None
    ]
    values = sum(math.prod(array.shape[1:]) for array in arrays)
    return Arrays(adapter) if values * adapter.batch_size >= LARGE else None
