"""State of layers that moves once an update, such as moving statistics.

A layer declares such state by these attributes, which docs/layers.md explains:

- `update_variables` lists variables that the layer moves in training, whatever the data
  is. Every micro-batch begins with their values from before the update. Their values
  after the last micro-batch stay.
- `within_update` is a context manager for the forward passes of an update. In it the
  layer pools its data. `finish_update` then moves the layer's state by the pooled data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from gradient_accumulator.compat import CompiledModel, OptimizerStep, internals
from gradient_accumulator.compat.api import keras, ops
from gradient_accumulator.compat.attributes import with_attribute
from gradient_accumulator.layers import (
    AccumBatchNormalization,
    owners,
    synchronized_moments,
)


def normalizations(model: keras.Model) -> list:
    """The batch normalization layers of a model, at any depth."""
    return [
        layer
        for layer in CompiledModel(model).layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def pooling_layers(model: keras.Model) -> list:
    """The batch normalization layers that pool an update's statistics."""
    layers = normalizations(model)
    return [x for x in layers if isinstance(x, AccumBatchNormalization)]


def update_layers(model: keras.Model) -> list:
    """The layers, of any class, that pool the data of an update's micro-batches."""
    return [
        layer
        for layer in CompiledModel(model).layers
        if hasattr(layer, "within_update") and hasattr(layer, "finish_update")
    ]


def rewound(model: keras.Model) -> list:
    """The variables whose values every micro-batch of an update begins with."""
    layers = CompiledModel(model).layers
    return list(
        {id(v): v for x in layers for v in internals.update_variables(x)}.values()
    )


def synchronizes(model: keras.Model) -> bool:
    """Whether a forward pass waits for the forward passes of other replicas."""
    return any(layer.synchronized for layer in normalizations(model))


@contextmanager
def unsynchronized(model: keras.Model) -> Iterator[None]:
    """A context in which batch normalization does not wait for other replicas."""
    with ExitStack() as stack:
        for layer in normalizations(model):
            alone = with_attribute(layer, "synchronized", False)
            stack.enter_context(alone)
        yield


@contextmanager
def over_devices(model: keras.Model) -> Iterator[None]:
    """A context in which devices normalize by the examples of all devices."""
    with ExitStack() as stack:
        for layer in normalizations(model):
            synchronized = with_attribute(layer, "synchronized", True)
            if not isinstance(layer, AccumBatchNormalization):
                # Keras's layer does not know that each device has only its part.
                moments = partial(synchronized_moments, layer)
                synchronized = with_attribute(layer, "_moments", moments)
            stack.enter_context(synchronized)
        yield


class Statistics:
    """The state of a model's layers that an update moves or restores.

    Args:
        model: A compiled and built model.
    """

    def __init__(self, model: keras.Model):
        self.optimizer: Any = model.optimizer
        self.pools = update_layers(model)
        # Moving statistics of plain `BatchNormalization`: every micro-batch moves them.
        self.moving = [
            variable
            for layer in normalizations(model)
            if layer not in self.pools
            for variable in (layer.moving_mean, layer.moving_variance)
        ]
        # If a loss scale skips the update, the state of these layers is restored.
        left = list(self.pools)
        self.may_skip = OptimizerStep(model.optimizer).may_skip
        if self.may_skip:
            left += [x for x in normalizations(model) if x not in left]
        self.variables = [v for x in left for v in x.variables if not v.trainable]
        self.rewound = rewound(model)
        # State that one micro-batch moves and the next one reads: seeds, and the state
        # of users' layers. In training no normalization reads its moving statistics.
        pooled = [v for layer in self.pools for v in layer.variables]
        known = {id(v) for v in (*self.moving, *self.rewound, *pooled)}
        self.carried = [
            v for v in CompiledModel(model).moved_by_microbatches if id(v) not in known
        ]

    @contextmanager
    def pooling(self) -> Iterator[None]:
        """A context of an update's forward passes, in which layers pool their data."""
        with ExitStack() as stack:
            for layer in self.pools:
                stack.enter_context(layer.within_update())
            yield

    def finish(self, position: Any, kept: list) -> None:
        """Move the statistics after the optimizer's step, unless it was skipped.

        Args:
            position: The optimizer's `OptimizerStep.position` before its step, or None.
            kept: The values of `variables` before the first micro-batch, where the
                optimizer may skip its step.
        """
        for layer in self.pools:
            layer.finish_update()
        if position is None:
            return
        skipped = OptimizerStep(self.optimizer).skipped_since(position)
        for variable, value in zip(self.variables, kept):
            variable.assign(ops.where(skipped, value, internals.value(variable)))


def in_reach(variables: list) -> list[AccumBatchNormalization]:
    """The layers that own some of the variables.

    The list is empty in a stateless call, which cannot change the layers' variables.
    """
    return [] if internals.in_stateless_scope() else owners(variables)


@contextmanager
def taken_back(optimizer: Any, variables: list) -> Iterator[None]:
    """A context of an optimizer's step. It restores statistics if no step is made.

    Args:
        optimizer: The optimizer.
        variables: The variables that it updates, whose layers have the statistics.
    """
    layers = in_reach(variables)
    position = OptimizerStep(optimizer).position() if layers else None
    try:
        yield
    except BaseException:
        for layer in layers:
            layer.take_back(True)
        raise
    if position is not None:
        for layer in layers:
            layer.take_back(OptimizerStep(optimizer).skipped_since(position))
