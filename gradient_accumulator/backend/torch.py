"""Training in pieces on PyTorch: `backward` on each piece adds to what is there."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import keras
import keras.src.backend.torch.trainer as keras_trainer
import torch

from gradient_accumulator import normalizers
from gradient_accumulator.backend import masks, trainer
from gradient_accumulator.pieces import Accumulation, Epoch, Pieces, cut

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
    update = _make_update(model, accumulation)

    def train_function(data):
        first, *others = data
        if accumulation.microbatch_size is not None:
            pieces = cut(first, accumulation.microbatch_size)
        else:
            later = others[0]
            pieces = Pieces(itertools.chain([first], later.iterator), later.count)
        state = model.non_trainable_variables
        before = [variable.value.detach().clone() for variable in state]
        try:
            return update(pieces)
        except BaseException:
            # The pieces before the failing one moved seeds and statistics.
            with torch.no_grad():
                for variable, value in zip(state, before):
                    variable.assign(value)
            raise
        finally:
            _clear_gradients(model.trainable_variables)

    return train_function


@contextmanager
def drawing(epoch: Epoch, group: int) -> Iterator[None]:
    """Around `fit`: its iterator draws one piece at a time, no more than an epoch has.

    Keras draws in groups of `steps_per_execution`, and warns where the data ends within
    a group: what draws an update's other pieces, and fillers, take the others' places.

    Args:
        epoch: Where `fit` stands.
        group: Number of batches in an update.
    """
    original = keras_trainer.TorchEpochIterator

    class EpochIterator(keras_trainer.TorchEpochIterator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            # The next one that `fit` makes is for validation data.
            keras_trainer.TorchEpochIterator = original

        def _get_iterator(self):
            return _groups(super()._get_iterator(), epoch, group)

    keras_trainer.TorchEpochIterator = EpochIterator
    try:
        yield
    finally:
        keras_trainer.TorchEpochIterator = original


def _groups(batches: Iterable, epoch: Epoch, group: int) -> Iterator:
    batches = iter(batches)
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


def _make_update(model, accumulation):
    """A function of one update's pieces."""
    forward = partial(trainer.forward, model, training=True)
    if model.jit_compile and not model.run_eagerly:
        forward = torch.compile(forward)
    weighed = normalizers.HostWeights(model, partial(_measure, model))

    def update(pieces):
        variables = model.trainable_variables
        _clear_gradients(variables)
        gradients = [
            _Gradient(
                v.value,
                getattr(torch, trainer.accumulator_dtype(v, accumulation.accum_dtype)),
                trainer.overwrites(v),
            )
            for v in variables
        ]
        loss = 0.0
        pieces = weighed(pieces)
        for piece, share, kinds, factors in pieces:
            weigh = None if factors is None else normalizers.weighing(kinds, factors)
            worth, own_logs = _add_piece(model, variables, forward, piece, share, weigh)
            loss = loss + worth
            for gradient in gradients:
                gradient.add()
        correction = pieces.correction
        finished = [gradient.finish(correction) for gradient in gradients]
        _apply(model, variables, finished)
        return trainer.logs(model, own_logs, loss * correction, pieces.examples)

    return update


class _Gradient:
    """The sum of a variable's gradients.

    Where `backward` sums in the wanted dtype already, the sum stays where it is.
    """

    def __init__(
        self, parameter: torch.nn.Parameter, dtype: torch.dtype, largest: bool
    ):
        self.parameter = parameter
        self.dtype = dtype
        self.largest = largest
        self.sum: torch.Tensor | None = None

    def add(self) -> None:
        gradient = self.parameter.grad
        if gradient is None or (gradient.dtype == self.dtype and not self.largest):
            return
        self.parameter.grad = None
        if self.sum is None:
            self.sum = gradient.to(self.dtype)
        elif self.largest:
            torch.maximum(self.sum, gradient, out=self.sum)
        else:
            self.sum += gradient

    def finish(self, correction: float) -> torch.Tensor | None:
        gradient, self.sum = self.sum, None
        if gradient is None:
            gradient = self.parameter.grad
        if gradient is None:
            return None
        if correction != 1 and not self.largest:
            gradient *= correction
        return gradient.to(self.parameter.dtype)


def _measure(model, piece):
    """The denominators of a piece."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(piece)
    # Nothing of a forward pass stays. Without a compiler that drops what is not used
    # it costs as much as any: the model's graph often tells the masks without one.
    with trainer.StatelessScope(), torch.no_grad():
        y_pred = masks.predictions(model, x)
        if y_pred is None:
            y_pred = trainer.forward(model, x, training=False)
        return normalizers.values(normalizers.measure(model, piece, y_pred))


def _add_piece(model, variables, forward, data, share, weigh):
    """Add a piece's part of the full batch's gradient, and its metrics.

    Returns its part of the full batch's loss, and the logs if they are the model's own.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    piece = (x, y, forward(x), sample_weight)
    loss = trainer.compute_loss(model, piece, model.losses, share, weigh)
    worth = loss * share
    if variables:
        model.optimizer.scale_loss(worth).backward()
    own_logs = trainer.update_metrics(model, piece, loss, normalizers.examples(data))
    return worth.detach(), own_logs


def _apply(model, variables, gradients):
    """The finished gradient to the optimizer, once."""
    if not variables:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return
    with torch.no_grad():
        model.optimizer.apply(gradients, variables)


def _clear_gradients(variables):
    for variable in variables:
        variable.value.grad = None
