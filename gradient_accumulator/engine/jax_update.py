"""An update on JAX: a host loop over one jitted function that adds a micro-batch.

The loop is no `jax.lax.scan`: on CPUs, XLA runs convolutions inside a loop many times
slower, and a host loop takes micro-batches of different shapes.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain

import jax
import jax.numpy as jnp
import keras

from gradient_accumulator import losses as normalizers
from gradient_accumulator.compat import trainer
from gradient_accumulator.devices.jax_devices import (
    active_replicas,
    check_in_step,
    has_layout,
    state_shardings,
    waited_for,
)
from gradient_accumulator.engine import jax_sharded as each_device
from gradient_accumulator.statistics import Statistics, normalizations


def make_update(model, training):
    """A function that makes an update, from the state and the micro-batches."""
    accumulation, epoch = training.accumulation, training.epoch

    def check(microbatches):
        check_in_step(epoch.number, epoch.updates, microbatches)

    if accumulation.clipping is not None:
        accumulation.clipping.check_excluded(model.weights)
    statistics = Statistics(model)
    positions = _positions(model, statistics.variables)
    rewound = _positions(model, statistics.rewound)
    # Loss scaling may read the optimizer's variables; else they are not passed.
    scales = trainer.has_own_scale_loss(model.optimizer)
    shardings = state_shardings(model)  # while the variables hold their values
    programs: _Programs | None = None

    @lru_cache(maxsize=2)
    def number(value):
        # JAX dispatches its own arrays faster than NumPy's.
        return jnp.asarray(value, normalizers.dtype())

    def update(state, microbatches):
        nonlocal programs
        trainable, non_trainable, optimizer, metrics = state
        if programs is None:
            first = next(microbatches.iterator)
            microbatches = replace(
                microbatches, iterator=chain([first], microbatches.iterator)
            )
            programs = _Programs(
                model,
                training,
                statistics,
                shardings,
                check,
                _sharded(model, trainable, non_trainable, first),
            )
        before = [non_trainable[i] for i in positions]
        check(microbatches.count)  # processes may wait for each other in a micro-batch
        microbatches = programs.weighed(microbatches, trainable, non_trainable)
        sums = programs.zeros()
        found = non_trainable  # the values that the next micro-batch begins with
        for microbatch, share, kinds, factors in microbatches:
            sums, moved, metrics, own_logs = programs.add_microbatch(
                kinds,
                sums,
                trainable,
                found,
                metrics,
                optimizer if scales else None,
                microbatch,
                number(share / programs.devices),
                factors,
            )
            non_trainable = _replaced(found, moved)
            found = list(non_trainable)
            for i in rewound:
                found[i] = state[1][i]
        check(microbatches.count)
        sums, metrics = programs.reduce(sums, metrics)
        trainable, optimizer, metrics, logs, after = programs.apply(
            microbatches.divided_last,
            sums,
            number(microbatches.correction()),
            trainable,
            optimizer,
            metrics,
            own_logs,
            microbatches.examples,
            before,
            [non_trainable[i] for i in positions],
        )
        for i, value in zip(positions, after):
            non_trainable[i] = value
        return logs, (trainable, non_trainable, optimizer, metrics)

    return update


class _Programs:
    """The compiled functions that an update consists of.

    Args:
        model: A compiled and built model.
        training: The model's `Training`.
        statistics: The model's `Statistics`.
        state: The shardings of the four lists of values that `fit` keeps, or None.
        check: A function of an update's number of micro-batches, which must be the
            same in all processes.
        replicas: The devices that each work on their part of a micro-batch, or None.
    """

    def __init__(self, model, training, statistics, state, check, replicas):
        accumulation = training.accumulation
        zeros = partial(_zeros, model, accumulation)
        add_microbatch = partial(_add_microbatch, model, statistics)
        measure = partial(_measure, model, statistics)
        apply = partial(_apply, model, accumulation.clipping, statistics)
        reduce = _reduced
        self.devices = 1
        if replicas is not None:
            self.devices = replicas.count
            zeros = partial(each_device.zeros, zeros, model, replicas)
            add_microbatch = partial(
                each_device.add_microbatch, model, add_microbatch, replicas
            )
            measure = partial(each_device.measure, model, measure, replicas)
            reduce = partial(each_device.reduce, model)
        if model.jit_compile and not model.run_eagerly:
            measure = jax.jit(measure)
            sums, after_microbatch, reduced, after_update = _shardings(state, replicas)
            zeros = jax.jit(zeros, out_shardings=sums)
            add_microbatch = jax.jit(
                add_microbatch,
                static_argnums=0,
                donate_argnums=1,
                out_shardings=after_microbatch,
            )
            if replicas is not None:
                reduce = jax.jit(reduce, donate_argnums=0, out_shardings=reduced)
            apply = jax.jit(
                apply,
                static_argnums=0,
                donate_argnums=(3, 4),
                out_shardings=after_update,
            )
        self.zeros, self.add_microbatch, self.apply = zeros, add_microbatch, apply
        self.reduce = reduce if jax.process_count() == 1 else waited_for(reduce)
        self.weighed = normalizers.HostWeights(
            model,
            partial(_measured, measure),
            partial(_variables, model),
            notices=training.notices,
            devices=self.devices,
            check=check,
        )


def _sharded(model, trainable, non_trainable, microbatch):
    """The devices that can compute on their parts of a micro-batch, or None."""
    if model.run_eagerly or not model.jit_compile:
        return None
    replicas = active_replicas(microbatch)
    if replicas is None:
        return None
    if trainer.has_own_metrics(model):  # they would see one device's part
        return None
    if not all(trainer.is_keras_own(kind) for kind in trainer.metric_types(model)):
        return None  # a user's own metric may not add up over devices
    if any(has_layout(f"{layer.path}/output") for layer in trainer.layers_of(model)):
        return None  # a layer's output must be sharded over all devices
    x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch)
    known = {id(v) for layer in normalizations(model) for v in layer.variables}
    unknown: list[keras.Variable] = []

    def run(trainable, non_trainable, x):
        kwargs = {"training": True} if model._call_has_training_arg else {}
        _, after = model.stateless_call(trainable, non_trainable, x, **kwargs)
        unknown.extend(
            variable
            for variable, old, new in zip(
                model.non_trainable_variables, non_trainable, after
            )
            if new is not old
            and id(variable) not in known
            and not trainer.is_seed(variable)
        )
        return ()

    jax.eval_shape(run, trainable, non_trainable, x)
    # A layer's new state may depend on all examples of a micro-batch. XLA then computes
    # it over all devices, and reduces the gradients of every micro-batch.
    return None if unknown else replicas


def _reduced(sums, metrics):
    """The sums and the metrics, which need no reduction."""
    return sums, metrics


def _shardings(state, replicas):
    """The shardings of the programs' results; sums are sharded as their variables."""
    if state is None:
        return None, None, None, None
    trainable, non_trainable, optimizer, metrics = state
    sums: tuple = (trainable, None, None)
    reduced = sums, metrics
    if replicas is not None:
        sums = (
            [replicas.stacked(sharding) for sharding in trainable],
            replicas.stacked(),
            replicas.stacked(),
            [replicas.stacked() for _ in metrics],
        )
    after_microbatch = sums, non_trainable, metrics, None
    return sums, after_microbatch, reduced, (trainable, optimizer, metrics, None, None)


