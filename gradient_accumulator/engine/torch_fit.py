"""The train function on PyTorch, and how it draws its data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import torch

from gradient_accumulator.compat import CompiledModel, internals
from gradient_accumulator.devices import torch_devices as processes
from gradient_accumulator.engine.engine_base import Engine
from gradient_accumulator.microbatches import (
    Epoch,
    Microbatches,
    checked,
    cut,
    microbatches_of,
)
from gradient_accumulator.settings import Accumulation
from gradient_accumulator.update import Update
from gradient_accumulator.weights import HostWeights, examples


class TorchFit(Engine):
    """The operations of `fit`."""

    weights: HostWeights

    def make_train_function(
        self, model: keras.Model, training: Any
    ) -> Callable[[list], dict]:
        accumulation, epoch = training.accumulation, training.epoch
        if model.steps_per_execution > 1:
            raise ValueError(
                "`steps_per_execution` must be 1 with the PyTorch backend. "
                f"Received: steps_per_execution={model.steps_per_execution}"
            )

        def new_update():
            return Update(model, accumulation, self, training.notices)

        update = new_update()
        self.trained = update.variables
        count = processes.count()  # the number of processes that `update` is for
        alike = False  # whether all processes have the weights of the first one

        def train_function(data):
            nonlocal update, count, alike
            if count != processes.count():
                update = new_update()
                count, alike = processes.count(), False
            if not alike or epoch.updates == 1:
                processes.broadcast([*model.weights, *model.optimizer.variables])
                alike = True
            processes.check_in_step(epoch.number, epoch.updates, False)
            (drawn,) = data
            if accumulation.microbatch_size is not None:
                microbatches = _cut(drawn, accumulation.microbatch_size)
                epoch.cut(microbatches.count, microbatches.on_device)
            elif isinstance(drawn, Microbatches):
                microbatches = drawn
            else:  # from `train_on_batch`
                microbatches = Microbatches(iter(data), 1)
            if epoch.fitting and epoch.updates == 1:
                # The loss may differ from that of the last `fit`.
                self.weights.inspected.clear()
            try:
                with self.restored(model), processes.in_step(False):
                    return update(microbatches)
            finally:
                update.clear()

        return train_function

    def after_fit(self, model: keras.Model, epoch: Epoch) -> None:
        processes.check_in_step(epoch.number, epoch.updates, True)

    def metrics_result(
        self, model: keras.Model, epoch: Epoch, own: Callable[[], dict]
    ) -> dict:
        # The logs of `fit` are those of all processes, the logs of `evaluate` are not.
        if processes.count() == 1:
            return own()
        in_step = processes.are_in_step()
        if epoch.evaluating or in_step is False:
            return CompiledModel(model).metrics_result()
        if in_step is None:  # at the end of an epoch
            processes.check_in_step(epoch.number, epoch.updates, True)
        with processes.summed(model.metrics_variables):
            return CompiledModel(model).metrics_result()

    def batches(
        self, model: keras.Model, epoch: Epoch, accumulation: Accumulation, adapter: Any
    ) -> tuple[Callable, Callable]:
        arrays = None
        if accumulation.microbatch_size is not None:
            arrays = internals.large_arrays(adapter)

        def updates():
            if arrays is None:
                loader = adapter.get_torch_dataloader()
            else:
                loader = _in_microbatches(arrays, accumulation.microbatch_size)
            # `iter` is called at once, because it draws from PyTorch's seed.
            return _updates(iter(loader), epoch, accumulation)

        def first():
            if arrays is not None:
                return _in_microbatches(
                    arrays, accumulation.microbatch_size, symbolic=True
                )
            return map(partial(_first_of, accumulation), adapter.get_torch_dataloader())

        return updates, first


def _cut(batch, microbatch_size):
    if isinstance(batch, Microbatches):  # already cut, from arrays
        return batch
    if processes.count() > 1 and examples(batch) == 0:
        # Other processes have the last batch's examples.
        return Microbatches(iter([batch]), 1, examples=0)
    return cut(batch, microbatch_size)


def _first_of(accumulation, batch):
    """A micro-batch. Keras runs the model on it if it cannot build it from shapes."""
    if accumulation.accum_steps is not None:
        return checked(batch)
    return next(cut(batch, accumulation.microbatch_size).iterator)


def _updates(batches, epoch, accumulation):
    """The data of each update of an epoch, in order."""
    if accumulation.accum_steps is not None:
        batches = map(checked, batches)
    while True:
        try:
            microbatches = epoch.draw(batches, accumulation.accum_steps or 1)
        except StopIteration:
            return
        if accumulation.accum_steps is not None:
            yield microbatches
        else:
            yield next(microbatches.iterator)


class _InMicrobatches(torch.utils.data.Dataset):
    """A data set that gives the micro-batches of another data set's batches.

    Args:
        batches: A function that takes the numbers of examples, and returns them.
        microbatch_size: Number of examples in a micro-batch.
    """

    def __init__(self, batches: Callable[[list], Any], microbatch_size: int):
        self.batches = batches
        self.microbatch_size = microbatch_size

    def __getitems__(self, numbers):
        def microbatch(start, stop):
            return self.batches(numbers[start:stop])

        return microbatches_of(len(numbers), self.microbatch_size, microbatch)


def _in_microbatches(arrays, microbatch_size, symbolic=False):
    """A loader of batches of arrays, each as its micro-batches or symbolic."""
    batches = arrays.adapter.get_torch_dataloader()
    examples = batches.dataset.__getitems__

    def collate(microbatches):
        return (
            arrays.symbolic(examples([0]), microbatch_size)
            if symbolic
            else microbatches
        )

    # A micro-batch goes to the device when it is drawn.
    return torch.utils.data.DataLoader(
        _InMicrobatches(examples, microbatch_size),
        batch_sampler=batches.batch_sampler,
        collate_fn=collate,
    )
