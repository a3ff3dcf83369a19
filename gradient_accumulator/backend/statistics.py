"""The moving statistics of a model's normalization layers, once an update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import keras
from keras import ops

from gradient_accumulator.backend import trainer
from gradient_accumulator.layers import (
    AccumBatchNormalization,
    synchronized_moments,
)


def normalizations(model: keras.Model) -> list:
    """The batch normalization layers of a model, at any depth."""
    return [
        layer
        for layer in trainer.layers_of(model)
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def pooling_layers(model: keras.Model) -> list:
    """Those of them that pool the statistics of an update's pieces."""
    layers = normalizations(model)
    return [x for x in layers if isinstance(x, AccumBatchNormalization)]


def synchronizes(model: keras.Model) -> bool:
    """Whether a forward pass waits for those of other replicas."""
    return any(layer.synchronized for layer in normalizations(model))


@contextmanager
def apart(model: keras.Model) -> Iterator[None]:
    """Around forward passes of which only shapes are wanted: nobody waits."""
    with ExitStack() as stack:
        for layer in normalizations(model):
            alone = trainer.with_attribute(layer, "synchronized", False)
            stack.enter_context(alone)
        yield


@contextmanager
def together(model: keras.Model) -> Iterator[None]:
    """Around forward passes of devices that normalize by the examples of all."""
    with ExitStack() as stack:
        for layer in normalizations(model):
            synchronized = trainer.with_attribute(layer, "synchronized", True)
            if not isinstance(layer, AccumBatchNormalization):
                # Keras's does not know of devices that each have their part.
                moments = partial(synchronized_moments, layer)
                synchronized = trainer.with_attribute(layer, "_moments", moments)
            stack.enter_context(synchronized)
        yield


class Statistics:
    """What a train step does about a model's batch normalization.

    Args:
        model: A compiled model that is built.
    """

    def __init__(self, model: keras.Model):
        self.scale: Any = _dynamic_scale(model.optimizer)
        self.pools = pooling_layers(model)
        # What no pool of an update's pieces moves, but every piece.
        self.moving = [
            variable
            for layer in normalizations(model)
            if layer not in self.pools
            for variable in (layer.moving_mean, layer.moving_variance)
        ]
        # What an update that is skipped must leave as it was. Without a scale none is.
        self.variables = [
            variable
            for layer in (self.pools if self.scale is None else normalizations(model))
            for variable in layer.variables
            if not variable.trainable
        ]

    @contextmanager
    def pooling(self) -> Iterator[None]:
        """Around the forward passes of an update."""
        with ExitStack() as stack:
            for layer in self.pools:
                stack.enter_context(layer.told())
            yield

    def before(self) -> Any:
        """What `finish` needs from before the update's first piece."""
        if self.scale is None or not self.variables:
            return None
        return ops.copy(self.scale.value), [ops.copy(v.value) for v in self.variables]

    def finish(self, before: Any) -> None:
        """Move the statistics, after the optimizer had the finished gradient."""
        for layer in self.pools:
            layer.finish_update()
        if before is None:
            return
        scale, values = before
        skipped = self.scale.value < scale
        for variable, value in zip(self.variables, values):
            variable.assign(ops.where(skipped, value, variable.value))


def _dynamic_scale(optimizer: Any) -> keras.Variable | None:
    """The scale that an optimizer lowers where it skips an update."""
    while optimizer is not None:
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return optimizer.dynamic_scale
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return None
