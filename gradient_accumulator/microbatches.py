"""Micro-batches: how one update's data is cut, drawn and checked."""

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
    """The arrays of nested data, without what is None."""
    return [leaf for leaf in keras.tree.flatten(data) if leaf is not None]


def first_input(microbatch: Any) -> Any:
    """The array whose first axis tells a micro-batch's number of examples."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(microbatch)
    return leaves(x)[0]


def map_leaves(function: Callable, data: Any) -> Any:
    """Nested data with `function` applied to every array, None kept."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else function(leaf), data
    )


def arrays_of(batch: Any) -> list:
    """The arrays of a batch that have an entry for each example.

    A sample weight may be one number: the weight of each.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    weights = [weight for weight in leaves(sample_weight) if not is_number(weight)]
    return [*leaves(x), *leaves(y), *weights]


def is_number(leaf: Any) -> bool:
    shape = getattr(leaf, "shape", ())
    return (shape.rank if hasattr(shape, "rank") else len(shape)) == 0


def batch_size(batch: Any) -> int:
    """Number of examples of a batch: see `arrays_of` and `example_count`."""
    return example_count(arrays_of(batch))


def example_count(data: Any) -> int:
    """Number of examples in nested data, which every array must agree on.

    Raises:
        ValueError: If an array has no batch axis, or another number of examples; if
            there are none.
    """
    shapes = shapes_of(data)
    check_examples(shapes)
    return shapes[0][0]


def shapes_of(data: Any) -> list[tuple]:
    return [tuple(leaf.shape) for leaf in leaves(data)]


def check_shapes(shapes: list[tuple]) -> None:
    """Raise unless arrays agree on the number of examples, as far as it is known."""
    if not shapes or () in shapes or len({shape[0] for shape in shapes} - {None}) > 1:
        raise ValueError(
            "Every array of a batch needs the same number of examples in its "
            f"first axis, to train in micro-batches. Received: shapes={shapes}"
        )


def check_examples(shapes: list[tuple]) -> None:
    """Raise unless there are examples, and arrays agree on their number."""
    check_shapes(shapes)
    if shapes[0][0] == 0:
        raise ValueError(
            f"A batch needs at least one example. Received: shapes={shapes}"
        )


def checked(microbatch: Any) -> Any:
    """The same micro-batch, whose arrays would else be broadcast to one another."""
    check_shapes(shapes_of(arrays_of(microbatch)))
    return microbatch


@dataclass(frozen=True)
class Microbatches:
    """The micro-batches of one update, each made when it is asked for.

    Args:
        iterator: Nested arrays.
        count: The number of micro-batches, if the data does not end before.
        examples: The number of examples of all micro-batches together, where that is
            known, and they have one shape but for their own number.
        devices: The number of devices that each have an equal part of every
            micro-batch.
    """

    iterator: Iterator
    count: int
    examples: int | None = None
    devices: int = 1

    @property
    def on_device(self) -> int:
        """The number of examples of a batch that one device has."""
        return (self.examples or 0) // self.devices


def cut(
    data: Any,
    microbatch_size: int,
    take: Callable = lambda array, start, stop: array[start:stop],
    devices: int = 1,
    count: Callable[[Any], int] = batch_size,
) -> Microbatches:
    """The micro-batches of a batch; the last may be smaller.

    Args:
        data: Nested arrays.
        microbatch_size: Number of examples in a micro-batch.
        take: Function of an array and the first and last (exclusive) example.
        devices: The number of devices that each have an equal part of the batch, in
            which `take` counts, and that each take a micro-batch of that size.
        count: Function of the data that returns the number of its examples.
    """

    def microbatch(start, stop):
        return map_leaves(
            lambda array: array if is_number(array) else take(array, start, stop), data
        )

    return microbatches_of(count(data), microbatch_size, microbatch, devices)


def microbatches_of(
    examples: int, microbatch_size: int, microbatch: Callable, devices: int = 1
) -> Microbatches:
    """The micro-batches of a batch that need not be there as a whole.

    Args:
        examples: Number of examples in the batch.
        microbatch_size: Number of examples in a micro-batch.
        microbatch: Function of the first and last (exclusive) example of a micro-batch.
        devices: As for `cut`.
    """
    size = examples // devices
    starts = range(0, size, microbatch_size)
    microbatches = (
        microbatch(start, min(start + microbatch_size, size)) for start in starts
    )
    return Microbatches(microbatches, len(starts), examples, devices)


def not_empty(generator: Iterator) -> Iterator:
    """A generator that gives the same, of which the first was drawn.

    Raises:
        ValueError: If there is none.
    """

    def restored(first):
        yield first
        yield from generator

    for first in generator:
        return restored(first)
    raise no_data()


def no_data() -> ValueError:
    return ValueError(
        "The data given to `fit` is empty: there is nothing to train on. "
        "Received: 0 batches"
    )


class Epoch:
    """Where `fit` stands in its epoch, so that no update crosses the epoch's end.

    Args:
        steps: `steps_per_epoch` as the user gave it to `fit`, or None.
    """

    def __init__(self, steps: int | None = None):
        self.restart(steps)

    @contextmanager
    def of_call(self, *arguments: Any, **named: Any) -> Iterator[None]:
        """Around a call of `fit` or `train_on_batch`: `restart`, and back in the end.

        A callback of one call may make another.
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
            fitting: Whether it is a call of `fit`.
            sized: Whether data that is too little for `steps_per_epoch` is trained on,
                with a warning, as Keras does where data tells its length.
        """
        self.steps = steps
        self.sized = sized
        # Of batches whose micro-batches are drawn, one after the other:
        self.sizes: list[int] = []
        # How many of them each iterator has given.
        self.drawn: Any = weakref.WeakKeyDictionary()
        self.fitting = fitting
        self.evaluating = False
        self.updates = 0
        # Of the batches that were cut: the most micro-batches of one, and examples on
        # a device.
        self.most_microbatches = 0
        self.most_examples = 0
        self.begin()

    def begin(self, length: int | None = None, number: int = 0) -> None:
        """Begin an epoch of it.

        Args:
            length: The number of batches in an epoch, as far as Keras knows it.
            number: Which epoch of the training it is.
        """
        self.number = number
        self.length = self.steps if length is None else length
        self.seen = 0

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around what evaluates in between."""
        before, self.evaluating = self.evaluating, True
        try:
            yield
        finally:
            self.evaluating = before

    def next_size(self, iterator: Iterator) -> int:
        """The number of examples in the next batch whose micro-batches are drawn."""
        number = self.drawn.get(iterator, 0)
        self.drawn[iterator] = number + 1
        return self.sizes[number]

    def cut(self, microbatches: int, examples: int) -> None:
        """Take note of a batch that was cut.

        Args:
            microbatches: In how many.
            examples: How many examples it has, on one device.
        """
        self.most_microbatches = max(self.most_microbatches, microbatches)
        self.most_examples = max(self.most_examples, examples)

    def left(self, count: int) -> int:
        """`count`, or what is left of the epoch if that is less."""
        return count if self.length is None else min(count, self.length - self.seen)

    def draw(self, iterator: Iterator, count: int) -> Microbatches:
        """The next `count` batches, or as many as are left in the epoch.

        The first one is drawn at once, each other when it is asked for.

        Raises:
            StopIteration: If nothing is left, which ends Keras's epoch.
            ValueError: If there never was anything; later, if data that does not tell
                its length ends in the middle of an update although `steps_per_epoch`
                asks for more.
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
        if not self.updates:
            raise no_data()

    def check_complete(self) -> None:
        if self.steps is not None and self.seen < self.steps:
            self.ended_early(self.seen)

    def ended_early(self, seen: int) -> None:
        if self.sized:
            # Keras does only where an update would begin.
            warnings.warn(
                "The data ended in the middle of an update, which took the "
                "micro-batches that there were: `steps_per_epoch` asks for "
                f"{self.steps} batches, and {seen} were left.",
                stacklevel=2,
            )
            return
        raise ValueError(
            "The data ended before `steps_per_epoch` batches were drawn, and the last "
            "update was not applied if it lacked micro-batches. Give more data, or a "
            f"smaller `steps_per_epoch`. Received: steps_per_epoch={self.steps}, "
            f"{seen} batches"
        )
