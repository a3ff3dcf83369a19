"""Training in pieces on TensorFlow: an update is one graph around a `tf.while_loop`.

A loop, not an unrolled graph: TensorFlow would run unrolled pieces side by side and
hold the activations of all of them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import reduce_per_replica

from gradient_accumulator import normalizers
from gradient_accumulator.backend import trainer
from gradient_accumulator.pieces import (
    Accumulation,
    Epoch,
    example_count,
    first_input,
    leaves,
    map_leaves,
)

KERAS_DRAWS_TO_BUILD = False  # whether `fit` builds the model from a batch of its data


def make_train_function(
    model: keras.Model, accumulation: Accumulation, epoch: Epoch
) -> Callable[[Iterator], dict]:
    """The function that `fit` calls with its iterator, for one update or several."""
    updates = _Updates(model, accumulation, epoch)
    steps_per_execution = model.steps_per_execution

    def train_function(iterator):
        logs = None
        for _ in range(steps_per_execution):
            try:
                update = updates.draw(iterator)
            except StopIteration:
                if logs is None:
                    raise
                break
            state = model.non_trainable_variables
            before = [variable.value.read_value() for variable in state]
            try:
                logs = update()
            except BaseException:
                # The pieces before the failing one moved seeds and statistics.
                for variable, value in zip(state, before):
                    variable.assign(value)
                raise
        return logs

    return train_function


class _Updates:
    """Draws what one update after the other begins with, and has the graphs for them.

    Args:
        model: A compiled model.
        accumulation: How it accumulates.
        epoch: Where `fit` stands.
    """

    def __init__(self, model: keras.Model, accumulation: Accumulation, epoch: Epoch):
        self.model = model
        self.accum_steps = accumulation.accum_steps or 1
        self.microbatch_size = accumulation.microbatch_size
        self.accum_dtype = accumulation.accum_dtype
        self.epoch = epoch
        self.strategy = model.distribute_strategy
        self.replicas = self.strategy.num_replicas_in_sync
        self.built = False
        self.inspected: dict[str, normalizers.Losses] = {}
        self.graphs: dict = {}
        # Of the iterator that was seen last, which is held weakly:
        self.iterator: Callable[[], Any] = lambda: None
        self.spec: Any = None  # what its batches are, or None
        self.key = ""  # of the graphs for such batches
        self.streams = False  # whether a graph draws its pieces, one by one

    def draw(self, iterator: Iterator) -> Callable[[], dict]:
        """What makes the next update.

        Raises:
            StopIteration: If nothing is left of the epoch.
        """
        if iterator is not self.iterator():
            self._look_at(iterator)
        if self.microbatch_size is not None:
            (batch,) = self.epoch.draw(iterator, 1).iterator
            return self._of_batch(batch, self.microbatch_size)
        if self.streams:
            return self._of_iterator(iterator)
        pieces = self.epoch.draw(iterator, self.accum_steps)
        return self._of_pieces(list(pieces.iterator))

    def _look_at(self, iterator):
        self.iterator = weakref.ref(iterator)
        self.spec = None
        if self.replicas == 1 and isinstance(iterator, tf.data.Iterator):
            spec = keras.tree.map_structure(_without_optional, iterator.element_spec)
            if all(leaf.shape.rank is not None for leaf in leaves(spec)):
                self.spec = spec
        self.key = str(self.spec)
        self.streams = (
            self.spec is not None
            and not self.model.run_eagerly
            # If the data ends before, an update that lacks pieces is not applied.
            and self.epoch.steps is None
        )

    def _of_batch(self, batch, microbatch_size):
        batch = _tensors(batch)
        for local in self._locals(batch):
            example_count(local)
        self._build(batch)

        def cut(batch):
            return _cut(batch, microbatch_size)

        return lambda: self._run(cut, (self.spec,), batch)[0]

    def _of_pieces(self, pieces):
        pieces = [_tensors(piece) for piece in pieces]
        self._build(pieces[0])
        count = tf.constant(len(pieces))
        pieces += pieces[-1:] * (self.accum_steps - len(pieces))
        signature = ((self.spec,) * self.accum_steps, tf.TensorSpec((), tf.int32))
        return lambda: self._run(_hold, signature, tuple(pieces), count)[0]

    def _of_iterator(self, iterator):
        pieces = self.epoch.draw(_optionals(iterator), self.accum_steps)
        first = next(pieces.iterator)
        if not self.built:
            self._build(_tensors(first.get_value()))
        losses = self._losses(map_leaves(_symbolic, self.spec))
        if not losses.by_examples(_is_even(self.spec)):
            self.streams = False
            others = [piece.get_value() for piece in pieces.iterator]
            return self._of_pieces([first.get_value(), *others])
        element = iterator.element_spec
        signature = (
            tf.OptionalSpec(element),
            tf.data.IteratorSpec(element),
            tf.TensorSpec((), tf.int32),
        )
        count = tf.constant(pieces.count)

        def update():
            logs, drawn = self._run(_stream, signature, first, iterator, count)
            self.epoch.seen += int(drawn) - 1  # the first is counted
            return logs

        return update

    def _locals(self, data):
        """What each replica gets of distributed data."""
        results = self.strategy.experimental_local_results
        return [
            map_leaves(lambda leaf, k=replica: results(leaf)[k], data)
            for replica in range(self.replicas)
        ]

    def _build(self, data):
        if self.built:
            return
        local = self._locals(data)[0]
        with self.strategy.scope():
            if self.model.run_eagerly:
                trainer.build_from_values(self.model, local)
            else:
                trainer.build(self.model, map_leaves(_symbolic, local))
        self.built = True

    def _losses(self, example, trace=trainer.compute_output_spec):
        structure = str(map_leaves(lambda array: (array.shape, array.dtype), example))
        if structure not in self.inspected:
            self.inspected[structure] = normalizers.inspect(
                self.model,
                example,
                trace=trace,
                # Run eagerly, a model may do things that it is not to do twice.
                training=not self.model.run_eagerly,
            )
        return self.inspected[structure]

    def _run(self, pieces_of: Callable, signature: tuple, *data):
        """The logs of an update, and the number of its pieces."""

        def on_replica(*data):
            pieces = pieces_of(*data)
            losses = self._losses(pieces.example, partial(_trace, pieces=pieces))
            return _update(self.model, self.accum_dtype, pieces, losses)

        def run(*data):
            outputs = self.strategy.run(on_replica, args=data)
            return reduce_per_replica(outputs, self.strategy, reduction="auto")

        if self.model.run_eagerly:
            return run(*data)
        # Traced once for all that the data set may yield, not for each of its shapes.
        key = pieces_of.__name__, self.key
        if key not in self.graphs:
            self.graphs[key] = tf.function(
                run,
                input_signature=None if self.spec is None else signature,
                reduce_retracing=True,
                autograph=False,
            )
        return self.graphs[key](*data)


def _optionals(iterator):
    """A data set's batches, whose arrays stay where a graph can read them."""
    while (batch := iterator.get_next_as_optional()).has_value():
        yield batch


