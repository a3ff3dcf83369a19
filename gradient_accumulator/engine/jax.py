"""An update on JAX: a host loop over one jitted function that adds a micro-batch.

The loop is not a `jax.lax.scan`, because on CPUs XLA runs convolutions in a loop many
times slower. A loop on the host also takes micro-batches of different shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import keras

from gradient_accumulator import losses
from gradient_accumulator.compat import CompiledModel, OptimizerStep, internals
from gradient_accumulator.devices.jax_devices import (
    Replicas,
    active_replicas,
    has_layout,
    state_shardings,
    waited_for,
)
from gradient_accumulator.engine import jax_sharded
from gradient_accumulator.engine.engine_base import Carry, Steps
from gradient_accumulator.engine.jax_fit import JaxFit, State
from gradient_accumulator.engine.jax_functional import value_and_grad
from gradient_accumulator.functional import LossFunction
from gradient_accumulator.statistics import normalizations
from gradient_accumulator.update import Update
from gradient_accumulator.weights import HostWeights


class JaxEngine(JaxFit):
    """An update whose functions take the values of variables, and return new ones."""

    def prepare(self, update: Update) -> None:
        model = update.model
        self._shardings = state_shardings(model)  # variables still have their values
        self._places = {id(v): i for i, v in enumerate(model.non_trainable_variables)}
        # Only loss scaling reads the optimizer's variables in a micro-batch.
        self._scales_loss = OptimizerStep(model.optimizer).scales_loss
        # JAX dispatches its own arrays faster than NumPy's.
        self._number = lru_cache(maxsize=4)(partial(jnp.asarray, dtype=losses.dtype()))
        self._compiles = model.jit_compile and not model.run_eagerly
        self._replicas: Replicas | None = None
        self._reduce: Callable = _unreduced
        self.weights: HostWeights | None = None

    def weigh(self, update: Update, microbatches: Any) -> Any:
        if self.weights is None:
            first = next(microbatches.iterator)
            microbatches = replace(
                microbatches, iterator=chain([first], microbatches.iterator)
            )
            self._replicas = self._replicas_of(update.model, first)
            measure = partial(_measure, update)
            if self._replicas is not None:
                measure = partial(
                    jax_sharded.measure, update.model, measure, self._replicas
                )
            if self._compiles:
                measure = jax.jit(measure)
            self.weights = HostWeights(
                update.model,
                partial(_measured, measure),
                partial(_scope, update.model),
                notices=update.notices,
                devices=self._device_count,
                check=self.check_in_step,
            )
        # Processes may wait for each other in a micro-batch.
        self.check_in_step(microbatches.count)
        return self.weights(
            microbatches, self.state.trainable, self.state.non_trainable
        )

    @property
    def _device_count(self):
        return 1 if self._replicas is None else self._replicas.count

    def steps(self, update: Update) -> Steps:
        model = update.model
        zeros: Callable = update.zeros
        add: Callable = partial(_add, update)
        finish: Callable = partial(_finish, update)
        reduce: Callable = _unreduced
        if self._replicas is not None:
            zeros = partial(jax_sharded.zeros, zeros, model, self._replicas)
            add = partial(jax_sharded.add, model, add, self._replicas)
            reduce = partial(jax_sharded.reduce, model)
        if self._compiles:
            of_sums, of_microbatch, of_reduced, of_update = _out_shardings(
                self._shardings, self._replicas
            )
            zeros = jax.jit(zeros, out_shardings=of_sums)
            add = jax.jit(
                add,
                static_argnums=2,  # the kinds of losses
                donate_argnums=0,  # the carry
                out_shardings=of_microbatch,
            )
            if self._replicas is not None:
                reduce = jax.jit(reduce, donate_argnums=0, out_shardings=of_reduced)
            finish = jax.jit(
                finish,
                static_argnums=0,  # whether a loss is divided last
                donate_argnums=3,  # trainable variables and the optimizer's
                out_shardings=of_update,
            )
        self._reduce = reduce if jax.process_count() == 1 else waited_for(reduce)
        places = [self._places[id(v)] for v in update.statistics.variables]
        return Steps(
            zeros,
            partial(self._add_to_state, add),
            update.apply,
            partial(self._finish_state, finish, places),
        )

    def _add_to_state(self, add, carry, kinds, data, share, factors):
        trainable, non_trainable, optimizer, metrics = self.state
        if carry.logs:
            carry = carry._replace(logs={})
        used = State(
            trainable,
            non_trainable,
            optimizer if self._scales_loss else None,
            metrics,
        )
        carry, moved, new_metrics = add(carry, used, kinds, data, share, factors)
        self.state = State(
            trainable,
            _replaced(non_trainable, moved),
            optimizer,
            metrics if new_metrics is None else new_metrics,
        )
        return carry

    def _finish_state(self, finish, places, divided_last, carry, *numbers_and_kept):
        trainable, non_trainable, optimizer, metrics = self.state
        (trainable, optimizer), (metrics, moved), logs = finish(
            divided_last,
            carry,
            numbers_and_kept,
            (trainable, optimizer),
            (metrics, [non_trainable[i] for i in places]),
        )
        non_trainable = list(non_trainable)
        for i, value in zip(places, moved):
            non_trainable[i] = value
        self.state = State(trainable, non_trainable, optimizer, metrics)
        return logs

    def fold(self, step: Callable[..., Carry], carry: Carry, weighed: Any) -> Carry:
        devices = self._device_count
        for microbatch, share, kinds, factors in weighed:
            share = self._number(share / devices)
            carry = step(carry, kinds, microbatch, share, factors)
        self.check_in_step(weighed.count)
        return carry

    def forward(self, model: keras.Model, x: Any) -> tuple[Any, list]:
        # This is the call that Keras's own trainer on JAX makes.
        values = [
            [variable.value for variable in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        ]
        with CompiledModel(model).summed_activity_losses():
            y_pred, moved, additional = _in_training(
                model, *values, x, return_losses=True
            )
        scope = internals.get_stateless_scope()
        for variable, value in zip(model.non_trainable_variables, moved):
            scope.add_update((variable, value))
        return y_pred, additional

    def value_and_grad(
        self, function: Callable[[Any], tuple], variables: list
    ) -> tuple[list, Any]:
        if not variables:
            return [], function(variables)[1]
        if not isinstance(variables[0], keras.Variable):
            return jax.grad(function, has_aux=True)(variables)
        outer = internals.get_stateless_scope()
        moved: list[int] = []

        def of_values(values):
            scope = internals.StatelessScope(state_mapping=list(zip(variables, values)))
            before = {**outer.state_mapping, **scope.state_mapping}
            scope.state_mapping.update(before)
            with scope:
                loss, aux = function(variables)
            moved.extend(
                key
                for key, value in scope.state_mapping.items()
                if value is not before.get(key)
            )
            return loss, (aux, [scope.state_mapping[key] for key in moved])

        values = [variable.value for variable in variables]
        gradients, (aux, after) = jax.grad(of_values, has_aux=True)(values)
        outer.state_mapping.update(zip(moved, after))
        return gradients, aux

    def values(self, variables: list) -> list:
        places = [self._places.get(id(variable)) for variable in variables]
        values = self.state.non_trainable
        return [None if place is None else values[place] for place in places]

    def assign(self, variables: list, values: list) -> None:
        if not variables:
            return
        non_trainable = list(self.state.non_trainable)
        for variable, value in zip(variables, values):
            # A value of None is of a trainable variable: no forward pass moves it.
            if value is not None:
                non_trainable[self._places[id(variable)]] = value
        self.state = self.state._replace(non_trainable=non_trainable)

    def total(
        self, update: Update, carry: Carry, weighed: Any
    ) -> tuple[Carry, Any, bool]:
        carry, metrics = self._reduce(carry, self.state.metrics)
        self.state = self.state._replace(metrics=metrics)
        return carry, self._number(weighed.correction()), weighed.divided_last

    def step(self, optimizer: Any, gradients: list, variables: list) -> None:
        # Loss scaling has a branch, and in JAX a branch cannot assign variables.
        with jax.named_scope("apply_gradients"):
            values, state = optimizer.stateless_apply(
                [variable.value for variable in optimizer.variables],
                gradients,
                [variable.value for variable in variables],
            )
        scope = internals.get_stateless_scope()
        for variable, value in zip(
            [*variables, *optimizer.variables], [*values, *state]
        ):
            scope.add_update((variable, value))

    def accumulated(self, loss: LossFunction) -> Callable:
        return value_and_grad(self, loss)

    def _replicas_of(self, model, microbatch):
        """The devices that can compute on their parts of a micro-batch, or None."""
        if not self._compiles:
            return None
        replicas = active_replicas(microbatch)
        if replicas is None:
            return None
        if CompiledModel(model).has_own_metrics:
            return None  # they would see only one device's part
        if not all(
            internals.is_keras_own(kind) for kind in CompiledModel(model).metric_types
        ):
            return None  # a user's own metric may not add up over devices
        if any(
            has_layout(f"{layer.path}/output") for layer in CompiledModel(model).layers
        ):
            return None  # a layer's output must be sharded over all devices
        x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch)
        known = {id(v) for layer in normalizations(model) for v in layer.variables}
        unknown: list[keras.Variable] = []

        def run(trainable, non_trainable, x):
            _, after = _in_training(model, trainable, non_trainable, x)
            unknown.extend(
                variable
                for variable, old, new in zip(
                    model.non_trainable_variables, non_trainable, after
                )
                if new is not old
                and id(variable) not in known
                and not internals.is_seed(variable)
            )
            return ()

        state = self.state
        jax.eval_shape(run, state.trainable, state.non_trainable, x)
        # A layer's new state may depend on all examples of a micro-batch. XLA then
        # computes it over all devices, and reduces the gradients of every micro-batch.
        return None if unknown else replicas


def _in_training(model, *values_and_x, **settings):
    """`stateless_call` in training, for models with and without that argument."""
    if model._call_has_training_arg:
        settings["training"] = True
    return model.stateless_call(*values_and_x, **settings)


def _unreduced(carry, metrics):
    """Returns the carry and the metrics as they are: one device needs no reduction."""
    return carry, metrics


def _out_shardings(state, replicas):
    """The shardings of the programs' results: sums are sharded as their variables."""
    if state is None:
        return None, None, None, None
    trainable, non_trainable, optimizer, metrics = state
    sums = Carry(trainable, None, None, None)
    reduced = sums, metrics
    if replicas is not None:
        stacks = [replicas.stacked(sharding) for sharding in trainable]
        stack = replicas.stacked()
        sums = Carry((stacks, [stack for _ in metrics]), stack, stack, None)
        metrics = None
    return (
        sums,
        (sums, non_trainable, metrics),
        reduced,
        ((trainable, optimizer), (state[3], None), None),
    )


