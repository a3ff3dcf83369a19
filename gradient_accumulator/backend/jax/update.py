"""An update on JAX: a host loop over one jitted function that adds a piece.

Not `jax.lax.scan`: XLA runs convolutions inside a loop many times slower on CPUs, and
a loop of the host takes pieces of different shapes.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import keras

from gradient_accumulator import normalizers
from gradient_accumulator.backend import trainer
from gradient_accumulator.backend.statistics import Statistics


def make_update(model, accumulation):
    """A function of the state and one update's pieces, with its compiled programs."""
    zeros = partial(_zeros, model, accumulation)
    statistics = Statistics(model)
    add_piece = partial(_add_piece, model, statistics)
    apply = partial(_apply, model, accumulation.clipping, statistics)
    if accumulation.clipping is not None:
        accumulation.clipping.check_excluded(model.weights)
    measure = partial(_measure, model)
    if model.jit_compile and not model.run_eagerly:
        zeros, measure = jax.jit(zeros), jax.jit(measure)
        add_piece = jax.jit(add_piece, static_argnums=0, donate_argnums=1)
        apply = jax.jit(apply, donate_argnums=(2, 3))
    weighed = normalizers.HostWeights(model, measure, partial(_variables, model))
    # Scaling the loss may need the optimizer's variables; else they stay out of it.
    scales = trainer.has_own_scale_loss(model.optimizer)

    @lru_cache(maxsize=2)
    def number(value):
        # A dispatch takes an array of JAX's faster than one of NumPy's.
        return jnp.asarray(value, normalizers.dtype())

    positions = _positions(model, statistics)

    def update(state, pieces):
        trainable, non_trainable, optimizer, metrics = state
        before = [non_trainable[i] for i in positions]
        pieces = weighed(pieces, trainable, non_trainable)
        sums = zeros()
        for piece, share, kinds, factors in pieces:
            sums, non_trainable, metrics, own_logs = add_piece(
                kinds,
                sums,
                trainable,
                non_trainable,
                metrics,
                optimizer if scales else None,
                piece,
                number(share),
                factors,
            )
        trainable, optimizer, metrics, logs, after = apply(
            sums,
            number(pieces.correction()),
            trainable,
            optimizer,
            metrics,
            own_logs,
            pieces.examples,
            before,
            [non_trainable[i] for i in positions],
        )
        for i, value in zip(positions, after):
            non_trainable[i] = value
        return logs, (trainable, non_trainable, optimizer, metrics)

    return update


def _zeros(model, accumulation):
    """What pieces add up to: the gradients, and the loss."""
    gradients = [
        jnp.zeros(v.shape, trainer.accumulator_dtype(v, accumulation.accum_dtype))
        for v in model.trainable_variables
    ]
    return gradients, jnp.zeros((), normalizers.dtype())


def _measure(model, trainable, non_trainable, data):
    """The denominators of a piece; of its forward pass only the masks are computed."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    with _variables(model, trainable, non_trainable):
        y_pred = trainer.forward(model, x, training=False)
        return normalizers.values(normalizers.measure(model, data, y_pred))


def _variables(model, trainable, non_trainable, metrics=(), **kwargs):
    """A scope in which the model's variables have these values."""
    mapping = [
        *zip(model.trainable_variables, trainable),
        *zip(model.non_trainable_variables, non_trainable),
        *zip(model.metrics_variables, metrics),
    ]
    return trainer.StatelessScope(state_mapping=mapping, **kwargs)