@dataclass
class _Pieces:
    """The pieces of one update.

    A loop carries `state` from one piece to the next.
    """

    example: Any  # what is known of any piece: nested, of KerasTensors
    even: bool  # whether all have one shape, but for the number of examples
    expected: tf.Tensor  # the number of examples that shares are of
    more: Callable[[tf.Tensor, Any], tf.Tensor]  # whether there is a piece k
    read: Callable[[tf.Tensor, Any], Any]  # piece k
    sizes: tf.Tensor | None = None  # the number of examples of each, if all are known
    state: Any = ()
    following: Callable[[tf.Tensor, Any], Any] = lambda k, state: state  # for piece k


def _known(sizes: tf.Tensor, read: Callable, example: Any, even: bool) -> _Pieces:
    return _Pieces(
        example,
        even,
        expected=tf.cast(tf.reduce_sum(sizes), normalizers.dtype()),
        more=lambda k, state: k < tf.size(sizes),
        read=lambda k, state: read(k),
        sizes=sizes,
    )


def _cut(data: Any, microbatch_size: int) -> _Pieces:
    size = tf.shape(leaves(data)[0])[0]
    starts = tf.range(0, size, microbatch_size)
    sizes = tf.minimum(microbatch_size, size - starts)

    def read(k):
        start, stop = starts[k], starts[k] + sizes[k]
        return map_leaves(lambda array: array[start:stop], data)

    return _known(sizes, read, map_leaves(_symbolic, data), even=True)


