"""The operations on a backend's devices that layers, losses and warnings need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from gradient_accumulator.compat.api import ops


class Devices(ABC):
    """The devices, or processes, that each have a share of the batch.

    The methods of this class are right for one device.
    """

    def total(self, tensor: Any) -> Any:
        """A tensor's sum over the devices.

        Args:
            tensor: A tensor; on TensorFlow, nested tensors too.
        """
        return tensor

    def several(self, model: Any) -> bool:
        """Whether several devices each have a share of the batch."""
        return False

    def is_first(self, model: Any) -> bool:
        """Whether this process is the first of those that train the model."""
        return True

    def several_processes(self, model: Any) -> bool:
        """Whether other processes have some of a model's replicas."""
        return False

    def dense(self, gradient: Any) -> Any:
        """A gradient as a dense tensor. Slices of one row are summed."""
        return ops.convert_to_tensor(gradient)

    @abstractmethod
    def call_once(self, function: Callable, *data: Any) -> list[np.ndarray]:
        """Calls a function without gradients; returns its results as NumPy arrays."""


def lost(who: str, error: BaseException, update: str) -> RuntimeError:
    """The error for a process that does not answer.

    Args:
        who: The kind of process, such as "A worker of the strategy".
        error: The error that this process received.
        update: A sentence about the current update, or an empty string.
    """
    return RuntimeError(
        f"{who} did not answer: it has failed, or was ended, and its own output says "
        f"why. {update}Start all processes again. With the callback `BackupAndRestore` "
        f"they continue from the last backup. Received: {error}"
    )


NOT_APPLIED = "The current update was not applied. "
