"""Functions that cut, draw and check the micro-batches of an update."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gradient_accumulator.compat.api import keras


def leaves(data: Any) -> list:
    """Returns the arrays of nested data, without None."""
    return [leaf for leaf in keras.tree.flatten(data) if leaf is not None]


def first_input(microbatch: Any) -> Any:
    """Returns the array whose first axis is a micro-batch's number of examples."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch)
    return leaves(x)[0]


def map_leaves(function: Callable, data: Any) -> Any:
    """Returns nested data with `function` applied to every array, and None kept."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else function(leaf), data
    )


def arrays_of(batch: Any) -> list:
    """Returns the arrays of a batch that have an entry for each example.

    A sample weight that is one number, for all examples, is left out.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    weights = [weight for weight in leaves(sample_weight) if not is_number(weight)]
    return [*leaves(x), *leaves(y), *weights]


def is_number(leaf: Any) -> bool:
    """Whether an array or a number has no axes."""
    shape = getattr(leaf, "shape", ())
    return (shape.rank if hasattr(shape, "rank") else len(shape)) == 0


def batch_size(batch: Any) -> int:
    """Returns the number of examples of a batch, checked as in `example_count`."""
    return example_count(arrays_of(batch))


def example_count(data: Any) -> int:
    """Returns the number of examples in nested data.

    Raises:
        ValueError: If an array has no axes, arrays have different numbers of examples,
            or there are no examples.
    """
    shapes = shapes_of(data)
    check_examples(shapes)
    return shapes[0][0]


def shapes_of(data: Any) -> list[tuple]:
    """Returns the shapes of the arrays of nested data."""
    return [tuple(leaf.shape) for leaf in leaves(data)]


def check_shapes(shapes: list[tuple]) -> None:
    """Raise if arrays have different numbers of examples, as far as those are known."""
    if not shapes or () in shapes or len({shape[0] for shape in shapes} - {None}) > 1:
        raise ValueError(
            "Every array of a batch needs the same number of examples in its "
            f"first axis, to train in micro-batches. Received: shapes={shapes}"
        )


def check_examples(shapes: list[tuple]) -> None:
    """Raise unless all arrays have the same number of examples, and at least one."""
    check_shapes(shapes)
    if shapes[0][0] == 0:
        raise ValueError(
            f"A batch needs at least one example. Received: shapes={shapes}"
        )


def checked(microbatch: Any) -> Any:
    """Returns a micro-batch unchanged, after `check_shapes`.

    Arrays of one example would be broadcast to arrays of several.
    """
    check_shapes(shapes_of(arrays_of(microbatch)))
    return microbatch


@dataclass(frozen=True)
class Microbatches:
    """The micro-batches of one update, each made when it is drawn.

    Args:
        iterator: Iterator over the micro-batches, which are nested arrays.
        count: The number of micro-batches; there are fewer if the data ends early.
        examples: The number of examples in all micro-batches, if it is known and the
            micro-batches differ in shape only by their numbers of examples; else None.
        devices: The number of devices, each of which has an equal share of every
            micro-batch.
    """

    iterator: Iterator
    count: int
    examples: int | None = None
    devices: int = 1

    @property
    def on_device(self) -> int:
        """The number of examples of the batch that are on one device."""
        return (self.examples or 0) // self.devices


def cut(
    data: Any,
    microbatch_size: int,
    take: Callable = lambda array, start, stop: array[start:stop],
    devices: int = 1,
    count: Callable[[Any], int] = batch_size,
) -> Microbatches:
    """Cut a batch into micro-batches, of which the last may be smaller.

    Args:
        data: Nested arrays.
        microbatch_size: Number of examples in a micro-batch, on each device.
        take: Function of an array and of the first and last (exclusive) example, which
            returns these examples. It counts examples within a device's share.
        devices: The number of devices, each of which has an equal share of the batch.
        count: Function of the data that returns the number of its examples.

    Returns:
        The `Microbatches`.
    """

    def microbatch(start, stop):
        return map_leaves(
            lambda array: array if is_number(array) else take(array, start, stop), data
        )

    return microbatches_of(count(data), microbatch_size, microbatch, devices)


def microbatches_of(
    examples: int, microbatch_size: int, microbatch: Callable, devices: int = 1
) -> Microbatches:
    """Returns the micro-batches of a batch that is not in memory.

    Args:
        examples: Number of examples in the batch.
        microbatch_size: Number of examples in a micro-batch, on each device.
        microbatch: Function of the first and last (exclusive) example that returns a
            micro-batch.
        devices: As for `cut`.
    """
    size = examples // devices
    starts = range(0, size, microbatch_size)
    microbatches = (
        microbatch(start, min(start + microbatch_size, size)) for start in starts
    )
    return Microbatches(microbatches, len(starts), examples, devices)


def not_empty(generator: Iterator) -> Iterator:
    """Returns a generator over the same items, after it drew the first of them.

    Raises:
        ValueError: If there are no items.
    """

    def restored(first):
        yield first
        yield from generator

    for first in generator:
        return restored(first)
    raise no_data()


