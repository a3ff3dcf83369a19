"""An update on PyTorch: `backward` on each piece adds to what is there."""

from __future__ import annotations

import warnings
from functools import partial

import keras
import torch

from gradient_accumulator import normalizers
from gradient_accumulator.backend import masks, trainer
from gradient_accumulator.backend.statistics import Statistics
from gradient_accumulator.backend.torch.sums import Sum


def make_update(model, accumulation):
    """A function of one update's pieces."""
    forward = partial(trainer.forward, model, training=True)
    if model.jit_compile and not model.run_eagerly:
        forward = torch.compile(forward)
    clipping = accumulation.clipping
    if clipping is not None:
        clipping.check_excluded(model.weights)
    statistics = Statistics(model)
    weighed = normalizers.HostWeights(model, partial(_measure, model))

    def update(pieces):
        variables = model.trainable_variables
        clear_gradients(variables)
        gradients = [
            Sum(
                v.value,
                getattr(torch, trainer.accumulator_dtype(v, accumulation.accum_dtype)),
                trainer.overwrites(v),
            )
            for v in variables
        ]
        before = statistics.before()
        loss = 0.0
        pieces = weighed(pieces)
        for piece, share, kinds, factors in pieces:
            weigh = None if factors is None else normalizers.weighing(kinds, factors)
            with statistics.pooling():
                worth, own_logs = _add_piece(
                    model, variables, forward, piece, share, weigh
                )
            loss = loss + worth
            for gradient in gradients:
                gradient.add()
        correction = pieces.correction
        finished = [
            g.finish(None if correction == 1 else correction) for g in gradients
        ]
        _apply(model, clipping, variables, finished)
        statistics.finish(before)
        return trainer.logs(model, own_logs, loss * correction, pieces.examples)

    return update


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


def _apply(model, clipping, variables, gradients):
    """The finished gradient to the optimizer, once."""
    if not variables:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return
    with torch.no_grad():
        if clipping is not None:
            gradients = clipping.clip_update(model.optimizer, variables, gradients)
        model.optimizer.apply(gradients, variables)


def clear_gradients(variables):
    for variable in variables:
        variable.value.grad = None