def _hold(pieces: tuple, count: tf.Tensor) -> _Pieces:
    """Pieces that may differ in shape; those after `count` fill up, and are not read.

    Their arrays are held in lists, which a loop can index.
    """
    columns = list(
        zip(*(tf.nest.flatten(piece, expand_composites=True) for piece in pieces))
    )
    shapes = [
        None if column[0] is None else _common_shape(column) for column in columns
    ]
    lists = [None if column[0] is None else _list(column) for column in columns]
    even = all(shape is None or None not in shape[1:] for shape in shapes)

    def read(k):
        arrays = [
            None if held is None else tf.ensure_shape(held.read(k), shape)
            for held, shape in zip(lists, shapes)
        ]
        return tf.nest.pack_sequence_as(pieces[0], arrays, expand_composites=True)

    sizes = tf.stack([_examples(piece) for piece in pieces])[:count]
    return _known(sizes, read, map_leaves(_symbolic, pieces[0]), even)


def _stream(
    first: tf.experimental.Optional, iterator: tf.data.Iterator, count: tf.Tensor
) -> _Pieces:
    """At most `count` pieces, each drawn while the one before is trained on."""
    element = iterator.element_spec
    spec = keras.tree.map_structure(_without_optional, element)

    def read(k, optional):
        return keras.tree.map_structure(_without_optional, optional.get_value())

    def following(k, optional):
        return tf.cond(
            k < count,
            iterator.get_next_as_optional,
            lambda: tf.experimental.Optional.empty(element),
        )

    size = _examples(read(0, first))
    return _Pieces(
        map_leaves(_symbolic, spec),
        _is_even(spec),
        expected=tf.cast(size * count, normalizers.dtype()),
        more=lambda k, optional: optional.has_value(),
        read=read,
        state=first,
        following=following,
    )


def _examples(piece):
    return tf.shape(first_input(piece))[0]


def _is_even(spec):
    return all(None not in leaf.shape[1:] for leaf in leaves(spec))


def _trace(function, example, pieces):
    """What `function` returns for any piece, or its spec; without its effects."""
    if tf.executing_eagerly():
        with trainer.StatelessScope():
            return function(pieces.read(0, ()))
    return trainer.compute_output_spec(function, example)


def _list(arrays):
    held = tf.TensorArray(
        arrays[0].dtype, len(arrays), infer_shape=False, clear_after_read=False
    )
    for k, array in enumerate(arrays):
        held = held.write(k, array)
    return held


def _common_shape(arrays):
    shapes = [array.shape for array in arrays]
    shape = reduce(tf.TensorShape.most_specific_compatible_shape, shapes)
    # The number of examples may differ, even where this update's pieces agree.
    return tf.TensorShape([None, *shape[1:]]) if shape.rank else shape


def _symbolic(array):
    return keras.KerasTensor(
        (None, *array.shape[1:]), keras.backend.standardize_dtype(array.dtype)
    )


def _tensors(batch):
    batch = keras.tree.map_structure(_without_optional, batch)
    # `train_on_batch` gives what the user gave; several replicas' values are no array.
    return map_leaves(
        lambda leaf: tf.convert_to_tensor(leaf) if hasattr(leaf, "__array__") else leaf,
        batch,
    )


def _without_optional(leaf):
    # tf.data may hold a None that a generator yields as an empty Optional.
    nones = (tf.experimental.Optional, tf.OptionalSpec, tf.NoneTensorSpec)
    return None if isinstance(leaf, nones) else leaf


