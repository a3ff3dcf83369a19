"""The weights of an update's micro-batches (shares and factors), for a host loop."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from gradient_accumulator import notices
from gradient_accumulator.compat import CompiledModel
from gradient_accumulator.compat.api import keras, ops
from gradient_accumulator.losses import (
    BY_EXAMPLES,
    DIVIDED_LAST,
    NORMALIZED,
    Losses,
    dtype,
    factors,
    inspect,
)
from gradient_accumulator.microbatches import Microbatches, first_input, map_leaves


def no_examples() -> ValueError:
    """The error for an update without examples."""
    return ValueError(
        "An update needs at least one example. Remove micro-batches without examples "
        "from the data. Received: an update of such micro-batches only"
    )


class Weighed:
    """The micro-batches of one update with their weights, for a loop on the host.

    Iteration gives `(microbatch, share, kinds, factors)`; the factors are None if all
    are 1. The sum of the shares is `examples / expected`.

    Args:
        microbatches: Iterable of nested arrays.
        expected: The number of examples by which shares are divided.
        kinds: The compiled losses' kinds.
        factors: A row for each micro-batch, or None.
        totals: As for `HostWeights`.
        devices: As for `HostWeights`.

    Attributes:
        count: The number of micro-batches so far.
        examples: The number of their examples.
    """

    def __init__(
        self, microbatches, expected, kinds=(), factors=None, totals=None, devices=1
    ):
        self.microbatches = microbatches
        self.expected = expected
        self.divided_last = DIVIDED_LAST in kinds
        # No kinds, if all factors are 1.
        self.kinds = () if set(kinds) <= {BY_EXAMPLES} else kinds
        self.factors = factors
        self.totals = totals
        self.devices = devices
        self.count = 0
        self.examples = 0

    def __iter__(self):
        for k, microbatch in enumerate(self.microbatches):
            size = examples(microbatch)
            if size == 0:  # other processes have examples of this update
                continue
            self.count += 1
            self.examples += size
            yield microbatch, size / self.expected, self.kinds, self._row(k, size)

    def _row(self, k, size):
        if self.divided_last:
            # Times the share, this divides the numerator by `expected`.
            shape = (1,) if self.devices == 1 else (self.devices, 1)
            return np.full(shape, self.devices / size, dtype())
        return None if self.factors is None else self.factors[k]

    def correction(self, denominator: Any = None) -> float:
        """The factor for the sums over all micro-batches.

        Args:
            denominator: The sum of the denominators of a `DIVIDED_LAST` loss. If it is
                None, the caller has to divide by this sum.
        """
        numbers = [self.examples, 0.0 if denominator is None else float(denominator)]
        if self.totals is not None:
            numbers = self.totals(numbers)
        examples, found = numbers
        if not examples:
            raise no_examples()
        if not self.divided_last:
            return self.expected / examples
        if denominator is None:
            return self.expected
        return self.expected / found if found else 0.0


class HostWeights:
    """Finds the weights of micro-batches, for a loop on the host.

    Args:
        model: A compiled and built model.
        measure: A function of the model's state, a micro-batch and the model's `Losses`
            that returns `losses.values` and the state for the next micro-batch.
        scope: As for `losses.inspect`, with the model's state as its first arguments.
        notices: The model's `Notices`.
        totals: Function that sums a list of numbers over all processes, which have
            different micro-batches. None if there is one process.
        devices: The number of devices, which each have an equal part of every
            micro-batch. For several devices, denominators and factors have a row for
            each device.
        check: Function of the number of micro-batches, which is called if all
            processes must have equally many.
    """

    def __init__(
        self,
        model,
        measure,
        scope,
        notices,
        totals=None,
        devices=1,
        check=lambda microbatches: None,
    ):
        self.check = check
        self.notices = notices
        self.model = model
        self.devices = devices
        self.measure = measure
        self.scope = scope
        self.totals = totals
        self.even = CompiledModel(model).has_static_inputs
        self.inspected: dict[str, Losses] = {}

    def __call__(self, microbatches: Microbatches, *state) -> Weighed:
        """The micro-batches of one update with their weights.

        They are drawn one by one if no weight depends on later micro-batches.

        Args:
            microbatches: The micro-batches.
            *state: The model's state.
        """
        first = next(microbatches.iterator)
        losses = self._inspect(first, state)
        if microbatches.examples is not None:
            losses.check_cut()
        drawn = chain([first], microbatches.iterator)
        weighed = partial(Weighed, totals=self.totals, devices=self.devices)
        if microbatches.examples is None:
            if losses.one_by_one(self.even):
                expected = max(examples(first), 1) * microbatches.count
                return weighed(drawn, expected, losses.kinds(self.even))
        else:
            even = self.even or self.totals is None
            kinds = losses.kinds(even)
            # A process that trains alone knows the shares.
            shares_known = self.totals is None and set(kinds) <= {BY_EXAMPLES}
            if shares_known or losses.one_by_one(even):
                return weighed(drawn, max(microbatches.examples, 1), kinds)
        return self._all(list(drawn), losses, state)

    def _all(self, microbatches: list, losses: Losses, state: tuple) -> Weighed:
        self.check(len(microbatches))
        sizes = [examples(microbatch) for microbatch in microbatches]
        shapes = {
            str(map_leaves(_inner_shape, microbatch)) for microbatch in microbatches
        }
        # The micro-batches of other processes may have other shapes.
        even = self.even if self.totals else len(shapes) == 1
        kinds = losses.kinds(even)
        denominators, totals = None, None
        if NORMALIZED in kinds:
            denominators = self._denominators(microbatches, sizes, kinds, losses, state)
        expected = sum(sizes)
        if self.totals is not None:
            own = [] if denominators is None else ops.sum(denominators, axis=0)
            expected, *sums = self.totals([expected, *map(float, own)])
            totals = ops.convert_to_tensor(sums, dtype=dtype())
        weighed = partial(
            Weighed, microbatches, expected, totals=self.totals, devices=self.devices
        )
        if set(kinds) <= {BY_EXAMPLES}:
            return weighed()
        # An empty micro-batch gets a share too, but its factors are not used.
        shares = ops.convert_to_tensor([max(s, 1) for s in sizes], dtype()) / expected
        if self.devices == 1:
            return weighed(kinds, list(factors(denominators, shares, kinds, totals)))
        if denominators is not None:
            denominators = ops.reshape(denominators, (-1, len(kinds)))
        shares = ops.repeat(shares / self.devices, self.devices)
        rows = factors(denominators, shares, kinds)
        return weighed(kinds, list(ops.reshape(rows, (-1, self.devices, len(kinds)))))

    def _denominators(self, microbatches, sizes, kinds, losses, state):
        rows = []
        for microbatch, size in zip(microbatches, sizes):
            row = ops.zeros(len(kinds))
            if size:
                # Masks may depend on seeds, so that each micro-batch must have the
                # state in which it will be trained.
                row, state = self.measure(state, microbatch, losses)
            rows.append(row)
        return ops.stack(rows)

    def _inspect(self, microbatch, state):
        # The kinds depend on the arrays' ranks and dtypes, and not on their sizes.
        structure = str(map_leaves(_kind_of_array, microbatch))
        if structure not in self.inspected:
            scope = partial(self.scope, *state)
            with notices.watching(self.model) as seen:
                losses = inspect(self.model, map_leaves(symbolic, microbatch), scope)
            self.notices.tell(self.model, losses.denominators, seen, scope)
            self.inspected[structure] = losses
        return self.inspected[structure]


def symbolic(array) -> keras.KerasTensor:
    """The shape and dtype of an array."""
    return keras.KerasTensor(
        tuple(array.shape), keras.backend.standardize_dtype(array.dtype)
    )


def examples(microbatch) -> int:
    """The number of examples of a micro-batch."""
    return first_input(microbatch).shape[0]


def _kind_of_array(array):
    return len(array.shape), array.dtype


def _inner_shape(array):
    return tuple(array.shape[1:])
