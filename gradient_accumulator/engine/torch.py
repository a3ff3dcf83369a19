"""An update on PyTorch: `backward` on each micro-batch adds to `grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import keras
import torch

from gradient_accumulator.compat import CompiledModel, internals
from gradient_accumulator.devices import torch_devices as processes
from gradient_accumulator.engine.engine_base import Carry, Steps, Sums
from gradient_accumulator.engine.torch_activations import free_activations
from gradient_accumulator.engine.torch_fit import TorchFit
from gradient_accumulator.engine.torch_functional import value_and_grad
from gradient_accumulator.engine.torch_sums import GradSums
from gradient_accumulator.functional import LossFunction
from gradient_accumulator.microbatches import map_leaves
from gradient_accumulator.statistics import synchronizes, unsynchronized
from gradient_accumulator.update import Update
from gradient_accumulator.weights import HostWeights, symbolic


class TorchEngine(TorchFit):
    """An update in eager execution, whose sums are in the parameters' `grad`."""

    def prepare(self, update: Update) -> None:
        model = update.model
        forward: Callable = partial(CompiledModel(model).forward, training=True)
        if model.jit_compile and not model.run_eagerly:
            forward = torch.compile(forward)
        self._forward = forward
        self._waits = synchronizes(model)  # whether processes wait in each micro-batch
        several = processes.count() > 1
        # The model's own metrics compute logs in every micro-batch, and processes may
        # have different numbers of micro-batches.
        self._own_metrics = several and CompiledModel(model).has_own_metrics
        self.weights = HostWeights(
            model,
            partial(_measured, update, self._waits),
            partial(_stateless, model),
            notices=update.notices,
            totals=processes.totals if several else None,
        )

    def weigh(self, update: Update, microbatches: Any) -> Any:
        if self._waits:
            processes.check_microbatches(microbatches.count)
        carried = update.statistics.carried
        state = list(zip(carried, self.values(carried)))
        return self.weights(microbatches, state)

    def steps(self, update: Update) -> Steps:
        def zeros():
            # A number is not on a device, so that reading it waits for none.
            return update.zeros()._replace(denominator=0.0)

        return Steps(zeros, update.add, torch.no_grad()(update.apply), update.finish)

    def sums(self, update: Update, weighed: Any) -> Sums:
        return GradSums(
            [v.value for v in update.variables],
            update.dtypes,
            [internals.overwrites(v) for v in update.variables],
        )

    def fold(self, step: Callable[..., Carry], carry: Carry, weighed: Any) -> Carry:
        drawn = list(weighed) if self._own_metrics else weighed
        for k, (microbatch, share, kinds, factors) in enumerate(drawn, start=1):
            last = self._own_metrics and k == len(drawn)
            with processes.in_step(last):
                carry = step(carry, kinds, microbatch, share, factors)
            free_activations()
        if self._own_metrics and not drawn:
            with processes.in_step():  # the other processes wait for this one
                carry = carry._replace(logs=weighed.model.get_metrics_result())
        return carry

    def forward(self, model: keras.Model, x: Any) -> tuple[Any, list]:
        return self._forward(x), model.losses

    def value_and_grad(
        self, function: Callable[[Any], tuple], variables: list
    ) -> tuple[list, Any]:
        loss, aux = function(variables)
        if variables:
            loss.backward()
        # The gradients are in `grad`.
        return [], aux

    def values(self, variables: list) -> list:
        return [variable.value.detach().clone() for variable in variables]

    @torch.no_grad()
    def assign(self, variables: list, values: list) -> None:
        super().assign(variables, values)

    def total(
        self, update: Update, carry: Carry, weighed: Any
    ) -> tuple[Carry, Any, bool]:
        denominator = carry.denominator if weighed.divided_last else 0.0
        scale = weighed.correction(denominator)
        if processes.count() == 1:
            return carry, scale, False
        # Each process corrects its own sums, because each has its own divisor.
        loss = carry.loss * scale
        assert isinstance(update.sums, GradSums)
        update.sums.reduce(scale, loss, update.statistics.moving)
        return carry._replace(loss=loss), None, False

    @contextmanager
    def finishing(self, weighed, carry) -> Iterator[None]:
        with processes.in_step():
            yield

    def accumulated(self, loss: LossFunction) -> Callable:
        return value_and_grad(self, loss)


ENGINE = TorchEngine


def _measured(update, waits, state, microbatch, losses):
    """The denominators of a micro-batch, and the state for the next micro-batch.

    The forward pass has no other effects: random states stay as they were.
    """
    model = update.model
    (carried,) = state
    with _stateless(model, carried) as scope, torch.no_grad():
        if not losses.by_predictions:
            y_pred = _of_shape(model, microbatch)
            denominators = update.denominators(microbatch, y_pred)
        else:
            # This is a whole forward pass: no compiler drops what is not used.
            with nullcontext() if waits else unsynchronized(model):
                denominators = update.denominators(microbatch)
    free_activations()
    return denominators, ([(v, scope.get_current_value(v)) for v, _ in carried],)


def _of_shape(model, microbatch):
    """Zeros in the shapes of the predictions."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch)
    specs = internals.compute_output_spec(
        partial(CompiledModel(model).forward, training=True),
        map_leaves(symbolic, x),
    )
    return map_leaves(
        # A broadcast number takes no memory, whatever its shape.
        lambda spec: keras.ops.broadcast_to(
            keras.ops.zeros((), spec.dtype), spec.shape
        ),
        specs,
    )


@contextmanager
def _stateless(model: Any, state: list, **settings: Any) -> Iterator[Any]:
    """A stateless scope, which also restores state that Keras does not know.

    Such state is PyTorch's own seeds, and the statistics of its modules.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = range(torch.cuda.device_count())
    try:
        with (
            torch.random.fork_rng(devices),
            internals.StatelessScope(state_mapping=state, **settings) as scope,
        ):
            yield scope
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
