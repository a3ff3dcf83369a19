"""What layers, losses and warnings need of a backend's devices."""

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
        """A gradient as a dense tensor, which sums rows that occur several times."""
        return ops.convert_to_tensor(gradient)

    @abstractmethod
    def call_once(self, function: Callable, *data: Any) -> list[np.ndarray]:
        """The list of a function's results, as NumPy arrays, without gradients."""


def lost(who: str, error: BaseException, update: str) -> RuntimeError:
    """The error for processes that do not answer.

    Args:
        who: One of the processes, in words.
        error: The error that this process received.
        update: A sentence about the current update, or an empty string.
    """
    return RuntimeError(
        f"{who} did not answer: it has failed, or was ended, and its own output says "
        f"why. {update}Start all of them again; with the callback `BackupAndRestore` "
        f"they go on from the last backup. Received: {error}"
    )


NOT_APPLIED = "The update at hand was not applied. "
