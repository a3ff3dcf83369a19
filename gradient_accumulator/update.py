"""One update: a step of the optimizer, computed from several micro-batches.

    weigh the micro-batches -> add each one's gradient -> correct -> sum over devices
    -> clip -> the optimizer, once -> statistics of layers -> logs

All backends share this code. The operations that a backend does in its own way are
methods of its engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from gradient_accumulator import losses
from gradient_accumulator.compat import CompiledModel, OptimizerStep, internals
from gradient_accumulator.compat.api import keras, ops
from gradient_accumulator.engine.engine_base import Carry, Engine, Steps, Sums, times
from gradient_accumulator.microbatches import first_input
from gradient_accumulator.settings import Accumulation
from gradient_accumulator.statistics import Statistics


class Update:
    """A function that makes one update of a model.

    Args:
        model: A compiled and built model.
        accumulation: How it accumulates.
        engine: The model's engine.
        notices: The model's `Notices`.
    """

    sums: Sums
    steps: Steps

    def __init__(
        self,
        model: keras.Model,
        accumulation: Accumulation,
        engine: Engine,
        notices: Any = None,
    ):
        if accumulation.clipping is not None:
            accumulation.clipping.check_excluded(model.weights)
        self.model = model
        self.compiled = CompiledModel(model)
        self.clipping = accumulation.clipping
        self.engine = engine
        self.notices = notices
        self.statistics = Statistics(model)
        self.variables = model.trainable_variables
        self.dtypes = [
            internals.accumulator_dtype(v, accumulation.accum_dtype)
            for v in self.variables
        ]
        engine.prepare(self)

    def __call__(self, microbatches: Any) -> dict:
        """Make an update from the engine's micro-batches; returns the logs."""
        engine, statistics = self.engine, self.statistics
        weighed = engine.weigh(self, microbatches)
        if not hasattr(self, "steps"):
            self.sums = engine.sums(self, weighed)
            self.steps = engine.steps(self)
        steps = self.steps
        # If the optimizer skips the update, these are restored.
        kept = engine.values(statistics.variables) if statistics.may_skip else []
        rewound = engine.values(statistics.rewound)

        def rewinding(carry, *microbatch):
            engine.assign(statistics.rewound, rewound)
            return steps.add(carry, *microbatch)

        step = rewinding if rewound else steps.add
        carry = engine.fold(step, steps.zeros(), weighed)
        carry, scale, divided_last = engine.total(self, carry, weighed)
        with engine.finishing(weighed, carry):
            return steps.finish(divided_last, carry, scale, weighed.examples, kept)

    def clear(self) -> None:
        """Let go of the sums, also after an update that failed."""
        if hasattr(self, "sums"):
            self.sums.clear()

    def zeros(self) -> Carry:
        """The carry for the first micro-batch."""
        loss, denominator = (ops.zeros((), losses.dtype()) for _ in range(2))
        return Carry(self.sums.zeros(), loss, denominator, {})

    def add(
        self,
        carry: Carry,
        kinds: Sequence[str],
        data: Any,
        share: Any,
        factors: Any,
    ) -> Carry:
        """Add a micro-batch's part of the batch's gradient, its loss and its metrics.

        Args:
            carry: The carry that the previous micro-batch returned.
            kinds: The kinds of the compiled losses.
            data: The micro-batch, as nested arrays.
            share: The micro-batch's number of examples over the batch's.
            factors: The factors of the compiled losses; None if all are 1.
        """
        x, y, sample_weight = self.compiled.unpack(data)
        gradients, (loss, denominator, y_pred) = self.gradients(
            data, share, kinds, factors
        )
        sums = self.sums.add(carry.sums, gradients)
        logs = self.compiled.update_metrics(
            (x, y, y_pred, sample_weight),
            loss,
            ops.shape(first_input(data))[0],
            share,
        )
        part = ops.cast(ops.stop_gradient(loss), carry.loss.dtype)
        part = (ops.mean(part) if len(part.shape) else part) * share
        denominator = carry.denominator + denominator
        return Carry(sums, carry.loss + part, denominator, logs)

    def gradients(
        self, data: Any, share: Any, kinds: Sequence[str] = (), factors: Any = None
    ) -> tuple:
        """A micro-batch's part of the batch's gradients, for the arguments of `add`.

        Returns:
            The gradients, and a tuple: the micro-batch's loss, the denominator of a
            `DIVIDED_LAST` loss (else 0), and the predictions.
        """
        model, engine = self.model, self.engine
        x, y, sample_weight = self.compiled.unpack(data)
        weighing = None
        if factors is not None:
            weighing = losses.Weighing(kinds, [factors[j] for j in range(len(kinds))])

        def scaled_loss(_):
            y_pred, additional = engine.forward(model, x)
            microbatch = (x, y, y_pred, sample_weight)
            loss = self.compiled.compute_loss(microbatch, additional, share, weighing)
            # A loss without reduction needs no share: the optimizer gets the sum of its
            # values, and sums of micro-batches add up.
            part = loss if len(loss.shape) else times(loss, share)
            denominator = 0.0 if weighing is None else weighing.denominator
            scaled = OptimizerStep(model.optimizer).scaled(part)
            return scaled, (loss, denominator, y_pred)

        with self.statistics.pooling():
            return engine.value_and_grad(scaled_loss, self.variables)

    def denominators(self, data: Any, y_pred: Any = None) -> Any:
        """The denominators of a micro-batch's compiled losses, of shape `(losses,)`.

        A compiler keeps only the part of the forward pass that masks need.

        Args:
            data: The micro-batch, as nested arrays.
            y_pred: Predictions, to be given if only their shapes matter.
        """
        x, _, _ = self.compiled.unpack(data)
        if y_pred is None:
            with self.statistics.pooling():
                y_pred = self.compiled.forward(x, internals.MEASURES_IN_TRAINING)
        return losses.values(losses.measure(self.model, data, y_pred))

    def finish(
        self, divided_last: bool, carry: Carry, scale: Any, examples: Any, kept: Any
    ) -> dict:
        """Give the finished gradient to the optimizer; returns the logs.

        Args:
            divided_last: Whether `scale` must still be divided by the denominator.
            carry: The carry that the last micro-batch returned.
            scale: The factor for the sums; None for 1.
            examples: The batch's number of examples.
            kept: The values of the statistics before the update, which are restored if
                the optimizer skips it.
        """
        if divided_last:
            scale = losses.correction(scale, carry.denominator)
        loss = carry.loss if scale is None else carry.loss * scale
        gradients = self.sums.finish(carry.sums, scale)
        position = OptimizerStep(self.model.optimizer).position() if kept else None
        self.steps.apply(gradients)
        self.statistics.finish(position, kept)
        return self.compiled.logs(carry.logs, loss, examples)

    def apply(self, gradients: list) -> None:
        """Clip the finished gradients, and give them to the optimizer."""
        if not self.variables:
            warnings.warn(
                "The model does not have any trainable weights.", stacklevel=2
            )
            return
        engine, optimizer = self.engine, self.model.optimizer
        if self.clipping is not None:
            gradients = engine.clip(self.clipping, optimizer, self.variables, gradients)
        engine.step(optimizer, gradients, self.variables)