def _add_piece(
    model,
    statistics,
    kinds,
    sums,
    trainable,
    non_trainable,
    metrics,
    optimizer,
    data,
    share,
    factors,
):
    """Add a piece's part of the full batch's gradient, and its metrics."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    weigh = None if factors is None else normalizers.weighing(kinds, factors)

    def worth(trainable):
        kwargs = {"training": True} if model._call_has_training_arg else {}
        with trainer.summed_activity_losses(model), statistics.pooling():
            y_pred, new_non_trainable, losses = model.stateless_call(
                trainable, non_trainable, x, return_losses=True, **kwargs
            )
        with _variables(model, trainable, new_non_trainable, metrics) as scope:
            loss = trainer.compute_loss(
                model, (x, y, y_pred, sample_weight), losses, share, weigh
            )
        state = [
            [scope.get_current_value(v) for v in variables]
            for variables in (model.non_trainable_variables, model.metrics_variables)
        ]
        worth = loss * share.astype(loss.dtype)
        with _optimizer_variables(model, optimizer):
            return model.optimizer.scale_loss(worth), (loss, y_pred, *state)

    with jax.named_scope("accumulate_gradients"):
        gradients, (loss, y_pred, non_trainable, metrics) = jax.grad(
            worth, has_aux=True
        )(trainable)
        accumulators, total = sums
        accumulators = [
            _add(accumulator, gradient.astype(accumulator.dtype), variable)
            for accumulator, gradient, variable in zip(
                accumulators, gradients, model.trainable_variables
            )
        ]
    with _variables(model, trainable, non_trainable, metrics) as scope:
        own_logs = trainer.update_metrics(
            model, (x, y, y_pred, sample_weight), loss, normalizers.examples(data)
        )
    metrics = [scope.get_current_value(v) for v in model.metrics_variables]
    sums = accumulators, total + loss.astype(total.dtype) * share
    return sums, non_trainable, metrics, own_logs


def _optimizer_variables(model, values):
    if values is None:
        return nullcontext()
    mapping = list(zip(model.optimizer.variables, values))
    return trainer.StatelessScope(state_mapping=mapping)


def _add(accumulator, gradient, variable):
    if trainer.overwrites(variable):
        return jnp.maximum(accumulator, gradient)
    return accumulator + gradient


def _finish(accumulator, correction, variable):
    if not trainer.overwrites(variable):
        accumulator = accumulator * correction.astype(accumulator.dtype)
    return accumulator.astype(variable.dtype)


def _apply(
    model,
    clipping,
    statistics,
    sums,
    correction,
    trainable,
    optimizer,
    metrics,
    own_logs,
    examples,
    before,
    pooled,
):
    """The finished gradient to the optimizer, once.

    Returns the new values of the variables, the logs of the update, and the new
    statistics, which were `before` and are `pooled`.
    """
    accumulators, loss = sums
    with _variables(model, trainable, (), metrics) as scope:
        logs = trainer.logs(model, own_logs, loss * correction, examples)
    metrics = [scope.get_current_value(v) for v in model.metrics_variables]
    if not trainable:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        pooled = _finish_statistics(
            model, statistics, optimizer, optimizer, before, pooled
        )
        return trainable, optimizer, metrics, logs, pooled
    gradients = [
        _finish(accumulator, correction, variable)
        for accumulator, variable in zip(accumulators, model.trainable_variables)
    ]
    if clipping is not None:
        variables = model.trainable_variables
        mapping = [
            *zip(variables, trainable),
            *zip(model.optimizer.variables, optimizer),
        ]
        with trainer.StatelessScope(state_mapping=mapping):
            gradients = clipping.clip_update(model.optimizer, variables, gradients)
    with jax.named_scope("apply_gradients"):
        trainable, new_optimizer = model.optimizer.stateless_apply(
            optimizer, gradients, trainable
        )
    pooled = _finish_statistics(
        model, statistics, optimizer, new_optimizer, before, pooled
    )
    return trainable, new_optimizer, metrics, logs, pooled


def _positions(model, statistics):
    """Where the statistics are among the model's variables that are not trained."""
    found = {id(v): i for i, v in enumerate(model.non_trainable_variables)}
    return [found[id(v)] for v in statistics.variables]


def _finish_statistics(model, statistics, old_optimizer, optimizer, before, pooled):
    def scope(optimizer, values):
        mapping = [
            *zip(model.optimizer.variables, optimizer),
            *zip(statistics.variables, values),
        ]
        return trainer.StatelessScope(state_mapping=mapping)

    with scope(old_optimizer, before):
        known = statistics.before()
    with scope(optimizer, pooled) as finished:
        statistics.finish(known)
    return [finished.get_current_value(v) for v in statistics.variables]
