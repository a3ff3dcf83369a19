"""An update on PyTorch: `backward` on each piece adds to what is there."""

from __future__ import annotations

import warnings
from functools import partial

import keras
import torch

from gradient_accumulator import normalizers
from gradient_accumulator.backend import masks, trainer
from gradient_accumulator.backend.statistics import Statistics, synchronizes
from gradient_accumulator.backend.torch import replicas
from gradient_accumulator.backend.torch.activations import free_activations
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
    waiting = synchronizes(model)  # for each other, in every piece
    totals = replicas.totals if replicas.count() > 1 else None
    # These ask for the logs at every piece, of which processes differ in number.
    own_metrics = totals is not None and trainer.has_own_metrics(model)
    weighed = normalizers.HostWeights(model, partial(_measure, model), totals=totals)

    def update(pieces):
        variables = model.trainable_variables
        clear_gradients(variables)
        sums = [
            Sum(
                v.value,
                getattr(torch, trainer.accumulator_dtype(v, accumulation.accum_dtype)),
                trainer.overwrites(v),
            )
            for v in variables
        ]
        before = statistics.before()
        loss, own_logs = keras.ops.zeros((), normalizers.dtype()), {}
        if waiting:
            replicas.check_pieces(pieces.count)
        pieces = weighed(pieces)
        drawn = list(pieces) if own_metrics else pieces
        for k, (piece, share, kinds, factors) in enumerate(drawn, start=1):
            last = own_metrics and k == len(drawn)
            weigh = None if factors is None else normalizers.weighing(kinds, factors)
            with statistics.pooling(), replicas.together(last):
                worth, own_logs = _add_piece(
                    model, variables, forward, piece, share, weigh
                )
            loss = loss + worth
            for sum_ in sums:
                sum_.add()
            free_activations()
        if own_metrics and not drawn:
            with replicas.together():
                own_logs = model.get_metrics_result()  # the others wait for it
        correction = pieces.correction()
        gradients = [s.finish(None if correction == 1 else correction) for s in sums]
        loss = loss * correction
        if replicas.count() > 1:
            gradients = _reduced(sums, gradients, loss, statistics.moving)
        _apply(model, clipping, variables, gradients)
        statistics.finish(before)
        with replicas.together():
            return trainer.logs(model, own_logs, loss, pieces.examples)

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
        worth = normalizers.values(normalizers.measure(model, piece, y_pred))
    del y_pred
    free_activations()
    return worth


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


@torch.no_grad()
def _reduced(sums, gradients, loss, moving):
    """The gradients of all processes, from one reduction.

    Args:
        sums: What the gradients were summed by.
        gradients: Those of this process, None where there is none.
        loss: This process's part of the loss, which becomes the loss.
        moving: Variables that become their mean over the processes.
    """
    connected = torch.tensor([g is not None for g in gradients], dtype=torch.float32)
    connected = connected.to(loss.device)
    gradients = [s.zeros() if g is None else g for s, g in zip(sums, gradients)]
    added = [g for s, g in zip(sums, gradients) if not s.largest]
    moving = [variable.value for variable in moving]
    replicas.reduce([*added, loss, connected, *moving])
    replicas.reduce([g for s, g in zip(sums, gradients) if s.largest], largest=True)
    for value in moving:
        value /= replicas.count()
    return [g if some else None for g, some in zip(gradients, connected.tolist())]


def _apply(model, clipping, variables, gradients):
    """The finished gradient to the optimizer, once."""
    if not variables:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return
    with torch.no_grad():
        gradients = [
            None if g is None else g.to(v.value.dtype)
            for g, v in zip(gradients, variables)
        ]
        if clipping is not None:
            gradients = clipping.clip_update(model.optimizer, variables, gradients)
        model.optimizer.apply(gradients, variables)


def clear_gradients(variables):
    for variable in variables:
        variable.value.grad = None