def _measure(update, trainable, non_trainable, data):
    """The denominators of a micro-batch, and new values of non-trainable variables.

    A value is None unless the masks of the next micro-batch may depend on it.
    """
    with _scope(update.model, trainable, non_trainable) as scope:
        denominators = update.denominators(data)
    carried = set(map(id, update.statistics.carried))
    after = [
        scope.get_current_value(v) if id(v) in carried else old
        for v, old in zip(update.model.non_trainable_variables, non_trainable)
    ]
    return denominators, _moved(non_trainable, after)


def _measured(measure, state, microbatch, losses):
    """The denominators and the next state, for `HostWeights`."""
    trainable, non_trainable = state
    denominators, moved = measure(trainable, non_trainable, microbatch)
    return denominators, (trainable, _replaced(non_trainable, moved))


def _add(update, carry, state, kinds, data, share, factors):
    """`Update.add` as a function of the variables' values.

    It returns None for non-trainable variables that the micro-batch did not move.
    Otherwise a compiled function would copy all frozen weights in every micro-batch.
    """
    model = update.model
    with (
        _scope(model, *state) as scope,
        jax.named_scope("accumulate_gradients"),
    ):
        carry = update.add(carry, kinds, data, share, factors)
    after, metrics = (
        [scope.get_current_value(v) for v in variables]
        for variables in (model.non_trainable_variables, model.metrics_variables)
    )
    return carry, _moved(state.non_trainable, after), metrics


