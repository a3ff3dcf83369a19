"""`FlushGradients`: an epoch's last pieces, with the optimizer wrapper."""

from __future__ import annotations

from gradient_accumulator.accumulator import Accumulator, accumulating
from gradient_accumulator.backend.api import keras
from gradient_accumulator.backend.statistics import update_layers


class FlushGradients(keras.callbacks.Callback):
    """Applies what a `GradientAccumulateOptimizer` holds at each epoch's end.

    And what the model's `AccumBatchNormalization` layers hold.

    Before the validation at that end, if there is one. Put it before callbacks that
    save the model.

    Raises:
        ValueError: When training begins, if the model's optimizer does not accumulate.

    Example:

    ```python
    model.compile(GradientAccumulateOptimizer("adam", accum_steps=4), "mse")
    model.fit(x, y, batch_size=8, callbacks=[FlushGradients()])
    ```
    """

    def __init__(self):
        super().__init__()
        self._optimizer: Accumulator | None = None

    def on_train_begin(self, logs=None):
        self._optimizer = accumulating(self.model.optimizer)
        if self._optimizer is None:
            raise ValueError(
                "`FlushGradients` needs a model that was compiled with a "
                "`GradientAccumulateOptimizer`. Received: "
                f"optimizer={self.model.optimizer}"
            )

    def on_train_end(self, logs=None):
        self._optimizer = None

    def on_test_begin(self, logs=None):
        self._flush()

    def on_epoch_end(self, epoch, logs=None):
        self._flush()

    def _flush(self):
        if self._optimizer is None:  # outside of `fit` nothing has begun
            return
        self._optimizer.flush()
        # Those that it does not know, for it trains no variable of theirs.
        for layer in update_layers(self.model):
            layer.finish_update()