def _zeros(model, accumulation):
    """Zeros for the sums over micro-batches: gradients, losses and denominators."""
    gradients = [
        jnp.zeros(v.shape, trainer.accumulator_dtype(v, accumulation.accum_dtype))
        for v in model.trainable_variables
    ]
    dtype = normalizers.dtype()
    return gradients, jnp.zeros((), dtype), jnp.zeros((), dtype)


def _measure(model, statistics, trainable, non_trainable, data):
    """The denominators of a micro-batch, and the values that it moved.

    Values are None unless the next micro-batch's masks may depend on them.
    Of the forward pass, a compiler keeps only what these and the masks need.
    """
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    with _variables(model, trainable, non_trainable) as scope, statistics.pooling():
        y_pred = trainer.forward(model, x, training=True)
        found = normalizers.measure(model, data, y_pred)
        worth = normalizers.values(found)
    carried = set(map(id, statistics.carried))
    after = [
        scope.get_current_value(v) if id(v) in carried else old
        for v, old in zip(model.non_trainable_variables, non_trainable)
    ]
    return worth, _moved(non_trainable, after)


def _measured(measure, state, microbatch, losses):
    """The denominators and the next state, for `normalizers.HostWeights`."""
    trainable, non_trainable = state
    worth, moved = measure(trainable, non_trainable, microbatch)
    return worth, (trainable, _replaced(non_trainable, moved))


def _moved(before, after):
    """The new values, None for unmoved ones, which a compiled function would copy."""
    return [None if new is old else new for old, new in zip(before, after, strict=True)]


def _replaced(values, moved):
    return [old if new is None else new for old, new in zip(values, moved)]


def _variables(model, trainable, non_trainable, metrics=(), **kwargs):
    """A scope in which the model's variables have these values."""
    mapping = [
        *zip(model.trainable_variables, trainable),
        *zip(model.non_trainable_variables, non_trainable),
        *zip(model.metrics_variables, metrics),
    ]
    return trainer.StatelessScope(state_mapping=mapping, **kwargs)


def _add_microbatch(
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
    """Add a micro-batch's part of the batch's gradient, and its metrics.

    For non-trainable variables that the micro-batch did not move, None is returned: a
    compiled function would copy all frozen weights for every micro-batch.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

    def worth(trainable):
        weigh = None if factors is None else normalizers.Weighing(kinds, factors)
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
        denominator = 0.0 if weigh is None else weigh.denominator
        with _optimizer_variables(model, optimizer):
            scaled = model.optimizer.scale_loss(worth)
        return scaled, (loss, denominator, y_pred, *state)

    with jax.named_scope("accumulate_gradients"):
        gradients, aux = jax.grad(worth, has_aux=True)(trainable)
        loss, denominator, y_pred, after, metrics = aux
        accumulators, total, divisor = sums
        accumulators = [
            _add(accumulator, gradient.astype(accumulator.dtype), variable)
            for accumulator, gradient, variable in zip(
                accumulators, gradients, model.trainable_variables
            )
        ]
    with _variables(model, trainable, after, metrics) as scope:
        own_logs = trainer.update_metrics(
            model,
            (x, y, y_pred, sample_weight),
            loss,
            normalizers.examples(data),
            share,
        )
    metrics = [scope.get_current_value(v) for v in model.metrics_variables]
    total = total + loss.astype(total.dtype) * share
    sums = accumulators, total, divisor + denominator
    return sums, _moved(non_trainable, after), metrics, own_logs


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
    divided_last,
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
    """Hand the finished gradient to the optimizer, once.

    Returns the new values of the variables, the logs of the update, and the new values
    of the statistics, which are `before` and, after the micro-batches, `pooled`.
    """
    accumulators, loss, divisor = sums
    if divided_last:
        correction = normalizers.correction(correction, divisor)
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


def _positions(model, variables):
    """The variables' indices in `model.non_trainable_variables`, if they are in it."""
    found = {id(v): i for i, v in enumerate(model.non_trainable_variables)}
    return [found[id(v)] for v in variables if id(v) in found]


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
