"""The base class of accumulating optimizers: it keeps sums of gradients, and counts.

`GradientAccumulateOptimizer` inherits from it and from the `Optimizer` of Keras 3 or 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from gradient_accumulator import devices, engine
from gradient_accumulator.compat import internals
from gradient_accumulator.compat.api import ops
from gradient_accumulator.optimizer_checks import (
    check_gradients,
    check_variables,
    check_weight,
    names_of,
)
from gradient_accumulator.received import check_of_backend
from gradient_accumulator.statistics import in_reach, taken_back

# Advice for arguments and attributes of version 0.5, and of other optimizers.
ELSEWHERE = {
    name: "give it to the optimizer that is wrapped, as in "
    f"`GradientAccumulateOptimizer(keras.optimizers.Adam({name}=...))`"
    for name in (
        "clipnorm",
        "clipvalue",
        "ema_momentum",
        "ema_overwrite_frequency",
        "global_clipnorm",
        "learning_rate",
        "loss_scale_factor",
        "momentum",
        "use_ema",
        "weight_decay",
    )
} | {
    "lr": "give the optimizer that is wrapped a `learning_rate`",
    "decay": "give the optimizer that is wrapped a schedule as its `learning_rate`, "
    "such as `keras.optimizers.schedules.InverseTimeDecay`; legacy optimizers of Keras "
    "2 take `decay` itself",
    "step": "`iterations` counts updates, and `pending` the micro-batches that wait",
    "gradients": "the optimizer keeps its sums to itself, and `pending` tells how many "
    "micro-batches wait for their update",
}


class _Calls:
    """The facts about an optimizer's calls that are not saved.

    They are in an object of their own, because TensorFlow saves the lists and
    dictionaries among an optimizer's attributes.
    """

    def __init__(self) -> None:
        # The indices of the variables of the current update's calls.
        self.given: list[int] = []
        self.weighed = False  # whether a micro-batch was given a weight
        # For the variables of a compiled call: those that had a gradient in one.
        self.compiled: dict[tuple, set[int]] = {}


class Accumulator:
    """The code of an accumulating optimizer that does not depend on Keras's version.

    A subclass is an optimizer that is built with `_trainable_variables`, and that
    returns their indices by `_get_variable_index`.
    """

    inner_optimizer: Any
    built: Any
    _trainable_variables: list
    _trainable_variables_indices: dict
    _get_variable_index: Callable
    _var_key: Callable
    variables: Any
    build: Callable

    def _set_up(
        self, inner, accum_steps, reduction, accum_dtype, clipping: Any
    ) -> None:
        self.inner_optimizer = inner
        self.accum_steps = accum_steps
        self.reduction = reduction
        self.accum_dtype = accum_dtype
        self._clipping = clipping
        self._engine = engine.new_accumulators()
        self._accumulators: list = []
        # Returns the `LossScaleOptimizer` that wraps this optimizer, or None.
        self._scaler: Callable[[], Any] = lambda: None
        # The number of calls that are handing on the finished sum. Replicas take turns
        # in them, so that a bool would not do.
        self._finishing = 0
        self._calls = _Calls()

    def __repr__(self) -> str:
        kind = type(self).__name__
        if "inner_optimizer" not in self.__dict__:  # its constructor failed
            return f"<{kind}>"
        *outer, inner = [type(each).__name__ for each in chain(self.inner_optimizer)]
        wrapped = "(".join([*outer, inner]) + ")" * len(outer)
        settings = f"optimizer={wrapped}, accum_steps={self.accum_steps}"
        if self.reduction != "MEAN":
            settings += f", reduction={self.reduction}"
        return f"<{kind} {settings}>"

    @property
    def step(self) -> Any:
        raise AttributeError(f"There is no `step`: {ELSEWHERE['step']}.")

    @property
    def gradients(self) -> Any:
        raise AttributeError(f"There are no `gradients`: {ELSEWHERE['gradients']}.")

    def _build_accumulators(self, variables: list) -> None:
        if self._clipping is not None:
            self._clipping.check_excluded(variables)
        if self.accum_steps == 1:
            return
        dtypes = [internals.accumulator_dtype(v, self.accum_dtype) for v in variables]
        self._accumulators = [
            self._engine.accumulator(self, v, dtype)
            for v, dtype in zip(variables, dtypes)
        ]
        dtype = "float64" if "float64" in dtypes else "float32"
        self._count = self._new_counter("pending", ())
        # For each variable, the number of these micro-batches that had its gradient.
        self._received = self._new_counter("received", (len(variables),))
        self._total = self._engine.add_local_variable(
            self, (), dtype=dtype, name="total_weight"
        )
        self._guard = self._engine.guard()

    def _new_counter(self, name: str, shape: tuple) -> Any:
        raise NotImplementedError

    def _scales(self, optimizer: Any) -> Any:
        """Returns the optimizer that scaled the gradients given here, or None."""
        raise NotImplementedError

    def _is_built(self) -> bool:
        return (self._scaler() or self).built

    def flush(self) -> None:
        """Apply the gradients of the micro-batches that wait.

        A mean is over these micro-batches. If none wait, nothing happens. In a custom
        training loop it may be called inside a `tf.function`; in `jax.jit`, call
        `stateless_flush` instead.

        The `AccumBatchNormalization` layers whose `gamma` or `beta` this optimizer
        trains end their update too (except in `stateless_flush`).
        """
        if self._accumulators:
            # Layers come first, so that a skipped update restores their statistics.
            for layer in in_reach(self._trainable_variables):
                self._engine.everywhere(layer.finish_update, self._count)
            everything = tuple(range(len(self._accumulators)))
            self._update_if(1, everything, self._calls.compiled, self._engine.flush)

    def reset(self) -> None:
        """Forget the micro-batches that wait.

        The `AccumBatchNormalization` layers that `flush` finishes forget them too.
        """
        if self._accumulators:
            self._calls.given = []
            self._clear()
            for layer in in_reach(self._trainable_variables):
                layer.reset()

    def _loaded(self) -> None:
        """Set the state that is not saved, after the variables were loaded.

        That is: the variables of the calls, whether weights were given, and the
        statistics that layers have pooled.
        """
        if self._accumulators:
            self._calls.given = []
            self._calls.weighed = True
            for layer in in_reach(self._trainable_variables):
                layer.resume(self.pending / self.accum_steps)

    @property
    def pending(self) -> int:
        """The number of micro-batches that wait for their update.

        During `fit` on JAX the variables do not hold the state: in a callback, call the
        model's `jax_state_sync` first.
        """
        return int(self._engine.read(self._count)) if self._accumulators else 0

    def _accumulate(self, grads, trainable_variables=None, weight=None):
        grads = list(grads)
        if not grads:
            return
        check_weight(weight)
        if trainable_variables is None:
            if not self._is_built():
                raise ValueError(
                    "An optimizer that is not built needs the variables too: give "
                    "`trainable_variables`, or call `build` first. Received: "
                    "trainable_variables=None"
                )
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        check_variables("trainable_variables", variables)
        check_of_backend("grads", grads)
        if not self._is_built():
            check_gradients(grads, variables)
            (self._scaler() or self).build(variables)
        self._check_variables(variables)
        check_gradients(grads, variables)
        if self.accum_steps == 1:
            self._finish(self._weighted(grads, weight), variables)
            return
        factor = self._factor(weight)
        with self._engine.unchanged(self._guard, self._calls.given, self._count):
            pairs, received = self._count_microbatch(grads, variables, weight, factor)
        given = tuple(self._calls.given)
        seen = {given: self._calls.compiled.get(given, set())}
        try:
            self._engine.add_and_update(
                pairs,
                factor,
                lambda: self._update_if(
                    self.accum_steps, given, seen, self._engine.when
                ),
            )
        except BaseException:
            if not self._engine.is_traced(self._count):
                # Take back the micro-batch whose update failed.
                self._count.assign_sub(1)
                self._received.assign_sub(received)
                self._total.assign_sub(ops.cast(factor, self._total.dtype))
            raise

    def _count_microbatch(self, grads, variables, weight, factor):
        """Count a micro-batch.

        Returns:
            Pairs of an accumulator and the gradient to add to it, and for each variable
            whether it had a gradient, as 1 or 0.
        """
        pairs, connected = [], set()
        for gradient, variable in zip(grads, variables):
            if gradient is None:
                continue
            index = self._get_variable_index(variable)
            connected.add(index)
            accumulator = self._accumulators[index]
            if internals.overwrites(variable):
                # The largest value, as in Keras's own accumulation.
                accumulator.assign(ops.maximum(accumulator, gradient))
            else:
                pairs.append((accumulator, gradient))
        if self._engine.is_traced(self._count):
            self._calls.compiled.setdefault(tuple(self._calls.given), set()).update(
                connected
            )
        received = ops.cast(self._among(connected), self._received.dtype)
        self._calls.weighed |= weight is not None
        self._count.assign_add(1)
        self._received.assign_add(received)
        self._total.assign_add(ops.cast(factor, self._total.dtype))
        return pairs, received

    def _among(self, indices):
        """Returns 1 for each variable whose index is in `indices`, and 0 for others."""
        return np.isin(np.arange(len(self._accumulators)), list(indices)).astype("int")

    def _factor(self, weight):
        """Returns the number that a micro-batch's gradient is multiplied by.

        For a mean it has the factor 1 / `accum_steps`. If all micro-batches weigh 1,
        the sum is then the mean, and need not be divided in the end.
        """
        share = 1 / self.accum_steps if self.reduction == "MEAN" else 1.0
        return share if weight is None else ops.cast(weight, self._total.dtype) * share

    def _update_if(self, least, everything, seen, when):
        """Update if as many micro-batches wait as an update needs.

        Args:
            least: The number of micro-batches that an update needs.
            everything: The indices of the variables that it may be for.
            seen: `_Calls.compiled`, or its entry for these variables.
            when: The engine's function `when` or `flush`.
        """
        if self._engine.is_traced(self._count):
            ways = self._ways(everything, seen)
        elif self._engine.read(self._count) >= least:
            ways = [self._known_way(everything)]
        else:
            return
        for given, connected in ways:
            when(
                partial(self._is_due, least, set(everything) - connected),
                partial(self._update, given, connected),
                self._changing,
            )

    def _known_way(self, everything):
        """Returns the variables of the micro-batches that wait.

        Returns:
            The indices of all variables that the calls were for, and the set of those
            that had a gradient.
        """
        connected = set(np.flatnonzero(self._engine.read(self._received)).tolist())
        if self._calls.given and connected <= set(self._calls.given):
            return tuple(self._calls.given), connected
        # `given` is of another call, or of a function that was compiled since.
        return tuple(sorted(connected)) or everything, connected

    def _ways(self, everything, seen):
        """Returns the pairs that `_known_way` may return when a compiled function runs.

        The function cannot know them, because other functions may have added to the
        sums too. The last pair is for all other cases: a variable without gradient gets
        a gradient of 0 in it.
        """
        ways = sorted(seen.items(), key=lambda way: len(way[1]))
        ways = [way for way in ways if set() < way[1] < set(everything)]
        return [*ways, (everything, set(everything))]

    def _is_due(self, least, others):
        """Whether enough micro-batches wait, and none had a gradient of `others`."""
        due = ops.greater_equal(self._count, least)
        if not others:
            return due
        received = self._received * ops.cast(self._among(others), self._received.dtype)
        return ops.logical_and(due, ops.equal(ops.sum(received), 0))

    def _update(self, given, connected):
        """Compute the finished gradient, and apply it."""
        variables = [self._trainable_variables[index] for index in given]
        means = [
            self._accumulators[index]
            for index, variable in zip(given, variables)
            if self.reduction == "MEAN" and not internals.overwrites(variable)
        ]
        total = self._engine.total(self._total, self._calls.weighed)
        with self._engine.divided(means, total) as finished:
            held = [self._accumulators[index] for index in given]
            sums = [finished.get(id(each), each) for each in held]
            gradients = [
                ops.cast(sum_, variable.dtype) if index in connected else None
                for index, sum_, variable in zip(given, sums, variables)
            ]
            self._finish(gradients, variables)
        self._clear()

    def _finish(self, gradients, variables):
        """Hand a finished gradient to the wrapped optimizer, or to one that scales."""
        optimizer = self._scaler() or self.inner_optimizer
        if self._clipping is not None:
            gradients = self._engine.clip(
                self._clipping,
                self._scales(optimizer),
                variables,
                gradients,
            )
        self._finishing += 1
        try:
            with taken_back(optimizer, variables):
                self._engine.apply(
                    optimizer,
                    gradients,
                    variables,
                    self._trainable_variables,
                )
        finally:
            self._finishing -= 1

    def _weighted(self, grads, weight):
        """Returns the finished gradients of an update of one micro-batch."""
        if weight is None:
            return grads
        weight = ops.cast(weight, "float32")
        factor = (
            weight if self.reduction == "SUM" else ops.divide_no_nan(weight, weight)
        )

        def times(gradient):
            gradient = devices.active().dense(gradient)
            product = gradient * ops.cast(factor, gradient.dtype)
            # The mean of no values is NaN, and so is 0 times it.
            return ops.where(factor == 0, ops.zeros_like(product), product)

        return [None if g is None else times(g) for g in grads]

    def _clear(self):
        self._engine.clear(self._accumulators)
        self._count.assign(0)
        self._received.assign(np.zeros(len(self._accumulators), "int32"))
        self._total.assign(0.0)

    def _changing(self) -> list:
        """Returns all variables that an update changes."""
        return [*self._trainable_variables, *(self._scaler() or self).variables]

    def _check_variables(self, variables):
        known = self._trainable_variables_indices
        unknown = [v for v in variables if self._var_key(v) not in known]
        if unknown:
            raise ValueError(
                "The optimizer can only be called for the variables that it was built "
                "with. Make one optimizer for each set of variables. Received: "
                f"unknown variables {names_of(unknown)}"
            )
        if not self._accumulators:
            return
        given = [self._get_variable_index(v) for v in variables]
        changed = self._calls.given not in ([], given)
        if changed and self._engine.read(self._count) != 0:
            before = [self._trainable_variables[index] for index in self._calls.given]
            raise ValueError(
                "The variables changed while micro-batches wait for their update. Call "
                "`flush()` or `reset()` before, and make one optimizer for each "
                "set of variables that is trained in turns. Received: "
                f"{names_of(variables)} after {names_of(before)}"
            )
        self._calls.given = given


def chain(optimizer: Any) -> Iterable:
    """Yields an optimizer, the optimizer that it wraps, and so on."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def check_not_accumulating(optimizer: Any, problem: str) -> None:
    """Raise if an optimizer, or one that it wraps, accumulates gradients."""
    for each in chain(optimizer):
        steps = getattr(each, "gradient_accumulation_steps", None)
        if steps:
            raise ValueError(
                f"{problem} Use an optimizer without `gradient_accumulation_steps`. "
                f"Received: gradient_accumulation_steps={steps}"
            )
        if isinstance(each, Accumulator):
            raise ValueError(
                f"{problem} Use the optimizer that it wraps. Received: {each}"
            )


def accumulating(optimizer: Any) -> Any:
    """Returns the optimizer, or the one that it wraps, that accumulates; or None."""
    return next((o for o in chain(optimizer) if isinstance(o, Accumulator)), None)
