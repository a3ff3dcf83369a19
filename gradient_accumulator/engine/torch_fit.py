"""The train function on PyTorch, and how it draws its data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import torch

from gradient_accumulator import losses as normalizers
from gradient_accumulator.compat import trainer
from gradient_accumulator.devices import torch_devices as replicas
from gradient_accumulator.engine.torch_update import (
    assign,
    clear_gradients,
    make_update,
    values_of,
)
from gradient_accumulator.microbatches import (
    Epoch,
    Microbatches,
    checked,
    cut,
    microbatches_of,
)
from gradient_accumulator.settings import Accumulation
from gradient_accumulator.statistics import rewound


def make_train_function(model: keras.Model, training: Any) -> Callable[[list], dict]:
    """The function that `fit` calls with the data of one update, in a list."""
    accumulation, epoch = training.accumulation, training.epoch
    if model.steps_per_execution > 1:
        raise ValueError(
            "`steps_per_execution` must be 1 with the PyTorch backend. "
            f"Received: steps_per_execution={model.steps_per_execution}"
        )
    update = make_update(model, training)
    processes = replicas.count()  # the number that `update` is for
    alike = False  # whether processes began with the same weights

    def train_function(data):
        nonlocal update, processes, alike
        if processes != replicas.count():
            update = make_update(model, training)
            processes, alike = replicas.count(), False
        if not alike or epoch.updates == 1:
            replicas.broadcast([*model.weights, *model.optimizer.variables])
            alike = True
        replicas.check_in_step(epoch.number, epoch.updates, False)
        (drawn,) = data
        if accumulation.microbatch_size is not None:
            microbatches = _cut(drawn, accumulation.microbatch_size)
            epoch.cut(microbatches.count, microbatches.on_device)
        elif isinstance(drawn, Microbatches):
            microbatches = drawn
        else:  # from `train_on_batch`
            microbatches = Microbatches(iter(data), 1)
        before = values_of(
            [
                *trainer.moved_by_microbatches(model),
                *rewound(model),
                *trainer.metrics_variables(model),
            ]
        )
        try:
            with replicas.together(False):
                return update(microbatches, epoch.fitting and epoch.updates == 1)
        except BaseException:
            # Micro-batches before the failing one moved these variables.
            assign(before)
            raise
        finally:
            clear_gradients(model.trainable_variables)

    return train_function


def _cut(batch, microbatch_size):
    if isinstance(batch, Microbatches):  # already cut, from arrays
        return batch
    if replicas.count() > 1 and normalizers.examples(batch) == 0:
        # Other processes have the last batch's examples.
        return Microbatches(iter([batch]), 1, examples=0)
    return cut(batch, microbatch_size)


def after_fit(model: keras.Model, epoch: Epoch) -> None:
    """Called at the end of `fit`."""
    replicas.check_in_step(epoch.number, epoch.updates, True)


def before_epoch(model: keras.Model, epoch: Epoch) -> None:
    """Called when Keras resets the metrics."""


def metrics_result(model: keras.Model, epoch: Epoch, own: Callable[[], dict]) -> dict:
    """The logs: of all processes in `fit`, of this process in `evaluate`.

    Args:
        model: The model.
        epoch: The position of `fit`.
        own: Keras's `get_metrics_result`.
    """
    if replicas.count() == 1:
        return own()
    together = replicas.are_together()
    if epoch.evaluating or together is False:
        return trainer.metrics_result(model)
    if together is None:  # at the end of an epoch
        replicas.check_in_step(epoch.number, epoch.updates, True)
    with replicas.summed(model.metrics_variables):
        return trainer.metrics_result(model)


def batches(
    model: keras.Model, epoch: Epoch, accumulation: Accumulation, adapter: Any
) -> tuple[Callable, Callable]:
    """The data of the train function, and the data that Keras builds the model from.

    Args:
        model: The model.
        epoch: The position of `fit`.
        accumulation: How the model accumulates.
        adapter: Keras's adapter over the data.

    Returns:
        Two functions that Keras calls instead of the adapter's.
    """
    arrays = None
    if accumulation.microbatch_size is not None:
        arrays = trainer.large_arrays(adapter)

    def updates():
        if arrays is None:
            loader = adapter.get_torch_dataloader()
        else:
            loader = _in_microbatches(arrays, accumulation.microbatch_size)
        # `iter` is called at once, because it draws from PyTorch's seed.
        return _updates(iter(loader), epoch, accumulation)

    def first():
        if arrays is not None:
            return _in_microbatches(arrays, accumulation.microbatch_size, symbolic=True)
        return map(partial(_first_of, accumulation), adapter.get_torch_dataloader())

    return updates, first


def _first_of(accumulation, batch):
    """A micro-batch, on which Keras runs the model where it knows no shapes."""
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
        batches: A function of examples' numbers that returns these examples.
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


def epoch_ended(epoch: Epoch) -> None:
    """Called after the last update of an epoch, before Keras goes on."""
