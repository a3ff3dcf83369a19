"""The train function on TensorFlow: it draws an update's data, and runs its graph."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from gradient_accumulator import notices
from gradient_accumulator.compat import CompiledModel, internals
from gradient_accumulator.compat.api import keras
from gradient_accumulator.devices.tensorflow_devices import (
    answering,
    check_in_step,
    in_replica,
    mean,
)
from gradient_accumulator.engine.engine_base import Engine
from gradient_accumulator.engine.tensorflow_microbatches import (
    Checks,
    cut,
    hold,
    is_even,
    signature_of,
    size_of,
    stateless,
    stream,
    symbolic,
    trace_microbatch,
    without_optional,
)
from gradient_accumulator.losses import Losses, inspect
from gradient_accumulator.microbatches import (
    Epoch,
    arrays_of,
    batch_size,
    check_examples,
    checked,
    leaves,
    map_leaves,
    shapes_of,
)
from gradient_accumulator.settings import Accumulation
from gradient_accumulator.statistics import synchronizes, unsynchronized
from gradient_accumulator.update import Update
from gradient_accumulator.weights import no_examples


class TensorFlowFit(Engine):
    """The operations of `fit`."""

    def make_train_function(
        self, model: keras.Model, training: Any
    ) -> Callable[[Iterator], dict]:
        epoch = training.epoch
        updates = _Updates(self, model, training)
        steps = CompiledModel(model).steps_per_execution

        def train_function(iterator):
            logs = None
            for _ in range(steps):
                check_in_step(updates.strategy, epoch.number, epoch.updates, False)
                try:
                    with answering():
                        update = updates.draw(iterator)
                except StopIteration:
                    if logs is None:
                        raise
                    break
                with self.restored(model), answering():
                    logs = update()
                CompiledModel(model).count_update()
            return logs

        return train_function

    def values(self, variables: list) -> list:
        return [internals.native(variable).read_value() for variable in variables]

    def readable_metrics(self, model: keras.Model) -> list:
        # Several replicas would have to sum their metrics first.
        if model.distribute_strategy.num_replicas_in_sync > 1:
            return []
        return super().readable_metrics(model)

    # Workers sum their metrics before and after an epoch, and so wait for each other.

    def after_fit(self, model: keras.Model, epoch: Epoch) -> None:
        check_in_step(model.distribute_strategy, epoch.number, epoch.updates, True)

    def before_epoch(self, model: keras.Model, epoch: Epoch) -> None:
        _check_in_step(model, epoch, at_end=False)

    def metrics_result(
        self, model: keras.Model, epoch: Epoch, own: Callable[[], dict]
    ) -> dict:
        _check_in_step(model, epoch, at_end=True)
        return own()

    def batches(
        self, model: keras.Model, epoch: Epoch, accumulation: Accumulation, adapter: Any
    ) -> tuple[Callable, None]:
        arrays = internals.large_arrays(adapter)
        # Several replicas each get a part of a whole batch.
        one_replica = model.distribute_strategy.num_replicas_in_sync == 1
        if (
            accumulation.microbatch_size is not None
            and arrays is not None
            and one_replica
        ):
            microbatches = _in_microbatches(arrays, accumulation.microbatch_size)
            if microbatches is not None:
                epoch.sizes = arrays.sizes
                return lambda: microbatches, None
        return adapter.get_tf_dataset, None


def waits(model: keras.Model) -> bool:
    """Whether replicas wait for each other in a micro-batch.

    TensorFlow does not allow this in a loop or in a compiled function.
    """
    return model.distribute_strategy.num_replicas_in_sync > 1 and synchronizes(model)


class _Updates:
    """Draws the data of one update after another, and keeps the graphs for them.

    Args:
        engine: The model's engine.
        model: A compiled model.
        training: The model's `Training`.
    """

    def __init__(self, engine: Engine, model: keras.Model, training: Any):
        accumulation: Accumulation = training.accumulation
        self.engine = engine
        self.model = model
        self.accum_steps = accumulation.accum_steps or 1
        self.microbatch_size = accumulation.microbatch_size
        self.accumulation = accumulation
        self.epoch: Epoch = training.epoch
        self.notices = training.notices
        self.strategy = model.distribute_strategy
        self.replicas = self.strategy.num_replicas_in_sync
        self.built = False
        self.inspected: dict[str, Losses] = {}
        self.graphs: dict = {}
        # A weak reference to the last iterator. The next three are about it.
        self.iterator: Callable[[], Any] = lambda: None
        self.spec: Any = None  # the spec of its batches, or None if it is not known
        self.key = ""  # the key of the graphs for such batches
        self.streams = False  # whether a graph draws its micro-batches one by one
        self.unrolled = waits(model)
        self.checks = Checks()

    def draw(self, iterator: Iterator) -> Callable[[], dict]:
        """Returns a function that makes the next update, and returns its logs.

        Raises:
            StopIteration: If the epoch has no more data.
        """
        if iterator is not self.iterator():
            self._look_at(iterator)
        if self.microbatch_size is not None:
            if self.epoch.sizes:
                return self._of_arrays(iterator, self.microbatch_size)
            (batch,) = self.epoch.draw(iterator, 1).iterator
            return self._of_batch(batch, self.microbatch_size)
        if self.streams:
            return self._of_iterator(iterator)
        microbatches = self.epoch.draw(iterator, self.accum_steps)
        return self._of_microbatches(list(microbatches.iterator))

    def _look_at(self, iterator):
        self.iterator = weakref.ref(iterator)
        self.spec = None
        if self.replicas == 1 and isinstance(iterator, tf.data.Iterator):
            spec = keras.tree.map_structure(without_optional, iterator.element_spec)
            if all(leaf.shape.rank is not None for leaf in leaves(spec)):
                self.spec = spec
        self.key = str(self.spec)
        self.streams = self.spec is not None and not self.model.run_eagerly

    def _of_arrays(self, iterator, microbatch_size):
        (first,) = self.epoch.draw(_optionals(iterator), 1).iterator
        size = self.epoch.next_size(iterator)
        count = math.ceil(size / microbatch_size)
        self.epoch.cut(count, size)
        if self._streams(first):
            return lambda: self._stream(first, iterator, count)[0]
        microbatches = itertools.chain([first], _optionals(iterator))
        batch = keras.tree.map_structure(
            _joined,
            *(
                microbatch.get_value()
                for microbatch in itertools.islice(microbatches, count)
            ),
        )
        return self._of_batch(batch, microbatch_size)

    def _of_batch(self, batch, microbatch_size):
        batch = _tensors(batch)
        if any(isinstance(leaf, tf.SparseTensor) for leaf in leaves(batch)):
            raise ValueError(
                "TensorFlow does not cut sparse tensors in micro-batches. Give `fit` "
                "the micro-batches, and say how many make an update with "
                f"`accum_steps`. Received: microbatch_size={microbatch_size} and a "
                "tf.SparseTensor"
            )
        counts = []
        for local in self._locals(batch):
            # A replica may have no examples of an epoch's last batch.
            if self.replicas == 1 or size_of(local):
                batch_size(local)
            size = int(size_of(local))
            counts.append(math.ceil(size / microbatch_size))
            self.epoch.cut(counts[-1], size)
        if self.unrolled:
            _check_even(set(counts))
        self._build(batch)

        def microbatches_of(batch):
            return cut(batch, microbatch_size)

        return lambda: self._run(microbatches_of, (self.spec,), batch)[0]

    def _of_microbatches(self, microbatches):
        microbatches = [_tensors(microbatch) for microbatch in microbatches]
        for microbatch in microbatches:
            for local in self._locals(microbatch):
                checked(local)
        if self.replicas == 1 and not any(
            int(size_of(microbatch)) for microbatch in microbatches
        ):
            raise no_examples()
        self._build(microbatches[0])
        if self.unrolled:
            for microbatch in microbatches:
                _check_even({int(size_of(x) > 0) for x in self._locals(microbatch)})
        # An unrolled graph is for one number of micro-batches.
        count = len(microbatches) if self.unrolled else tf.constant(len(microbatches))
        microbatches += microbatches[-1:] * (self.accum_steps - len(microbatches))
        signature = ((self.spec,) * self.accum_steps, tf.TensorSpec((), tf.int32))

        def hold_all(microbatches, count):
            return hold(microbatches, count, skip_empty=not self.unrolled)

        return lambda: self._run(hold_all, signature, tuple(microbatches), count)[0]

    def _of_iterator(self, iterator):
        check_examples(shapes_of(arrays_of(self.spec)))
        microbatches = self.epoch.draw(_optionals(iterator), self.accum_steps)
        first = next(microbatches.iterator)
        if not self._streams(first):
            others = [microbatch.get_value() for microbatch in microbatches.iterator]
            return self._of_microbatches([first.get_value(), *others])

        def update():
            logs, drawn = self._stream(first, iterator, microbatches.count)
            self.epoch.seen += int(drawn) - 1  # the first one is already counted
            return logs

        return update

    def _streams(self, first):
        """Whether a graph can draw micro-batches: no loss has to know all of them."""
        if self.streams:
            if not self.built:
                self._build(_tensors(first.get_value()))
            losses = self._losses(map_leaves(symbolic, self.spec))
            self.streams = losses.one_by_one(is_even(self.spec))
        return self.streams

    def _stream(self, first, iterator, count):
        """Returns the logs and the number of the micro-batches that a graph drew."""
        element = iterator.element_spec
        signature = (
            tf.OptionalSpec(element),
            tf.data.IteratorSpec(element),
            tf.TensorSpec((), tf.int32),
        )

        def streamed(*data):
            return stream(self.checks, self._ended_early, *data)

        with self.checks.raised():
            return self._run(streamed, signature, first, iterator, tf.constant(count))

    def _ended_early(self, drawn):
        if self.epoch.steps is not None:
            self.epoch.ended_early(self.epoch.seen + int(drawn) - 1)

    def _locals(self, data):
        """The parts of distributed data, one for each replica of this worker."""
        results = self.strategy.experimental_local_results
        count = len(results(leaves(data)[0]))  # other workers have other replicas
        return [
            map_leaves(lambda leaf, k=replica: results(leaf)[k], data)
            for replica in range(count)
        ]

    def _build(self, data):
        if self.built:
            return
        local = self._locals(data)[0]
        with self.strategy.scope():
            if self.model.run_eagerly:
                CompiledModel(self.model).build_from_values(local)
            else:
                CompiledModel(self.model).build(map_leaves(symbolic, local))
        self.built = True

    def _losses(self, example, trace=internals.compute_output_spec):
        structure = str(map_leaves(lambda array: (array.shape, array.dtype), example))
        if structure not in self.inspected:
            # An eager model may have effects in training, which must not happen twice.
            training = not self.model.run_eagerly
            with (
                unsynchronized(self.model),
                notices.watching(self.model, training) as seen,
            ):
                scope = partial(stateless, self.model)
                losses = inspect(self.model, example, scope, trace, training)
            self.notices.tell(self.model, losses.denominators, seen)
            self.inspected[structure] = losses
        return self.inspected[structure]

    def _run(self, microbatches_of: Callable, signature: tuple, *data):
        """Makes an update; returns its logs and the number of its micro-batches."""

        def on_replica(*data):
            microbatches = microbatches_of(*data)
            microbatches.losses = self._losses(
                microbatches.example,
                partial(trace_microbatch, microbatches=microbatches),
            )
            if self.microbatch_size is not None:
                microbatches.losses.check_cut()
            update = Update(self.model, self.accumulation, self.engine)
            return update(microbatches), microbatches.drawn

        def run(*data):
            logs, drawn = self.strategy.run(on_replica, args=data)
            return mean(self.strategy, logs), drawn

        if self.model.run_eagerly:
            return run(*data)
        # With a signature, one trace serves all shapes that the data set may yield.
        key = microbatches_of.__name__, self.key
        if key not in self.graphs:
            self.graphs[key] = tf.function(
                run,
                input_signature=None if self.spec is None else signature_of(signature),
                reduce_retracing=not self.unrolled,
                autograph=False,
            )
        return self.graphs[key](*data)


def _check_even(counts: set[int]) -> None:
    """Raise if waiting replicas have different numbers of micro-batches.

    Args:
        counts: The different numbers of their micro-batches.
    """
    if len(counts) > 1:
        raise ValueError(
            "Replicas that normalize by the examples of all replicas need equally many "
            "micro-batches. Drop a data set's last batch "
            "(`drop_remainder=True`), or use `synchronized=False`. Received: "
            f"{sorted(counts)} micro-batches"
        )


def _optionals(iterator):
    """The batches of a data set, as optionals that a graph can take."""
    while (batch := iterator.get_next_as_optional()).has_value():
        yield batch


def _tensors(batch):
    batch = keras.tree.map_structure(without_optional, batch)
    # `train_on_batch` gives the user's arrays. Values of several replicas are no array.
    return map_leaves(
        lambda leaf: tf.convert_to_tensor(leaf) if hasattr(leaf, "__array__") else leaf,
        batch,
    )


def _joined(*arrays):
    return None if arrays[0] is None else tf.concat(arrays, axis=0)


def _check_in_step(model, epoch, at_end):
    if tf.executing_eagerly() and not in_replica():
        strategy = model.distribute_strategy
        check_in_step(strategy, epoch.number, epoch.updates, at_end)


def _in_microbatches(arrays, microbatch_size):
    """The micro-batches of all batches, in order; None for sparse or ragged arrays."""
    inputs = keras.tree.lists_to_tuples(arrays.sliceable("tensorflow"))
    if not all(isinstance(leaf, (np.ndarray, tf.Tensor)) for leaf in leaves(inputs)):
        return None
    batches = arrays.numbers().get_tf_dataset()

    def in_microbatches(numbers):
        starts = tf.data.Dataset.range(0, tf.size(numbers, tf.int64), microbatch_size)
        return starts.map(lambda start: numbers[start : start + microbatch_size])

    def examples(numbers, inputs):
        return map_leaves(lambda array: tf.gather(array, numbers), inputs)

    microbatches = tf.data.Dataset.zip(
        batches.flat_map(in_microbatches), tf.data.Dataset.from_tensors(inputs).repeat()
    ).map(examples, num_parallel_calls=tf.data.AUTOTUNE)
    return microbatches.with_options(batches.options()).prefetch(tf.data.AUTOTUNE)
