"""Functions that the backends' files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gradient_accumulator.backend import trainer
from gradient_accumulator.backend.api import keras


def new_accumulator(optimizer: Any, variable: keras.Variable, dtype: str):
    """An optimizer's variable that sums the gradients of one variable."""
    name = trainer.path(variable).replace("/", "_").replace(":", "_")
    return trainer.add_variable(
        optimizer,
        tuple(variable.shape),
        dtype,
        f"{name}_gradient_accumulator",
        like=variable,
    )


@contextmanager
def added(add: Callable, pairs: list, factor: Any, take_back: bool) -> Iterator[None]:
    """Add a micro-batch, and subtract it again if the update in the context fails.

    Args:
        add: Adds gradients, times `factor`, to accumulators.
        pairs: Accumulators and gradients.
        factor: The number that gradients are multiplied by.
        take_back: Whether to subtract the micro-batch if the update fails.
    """
    add(pairs, factor)
    try:
        yield
    except BaseException:
        if take_back:
            add(pairs, -factor)
        raise


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