def _update(model, accum_dtype, pieces, losses):
    """One update: what every piece is worth, the loop over them, the optimizer.

    Returns the logs, and the number of pieces.
    """
    variables = model.trainable_weights
    kinds = losses.kinds(pieces.even)
    factors = _factors(model, pieces, kinds)
    sums = _Sums(model, variables, accum_dtype, pieces)
    add_piece = partial(_add_piece, model, variables, sums, kinds)
    apply = partial(_apply, model, variables)
    if model.jit_compile and not model.run_eagerly:
        add_piece, apply = [
            tf.function(function, jit_compile=True, autograph=False)
            for function in (add_piece, apply)
        ]

    def body(k, state, examples, loss, dense, slices, own_logs):
        data = pieces.read(k, state)
        size = _examples(data)
        share = tf.cast(size, pieces.expected.dtype) / pieces.expected
        row = None if factors is None else factors[k]
        part, dense, new_slices, own_logs = add_piece(dense, data, share, row)
        slices = [
            (values.write(k, new.values), indices.write(k, new.indices))
            for (values, indices), new in zip(slices, new_slices)
        ]
        state = pieces.following(k + 1, state)
        return k + 1, state, examples + size, loss + part, dense, slices, own_logs

    with tf.name_scope("accumulate_gradients"):
        count, _, examples, loss, dense, slices, own_logs = tf.while_loop(
            lambda k, state, *_: pieces.more(k, state),
            body,
            (
                tf.constant(0),
                pieces.state,
                tf.constant(0),
                tf.zeros((), normalizers.dtype()),
                sums.dense(),
                sums.slices(),
                _zero_logs(model, pieces),
            ),
            # Pieces side by side would hold their activations side by side.
            parallel_iterations=1,
        )
    # Nothing of the optimizer runs before all pieces are done: one may yet fail.
    done = tf.group(*dense, *(held.flow for pair in slices for held in pair))
    with tf.name_scope("apply_gradients"), tf.control_dependencies([done]):
        correction = None
        if pieces.sizes is None:
            correction = pieces.expected / tf.cast(examples, pieces.expected.dtype)
            loss *= correction
        apply(sums.gradients(dense, slices, correction))
    return trainer.logs(model, own_logs, loss, examples), count


class _Sums:
    """How an update holds the sum of each variable's gradients, between pieces.

    A dense gradient has an accumulator. The slices of a sparse one (an embedding's) are
    kept as they come: Keras's optimizers do not merge slices of one row, so that only
    the same slices give the same update.
    """

    def __init__(self, model, variables, accum_dtype, pieces):
        self.variables = variables
        self.accum_dtype = accum_dtype
        self.connected: set[int] = set()  # variables with a gradient from some piece
        self.eager: dict[int, list] = {}  # slices, where there is no graph
        self.sparse = _sparse_variables(model, variables, pieces)

    def dense(self) -> list:
        return [
            tf.zeros_like(v.value, trainer.accumulator_dtype(v, self.accum_dtype))
            for i, v in enumerate(self.variables)
            if i not in self.sparse
        ]

    def slices(self) -> list:
        def array(dtype):
            return tf.TensorArray(dtype, 0, dynamic_size=True, infer_shape=False)

        return [
            (array(self.variables[i].dtype), array(self.sparse[i])) for i in self.sparse
        ]

    def add(self, dense: list, gradients: list) -> tuple[list, list]:
        """The new accumulators, and the slices of this piece."""
        self.connected.update(i for i, g in enumerate(gradients) if g is not None)
        for i, gradient in enumerate(gradients):
            if tf.executing_eagerly() and isinstance(gradient, tf.IndexedSlices):
                self.eager.setdefault(i, []).append(gradient)
                gradients[i] = None
        waiting = iter(dense)
        dense = [
            _add(next(waiting), gradient, variable)
            for i, (gradient, variable) in enumerate(zip(gradients, self.variables))
            if i not in self.sparse
        ]
        return dense, [gradients[i] for i in self.sparse]

    def gradients(self, dense: list, slices: list, correction) -> list:
        """The finished gradients, None where no piece had one.

        Args:
            dense: The accumulators.
            slices: Pairs of arrays, of values and of indices.
            correction: What the sums are to be multiplied by, or None.
        """
        if correction is not None:
            dense = tf.cond(
                tf.equal(correction, 1),
                lambda: dense,
                lambda: self._corrected(dense, correction),
            )
        sums, parts = iter(dense), iter(slices)

        def finished(i, variable):
            if i in self.sparse:
                values, indices = next(parts)
                values = values.concat()
                if correction is not None:
                    values *= tf.cast(correction, values.dtype)
                shape = list(variable.shape)
                return tf.IndexedSlices(
                    tf.ensure_shape(values, [None, *shape[1:]]),
                    tf.ensure_shape(indices.concat(), [None]),
                    tf.constant(shape),
                )
            accumulator = next(sums)
            if i in self.eager:
                return tf.IndexedSlices(
                    tf.concat([g.values for g in self.eager[i]], axis=0),
                    tf.concat([g.indices for g in self.eager[i]], axis=0),
                    tf.constant(list(variable.shape)),
                )
            if i in self.connected:
                return tf.cast(accumulator, variable.dtype)
            return None

        return [finished(i, variable) for i, variable in enumerate(self.variables)]

    def _corrected(self, dense: list, correction) -> list:
        variables = [v for i, v in enumerate(self.variables) if i not in self.sparse]
        return [
            accumulator
            if trainer.overwrites(variable)
            else accumulator * tf.cast(correction, accumulator.dtype)
            for accumulator, variable in zip(dense, variables)
        ]


