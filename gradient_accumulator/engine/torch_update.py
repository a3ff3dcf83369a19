"""An update on PyTorch: `backward` on each micro-batch adds to `grad`."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import keras
import torch

from gradient_accumulator import losses as normalizers
from gradient_accumulator.compat import trainer
from gradient_accumulator.devices import torch_devices as replicas
from gradient_accumulator.engine.torch_activations import free_activations
from gradient_accumulator.engine.torch_sums import Sum
from gradient_accumulator.microbatches import map_leaves
from gradient_accumulator.statistics import Statistics, apart, synchronizes


def make_update(model, training):
    """A function that makes an update, from micro-batches and whether `fit` begins."""
    accumulation = training.accumulation
    forward = partial(trainer.forward, model, training=True)
    if model.jit_compile and not model.run_eagerly:
        forward = torch.compile(forward)
    clipping = accumulation.clipping
    if clipping is not None:
        clipping.check_excluded(model.weights)
    statistics = Statistics(model)
    waiting = synchronizes(model)  # whether processes wait in each micro-batch
    totals = replicas.totals if replicas.count() > 1 else None
    # Own metrics compute logs at every micro-batch, and processes may differ in their
    # number of micro-batches.
    own_metrics = totals is not None and trainer.has_own_metrics(model)
    weighed = normalizers.HostWeights(
        model,
        partial(_measure, model, statistics, waiting),
        partial(_stateless, model),
        notices=training.notices,
        totals=totals,
    )

    def update(microbatches, begins):
        if begins:  # the loss may differ from the last `fit`'s
            weighed.inspected.clear()
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
        rewound = values_of(statistics.rewound)
        loss, own_logs = keras.ops.zeros((), normalizers.dtype()), {}
        denominator = 0.0
        if waiting:
            replicas.check_microbatches(microbatches.count)
        microbatches = weighed(microbatches, values_of(statistics.carried))
        drawn = list(microbatches) if own_metrics else microbatches
        for k, (microbatch, share, kinds, factors) in enumerate(drawn, start=1):
            last = own_metrics and k == len(drawn)
            weigh = None if factors is None else normalizers.Weighing(kinds, factors)
            assign(rewound)
            with statistics.pooling(), replicas.together(last):
                worth, own_logs = _add_microbatch(
                    model, variables, forward, microbatch, share, weigh
                )
            loss = loss + worth
            if weigh is not None:
                denominator = denominator + weigh.denominator
            for sum_ in sums:
                sum_.add()
            free_activations()
        if own_metrics and not drawn:
            with replicas.together():
                own_logs = model.get_metrics_result()  # other processes wait
        correction = microbatches.correction(denominator)
        gradients = [s.finish(None if correction == 1 else correction) for s in sums]
        loss = loss * correction
        if replicas.count() > 1:
            gradients = _reduced(sums, gradients, loss, statistics.moving)
        _apply(model, clipping, variables, gradients)
        statistics.finish(before)
        with replicas.together():
            return trainer.logs(model, own_logs, loss, microbatches.examples)

    return update


def _measure(model, statistics, waiting, state, microbatch, losses):
    """The denominators of a micro-batch, and the state that the next one begins with.

    The forward pass leaves nothing else behind, and random states stay as they were.
    """
    x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch)
    (carried,) = state
    with _stateless(model, carried) as scope, torch.no_grad():
        if not losses.by_predictions:
            y_pred = _of_shape(model, x)
        else:
            # No compiler drops unused results: this is a whole forward pass.
            with statistics.pooling(), nullcontext() if waiting else apart(model):
                y_pred = trainer.forward(model, x, training=True)
        worth = normalizers.values(normalizers.measure(model, microbatch, y_pred))
    del y_pred
    free_activations()
    return worth, ([(v, scope.get_current_value(v)) for v, _ in carried],)


def _of_shape(model, x):
    """Zeros in the shapes of the predictions."""
    specs = trainer.compute_output_spec(
        partial(trainer.forward, model, training=True),
        map_leaves(normalizers.symbolic, x),
    )
    return map_leaves(
        # A broadcast number takes no memory, whatever the shape.
        lambda spec: keras.ops.broadcast_to(
            keras.ops.zeros((), spec.dtype), spec.shape
        ),
        specs,
    )


@contextmanager
def _stateless(model, state, **settings):
    """A stateless scope, also for state that Keras does not know of.

    PyTorch's own seeds, and the statistics of its modules, are restored.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = range(torch.cuda.device_count())
    try:
        with (
            torch.random.fork_rng(devices),
            trainer.StatelessScope(state_mapping=state, **settings) as scope,
        ):
            yield scope
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _add_microbatch(model, variables, forward, data, share, weigh):
    """Add a micro-batch's part of the batch's gradient, and its metrics.

    Returns its part of the batch's loss, and the logs if they are the model's own.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    microbatch = (x, y, forward(x), sample_weight)
    loss = trainer.compute_loss(model, microbatch, model.losses, share, weigh)
    worth = loss * share
    if variables:
        model.optimizer.scale_loss(worth).backward()
    size = normalizers.examples(data)
    own_logs = trainer.update_metrics(model, microbatch, loss, size, share)
    return worth.detach(), own_logs


@torch.no_grad()
def _reduced(sums, gradients, loss, moving):
    """The gradients, reduced over all processes.

    Args:
        sums: The `Sum` of each gradient.
        gradients: The gradients of this process, None where there is none.
        loss: This process's part of the loss, which becomes the batch's loss.
        moving: The variables that become their mean over the processes.
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
    """Hand the finished gradient to the optimizer, once."""
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


def values_of(variables):
    """Pairs of a variable and a copy of its value."""
    return [(variable, variable.value.detach().clone()) for variable in variables]


@torch.no_grad()
def assign(values):
    """Assign the pairs of `values_of` to their variables."""
    for variable, value in values:
        variable.assign(value)
