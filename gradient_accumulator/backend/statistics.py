"""The state of layers that moves once an update: moving statistics, and the like.

A layer tells of such state by what it has; docs/layers.md says it to users:

- `update_variables`, a list of variables that the layer moves in training by itself,
  whatever the data: every micro-batch begins with their values of before the update,
  and what the last one leaves stays.
- `within_update`, a context manager around the forward passes of an update, in which
  the layer pools what it sees, and `finish_update`, which moves its state by that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from gradient_accumulator.backend import trainer
from gradient_accumulator.backend.api import keras, ops
from gradient_accumulator.backend.attributes import with_attribute
from gradient_accumulator.layers import (
    AccumBatchNormalization,
    owners,
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
    """The batch normalization layers that pool an update's statistics."""
    layers = normalizations(model)
    return [x for x in layers if isinstance(x, AccumBatchNormalization)]


def update_layers(model: keras.Model) -> list:
    """The layers, of anyone's, that pool what an update's micro-batches show them."""
    return [
        layer
        for layer in trainer.layers_of(model)
        if hasattr(layer, "within_update") and hasattr(layer, "finish_update")
    ]


def rewound(model: keras.Model) -> list:
    """The variables that every micro-batch of an update finds as the first one did."""
    layers = trainer.layers_of(model)
    return list(
        {id(v): v for x in layers for v in trainer.update_variables(x)}.values()
    )


def synchronizes(model: keras.Model) -> bool:
    """Whether a forward pass waits for those of other replicas."""
    return any(layer.synchronized for layer in normalizations(model))


@contextmanager
def apart(model: keras.Model) -> Iterator[None]:
    """Around forward passes of which only shapes are wanted: nobody waits."""
    with ExitStack() as stack:
        for layer in normalizations(model):
            alone = with_attribute(layer, "synchronized", False)
            stack.enter_context(alone)
        yield


@contextmanager
def together(model: keras.Model) -> Iterator[None]:
    """Around forward passes of devices that normalize by the examples of all."""
    with ExitStack() as stack:
        for layer in normalizations(model):
            synchronized = with_attribute(layer, "synchronized", True)
            if not isinstance(layer, AccumBatchNormalization):
                # Keras's does not know of devices that each have their part.
                moments = partial(synchronized_moments, layer)
                synchronized = with_attribute(layer, "_moments", moments)
            stack.enter_context(synchronized)
        yield


class Statistics:
    """The state of a model's layers that an update moves, or keeps.

    Args:
        model: A compiled model that is built.
    """

    def __init__(self, model: keras.Model):
        self.optimizer: Any = model.optimizer
        self.pools = update_layers(model)
        # Moving statistics of plain batch normalization: every micro-batch moves them.
        self.moving = [
            variable
            for layer in normalizations(model)
            if layer not in self.pools
            for variable in (layer.moving_mean, layer.moving_variance)
        ]
        # What an update that is skipped must leave as it was. Without a scale none is.
        left = list(self.pools)
        if trainer.may_skip(model.optimizer):
            left += [x for x in normalizations(model) if x not in left]
        self.variables = [v for x in left for v in x.variables if not v.trainable]
        self.rewound = rewound(model)
        # What a micro-batch may find otherwise than the one before: seeds, and what
        # layers of one's own keep. In training no normalization reads its statistics.
        pooled = [v for layer in self.pools for v in layer.variables]
        known = {id(v) for v in (*self.moving, *self.rewound, *pooled)}
        self.carried = [
            v for v in trainer.moved_by_microbatches(model) if id(v) not in known
        ]

    @contextmanager
    def pooling(self) -> Iterator[None]:
        """Around the forward passes of an update."""
        with ExitStack() as stack:
            for layer in self.pools:
                stack.enter_context(layer.within_update())
            yield

    def before(self) -> Any:
        """The values that `finish` needs, from before the first micro-batch."""
        mark = trainer.mark(self.optimizer) if self.variables else None
        if mark is None:
            return None
        return mark, [ops.copy(trainer.value(v)) for v in self.variables]

    def finish(self, before: Any) -> None:
        """Move the statistics, after the optimizer had the finished gradient."""
        for layer in self.pools:
            layer.finish_update()
        if before is None:
            return
        mark, values = before
        skipped = trainer.skipped(self.optimizer, mark)
        for variable, value in zip(self.variables, values):
            variable.assign(ops.where(skipped, value, trainer.value(variable)))


def in_reach(variables: list) -> list[AccumBatchNormalization]:
    """The layers that some of the variables are trained for.

    None in a call without effects, where their own variables are out of reach.
    """
    return [] if trainer.in_stateless_scope() else owners(variables)


@contextmanager
def taken_back(optimizer: Any, variables: list) -> Iterator[None]:
    """Around an optimizer's step: what layers that count moved, if it makes none.

    Args:
        optimizer: The optimizer.
        variables: What it updates, by which the layers are known.
    """
    layers = in_reach(variables)
    mark = trainer.mark(optimizer) if layers else None
    try:
        yield
    except BaseException:
        for layer in layers:
            layer.take_back(True)
        raise
    if mark is not None:
        for layer in layers:
            layer.take_back(trainer.skipped(optimizer, mark))