def _finish(update, divided_last, carry, numbers_and_kept, donated, others):
    """`Update.finish` as a function of the variables' values.

    Args:
        update: The update.
        divided_last, carry, numbers_and_kept: The arguments of `Update.finish`.
        donated: The values of trainable variables, and of the optimizer's variables.
        others: The values of metrics, and of statistics.

    Returns:
        The new values of `donated` and of `others`, and the logs.
    """
    model, statistics = update.model, update.statistics.variables
    trainable, optimizer = donated
    metrics, pooled = others
    with _scope(model, trainable, (), optimizer, metrics) as scope:
        for pair in zip(statistics, pooled):
            scope.add_update(pair)
        logs = update.finish(divided_last, carry, *numbers_and_kept)
    trainable, optimizer, metrics, pooled = (
        [scope.get_current_value(v) for v in variables]
        for variables in (
            model.trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
            statistics,
        )
    )
    # In the order of the arguments, so that each donated buffer gets its own new value:
    # XLA would copy values of one shape that change places.
    return (trainable, optimizer), (metrics, pooled), logs


def _scope(model, trainable, non_trainable, optimizer=None, metrics=(), **settings):
    """A scope in which the model's variables have these values."""
    mapping = [
        *zip(model.trainable_variables, trainable),
        *zip(model.non_trainable_variables, non_trainable),
        *zip(model.metrics_variables, metrics),
    ]
    if optimizer is not None:
        mapping += zip(model.optimizer.variables, optimizer)
    return internals.StatelessScope(state_mapping=mapping, **settings)


def _moved(before, after):
    """The new values, with None for those that are unchanged."""
    return [None if new is old else new for old, new in zip(before, after, strict=True)]


def _replaced(values, moved):
    return [old if new is None else new for old, new in zip(values, moved)]


ENGINE = JaxEngine