def no_data() -> ValueError:
    """Returns the error for data without batches."""
    return ValueError(
        "The data given to `fit` is empty: there is nothing to train on. "
        "Received: 0 batches"
    )


class Epoch:
    """The position of `fit` in its epoch, so that no update crosses the epoch's end.

    Args:
        steps: `steps_per_epoch` as the user gave it to `fit`, or None.
    """

    def __init__(self, steps: int | None = None):
        self.restart(steps)

    @contextmanager
    def of_call(self, *arguments: Any, **named: Any) -> Iterator[None]:
        """A context of a call of `fit` or `train_on_batch`.

        It begins with `restart`, and restores the outer call's position in the end:
        callbacks of `fit` may train the model.

        Args:
            *arguments: Arguments of `restart`.
            **named: Arguments of `restart`.
        """
        before = dict(vars(self))
        self.restart(*arguments, **named)
        try:
            yield
        finally:
            vars(self).update(before)

    def restart(
        self, steps: int | None = None, fitting: bool = False, sized: bool = False
    ) -> None:
        """Begin a call of `fit`, or of `train_on_batch`.

        Args:
            steps: `steps_per_epoch` as the user gave it to `fit`, or None.
            fitting: Whether the call is one of `fit`.
            sized: Whether the length of the data is known. Data that ends before
                `steps_per_epoch` then causes a warning, as in Keras, and else an error.
        """
        self.steps = steps
        self.sized = sized
        # The number of examples in each batch of an epoch, if micro-batches are drawn
        # from arrays.
        self.sizes: list[int] = []
        # The number of these batches that each iterator has drawn.
        self.drawn: Any = weakref.WeakKeyDictionary()
        self.fitting = fitting
        self.evaluating = False
        self.updates = 0
        # The most micro-batches of a batch that was cut, and its most examples on a
        # device.
        self.most_microbatches = 0
        self.most_examples = 0
        self.begin()

    def begin(self, length: int | None = None, number: int = 0) -> None:
        """Begin an epoch of the call.

        Args:
            length: The number of batches in an epoch; None if it is not known.
            number: The epoch's number.
        """
        self.number = number
        self.length = self.steps if length is None else length
        self.seen = 0

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A context of a call of `evaluate` within `fit`."""
        before, self.evaluating = self.evaluating, True
        try:
            yield
        finally:
            self.evaluating = before

    def next_size(self, iterator: Iterator) -> int:
        """Returns the number of examples in an iterator's next batch, and counts it."""
        number = self.drawn.get(iterator, 0)
        self.drawn[iterator] = number + 1
        return self.sizes[number]

    def cut(self, microbatches: int, examples: int) -> None:
        """Record that a batch was cut.

        Args:
            microbatches: The number of its micro-batches.
            examples: The number of its examples on one device.
        """
        self.most_microbatches = max(self.most_microbatches, microbatches)
        self.most_examples = max(self.most_examples, examples)

    def left(self, count: int) -> int:
        """Returns `count`, or the number of batches left in the epoch if it is less."""
        return count if self.length is None else min(count, self.length - self.seen)

    def draw(self, iterator: Iterator, count: int) -> Microbatches:
        """Draw the next `count` batches, or as many as are left in the epoch.

        The first batch is drawn at once, and the others one by one later.

        Raises:
            StopIteration: If no batch is left, which ends Keras's epoch.
            ValueError: If the data has no batches at all. Later, if the data ends in
                the middle of an update before `steps_per_epoch` and has no known
                length.
        """
        count = self.left(count)
        batches = itertools.islice(iterator, count)
        first = list(itertools.islice(batches, 1))
        if not first:
            self.check_not_empty()
            raise StopIteration
        self.updates += 1
        counted = self._counted(itertools.chain(first, batches), count)
        return Microbatches(counted, count)

    def _counted(self, batches: Iterator, asked: int) -> Iterator:
        for batch in batches:
            asked -= 1
            self.seen += 1
            yield batch
        if asked and self.steps is not None:
            self.ended_early(self.seen)

    def check_not_empty(self) -> None:
        """Raise if the data had no batches."""
        if not self.updates:
            raise no_data()

    def check_complete(self) -> None:
        """Warn or raise if the epoch has fewer batches than `steps_per_epoch`."""
        if self.steps is not None and self.seen < self.steps:
            self.ended_early(self.seen)

    def ended_early(self, seen: int) -> None:
        """Warn if the length of the data is known, else raise.

        Args:
            seen: The number of batches of the epoch.
        """
        if self.sized:
            # Keras itself warns only if the data ends between two updates.
            warnings.warn(
                "The data ended in the middle of an update, which took fewer "
                "micro-batches than usual: `steps_per_epoch` asks for "
                f"{self.steps} batches, and the data has {seen}.",
                stacklevel=2,
            )
            return
        raise ValueError(
            "The data ended before `steps_per_epoch` batches were drawn, and the last "
            "update was not applied if it lacked micro-batches. Give more data, or a "
            f"smaller `steps_per_epoch`. Received: steps_per_epoch={self.steps}, "
            f"{seen} batches"
        )