def _sparse_variables(model, variables, pieces) -> dict[int, tf.DType]:
    """The variables whose gradients are slices, with the dtype of their indices."""
    sparse: dict[int, tf.DType] = {}
    if tf.executing_eagerly() or not any(
        isinstance(layer, keras.layers.Embedding)
        or not trainer.is_keras_own(type(layer))
        for layer in trainer.layers_of(model)
    ):
        return sparse

    def run(data):
        with trainer.StatelessScope(collect_losses=True):
            share = tf.constant(1.0)
            _, _, gradients = _gradients(model, variables, data, share)
        for i, gradient in enumerate(gradients):
            if isinstance(gradient, tf.IndexedSlices):
                sparse[i] = gradient.indices.dtype
        return tf.zeros(())

    _trace(run, pieces.example, pieces)
    return sparse


def _factors(model, pieces, kinds):
    """The factor of each compiled loss in each piece, or None where all are 1."""
    if set(kinds) <= {normalizers.BY_EXAMPLES}:
        return None

    def measure(k):
        data = pieces.read(k, ())
        # Nothing of this forward pass stays, and only its masks are computed.
        with trainer.StatelessScope():
            x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
            y_pred = trainer.forward(model, x, training=False)
            found = normalizers.measure(model, data, y_pred)
        return normalizers.values(found)

    denominators = None
    if normalizers.NORMALIZED in kinds:
        denominators = tf.map_fn(
            measure,
            tf.range(tf.size(pieces.sizes)),
            parallel_iterations=1,
            fn_output_signature=tf.TensorSpec((len(kinds),), normalizers.dtype()),
        )
    shares = tf.cast(pieces.sizes, pieces.expected.dtype) / pieces.expected
    return normalizers.factors(denominators, shares, kinds)


def _add_piece(model, variables, sums, kinds, dense, data, share, factors):
    """Add a piece's part of the full batch's gradient, and its metrics.

    Returns its part of the full batch's loss, the accumulators, the slices, and the
    logs if they are the model's own.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    weigh = None
    if factors is not None:
        weigh = normalizers.weighing(kinds, tf.unstack(factors))
    loss, y_pred, gradients = _gradients(model, variables, data, share, weigh)
    dense, slices = sums.add(dense, gradients)
    own_logs = trainer.update_metrics(
        model, (x, y, y_pred, sample_weight), loss, _examples(data)
    )
    part = tf.reduce_mean(tf.cast(loss, normalizers.dtype())) * share
    return part, dense, slices, own_logs


def _gradients(model, variables, data, share, weigh=None):
    """A piece's loss, predictions, and part of the full batch's gradients."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with tf.GradientTape() as tape:
        y_pred = trainer.forward(model, x, training=True)
        loss = trainer.compute_loss(
            model, (x, y, y_pred, sample_weight), model.losses, share, weigh
        )
        # Of a loss without reduction TensorFlow sums the values: pieces of it add up.
        worth = loss if len(loss.shape) else loss * tf.cast(share, loss.dtype)
        worth = model.optimizer.scale_loss(worth)
    return loss, y_pred, tape.gradient(worth, variables) if variables else []


def _add(accumulator, gradient, variable):
    if gradient is None:
        return accumulator
    gradient = tf.cast(tf.convert_to_tensor(gradient), accumulator.dtype)
    if trainer.overwrites(variable):
        return tf.maximum(accumulator, gradient)
    return accumulator + gradient


def _apply(model, variables, gradients):
    """The finished gradient to the optimizer, once."""
    if not variables:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return
    model.optimizer.apply_gradients(zip(gradients, variables))


def _zero_logs(model, pieces):
    """Zeros in the form of what a user's own `compute_metrics` returns."""
    if not trainer.has_own_metrics(model):
        return {}

    def logs(data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = trainer.forward(model, x, training=False)
        return model.compute_metrics(x, y, y_pred, sample_weight)

    return keras.tree.map_structure(
        lambda spec: tf.zeros(spec.shape, spec.dtype),
        _trace(logs, pieces.example, pieces),
    )


@contextmanager
def drawing(epoch: Epoch, group: int) -> Iterator[None]:
    """Around `fit`: here the train function draws its pieces itself."""
    yield
