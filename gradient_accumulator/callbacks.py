"""`FlushGradients`: it applies the micro-batches that wait at the end of an epoch."""

from __future__ import annotations

from typing import Any

from gradient_accumulator.accumulator import Accumulator, accumulating
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras
from gradient_accumulator.received import described
from gradient_accumulator.statistics import update_layers


class FlushGradients(keras.callbacks.Callback):
    """Applies the micro-batches that wait for their update at each epoch's end.

    It flushes `GradientAccumulateOptimizer`s, and ends the updates of the model's
    `AccumBatchNormalization` layers. It does so before the validation at the epoch's
    end, if there is one. Put it before callbacks that save the model.

    Args:
        *optimizers: The optimizers that a `train_step` of the model's own uses, such as
            a GAN's two; they are flushed in this order. If there are none, the
            optimizer that the model is compiled with is flushed.

    Raises:
        TypeError: If one of `optimizers` is no optimizer.
        ValueError: If one of them does not accumulate, and wraps no optimizer that
            does. When training begins, if none are given and the model's optimizer does
            not accumulate.

    Example:

    ```python
    model.compile(GradientAccumulateOptimizer("adam", accum_steps=4), "mse")
    model.fit(x, y, batch_size=8, callbacks=[FlushGradients()])

    gan = GAN(generator, discriminator, g_optimizer, d_optimizer)  # with a `train_step`
    gan.fit(x, batch_size=8, callbacks=[FlushGradients(g_optimizer, d_optimizer)])
    ```
    """

    def __init__(self, *optimizers: Any):
        super().__init__()
        self._given = [_accumulating(optimizer) for optimizer in optimizers]
        self._optimizers: list[Accumulator] = []

    def on_train_begin(self, logs=None):
        self._optimizers = self._given or [self._compiled()]

    def _compiled(self) -> Accumulator:
        """Returns the optimizer in the model's own optimizer that accumulates."""
        optimizer = getattr(self.model, "optimizer", None)
        found = accumulating(optimizer)
        if found is None:
            raise ValueError(
                "`FlushGradients` needs a model that was compiled with a "
                "`GradientAccumulateOptimizer`, or else the optimizers that the model "
                "has: `FlushGradients(g_optimizer, d_optimizer)`. "
                f"Received: optimizer={described(optimizer)}"
            )
        return found

    def on_train_end(self, logs=None):
        self._optimizers = []

    def on_test_begin(self, logs=None):
        self._flush()

    def on_epoch_end(self, epoch, logs=None):
        self._flush()

    def _flush(self):
        if not self._optimizers:  # `evaluate` was called outside of `fit`
            return
        for optimizer in self._optimizers:
            optimizer.flush()
        # `flush` misses the layers of which the optimizer trains no variable.
        for layer in update_layers(self.model):
            layer.finish_update()


def _accumulating(optimizer: Any) -> Accumulator:
    """Returns the optimizer, or the one that it wraps, that accumulates."""
    if not trainer.is_optimizer(optimizer):
        raise TypeError(
            "`FlushGradients` takes optimizers. "
            f"Received: {described(optimizer)} (of type {type(optimizer)})"
        )
    found = accumulating(optimizer)
    if found is None:
        raise ValueError(
            "`FlushGradients` takes optimizers that accumulate: each must be a "
            "`GradientAccumulateOptimizer`, or wrap one. "
            f"Received: optimizer={described(optimizer)}"
        )
    return found
