"""What `fit` calls on PyTorch, and how it draws its data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import keras.src.backend.torch.trainer as keras_trainer
import torch

from gradient_accumulator import normalizers
from gradient_accumulator.backend import trainer
from gradient_accumulator.backend.attributes import with_attribute
from gradient_accumulator.backend.statistics import rewound
from gradient_accumulator.backend.torch import replicas
from gradient_accumulator.backend.torch.update import (
    assign,
    clear_gradients,
    make_update,
    values_of,
)
from gradient_accumulator.pieces import (
    Accumulation,
    Epoch,
    Pieces,
    checked,
    cut,
    pieces_of,
)

KERAS_DRAWS_TO_BUILD = True  # whether `fit` builds the model from a batch of its data


def make_train_function(
    model: keras.Model, accumulation: Accumulation, epoch: Epoch
) -> Callable[[list], dict]:
    """The function that `fit` calls with the batches of one update."""
    if model.steps_per_execution > 1:
        raise ValueError(
            "`steps_per_execution` must be 1 with the PyTorch backend. "
            f"Received: steps_per_execution={model.steps_per_execution}"
        )
    update = make_update(model, accumulation)
    processes = replicas.count()  # that the update is for
    alike = False  # whether they began with the same weights

    def train_function(data):
        nonlocal update, processes, alike
        epoch.check_begun()
        if processes != replicas.count():
            update = make_update(model, accumulation)
            processes, alike = replicas.count(), False
        if not alike or epoch.updates == 1:
            replicas.broadcast([*model.weights, *model.optimizer.variables])
            alike = True
        replicas.check_in_step(epoch.number, epoch.updates, False)
        first, *others = data
        if accumulation.microbatch_size is not None:
            pieces = _cut(first, accumulation.microbatch_size)
            epoch.cut(pieces.count, pieces.on_device)
        elif not others:
            pieces = Pieces(iter(data), 1)
        else:
            later = others[0]
            pieces = Pieces(itertools.chain([first], later.iterator), later.count)
        before = values_of(
            [
                *trainer.moved_by_pieces(model),
                *rewound(model),
                *trainer.metrics_variables(model),
            ]
        )
        try:
            with replicas.together(False):
                return update(pieces, epoch.fitting and epoch.updates == 1)
        except BaseException:
            # The pieces before the failing one moved it.
            assign(before)
            raise
        finally:
            clear_gradients(model.trainable_variables)

    return train_function


def _cut(batch, microbatch_size):
    if isinstance(batch, Pieces):  # of arrays
        return batch
    if replicas.count() > 1 and normalizers.examples(batch) == 0:
        # Other processes have the last batch's examples.
        return Pieces(iter([batch]), 1, examples=0)
    return cut(batch, microbatch_size)


@contextmanager
def fitting(model: keras.Model, epoch: Epoch, group: int) -> Iterator[None]:
    """Around `fit`.

    Args:
        model: A compiled model.
        epoch: Where `fit` stands.
        group: Number of batches in an update.
    """
    with _drawing(model, epoch, group), _logging(model, epoch):
        yield
    replicas.check_in_step(epoch.number, epoch.updates, True)


@contextmanager
def _logging(model: keras.Model, epoch: Epoch) -> Iterator[None]:
    """The logs of `fit` are of all processes; of `evaluate`, as ever, each its own."""
    if replicas.count() == 1:
        yield
        return
    evaluating = False

    def get_metrics_result():
        together = replicas.are_together()
        if evaluating or together is False:
            return trainer.metrics_result(model)
        if together is None:  # at the end of an epoch
            replicas.check_in_step(epoch.number, epoch.updates, True)
        with replicas.summed(model.metrics_variables):
            return trainer.metrics_result(model)

    @functools.wraps(type(model).evaluate)
    def evaluate(*args, **kwargs):
        nonlocal evaluating
        evaluating = True
        try:
            return type(model).evaluate(model, *args, **kwargs)
        finally:
            evaluating = False

    with (
        with_attribute(model, "get_metrics_result", get_metrics_result),
        with_attribute(model, "evaluate", evaluate),
    ):
        yield


@contextmanager
def _drawing(model: keras.Model, epoch: Epoch, group: int) -> Iterator[None]:
    """Keras's iterator draws one piece at a time, no more than an epoch has.

    Keras draws in groups of `steps_per_execution`, and warns where the data ends within
    a group: what draws an update's other pieces, and fillers, take the others' places.
    """
    original = keras_trainer.TorchEpochIterator

    class EpochIterator(keras_trainer.TorchEpochIterator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.trains = trainer.made_to_train(model, kwargs)
            if self.trains:
                keras_trainer.TorchEpochIterator = original

        def _get_iterator(self):
            # At once: to begin an epoch draws from PyTorch's seed.
            batches = iter(super()._get_iterator())
            return _groups(batches, epoch, group) if self.trains else batches

    keras_trainer.TorchEpochIterator = EpochIterator
    try:
        yield
    finally:
        keras_trainer.TorchEpochIterator = original


def _groups(batches: Iterator, epoch: Epoch, group: int) -> Iterator:
    batches = (b if isinstance(b, Pieces) else checked(b) for b in batches)
    while True:
        try:
            pieces = epoch.draw(batches, group)
        except StopIteration:
            return
        # Keras builds the model from a group's first batch.
        yield next(pieces.iterator)
        if group > 1:
            yield pieces
            yield from [None] * (group - 2)


class _InPieces(torch.utils.data.Dataset):
    """Gives the pieces of a batch, where another data set gives the batch.

    Args:
        batches: A function of examples' numbers that returns the batch of them.
        microbatch_size: Number of examples in a piece.
    """

    def __init__(self, batches: Callable[[list], Any], microbatch_size: int):
        self.batches = batches
        self.microbatch_size = microbatch_size

    def __getitems__(self, numbers):
        def piece(start, stop):
            return self.batches(numbers[start:stop])

        return pieces_of(len(numbers), self.microbatch_size, piece)


def draw_arrays(
    model: keras.Model, epoch: Epoch, microbatch_size: int, iterator: Any, arrays: Any
) -> tuple[Any, str, Callable] | None:
    """How `fit` draws pieces, not full batches: see `trainer.drawing`."""

    def get_torch_dataloader():
        # In each epoch, for callbacks may change arrays.
        batches = type(arrays.adapter).get_torch_dataloader(arrays.adapter)
        examples = batches.dataset.__getitems__

        def collate(pieces):
            # Without an epoch Keras draws to build the model.
            return pieces if epoch.number else arrays.symbolic(examples([0]))

        # A piece goes to the device when it is its turn.
        return torch.utils.data.DataLoader(
            _InPieces(examples, microbatch_size),
            batch_sampler=batches.batch_sampler,
            collate_fn=collate,
        )

    return arrays.adapter, "get_torch_dataloader", get_torch_dataloader


def epoch_ended(epoch: Epoch) -> None:
    """Called after the last update of an epoch, before Keras goes on."""


@torch.no_grad()
def call_once(function: Callable, *data: Any) -> list:
    """A function's list of results for nested arrays, without gradients, in NumPy."""
    return [keras.ops.convert_to_numpy(value) for value in function(*data)]
