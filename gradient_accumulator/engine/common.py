"""Functions that the backends' files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras


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
