"""Training in pieces on TensorFlow: an update is one graph around a `tf.while_loop`.

A loop, not an unrolled graph: TensorFlow would run unrolled pieces side by side and
hold the activations of all of them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    leaves,
    map_leaves,
)

KERAS_DRAWS_TO_BUILD = False  # whether `fit` builds the model from a batch of its data


def make_train_function(
    model: keras.Model, accumulation: Accumulation, epoch: Epoch
) -> Callable[[Iterator], dict]:
    """The function that `fit` calls with its iterator, for one update or several."""
    strategy = model.distribute_strategy
    replicas = range(strategy.num_replicas_in_sync)
    update = _make_update(model, accumulation)
    steps_per_execution = model.steps_per_execution
    built = False

    def train_function(iterator):
        nonlocal built
        logs = None
        for _ in range(steps_per_execution):
            try:
                data = epoch.draw(iterator, accumulation.accum_steps or 1)
            except StopIteration:
                if logs is None:
                    raise
                break
            data = [_tensors(batch) for batch in data]
            local = [_local(strategy, data[0], replica) for replica in replicas]
            if accumulation.microbatch_size is not None:
                for batch in local:
                    example_count(batch)
            if not built:
                with strategy.scope():
                    if model.run_eagerly:
                        trainer.build_from_values(model, local[0])
                    else:
                        trainer.build(model, map_leaves(_symbolic, local[0]))
                built = True
            state = model.non_trainable_variables
            before = [variable.value.read_value() for variable in state]
            try:
                logs = update(data, getattr(iterator, "element_spec", None))
            except BaseException:
                # The pieces before the failing one moved seeds and statistics.
                for variable, value in zip(state, before):
                    variable.assign(value)
                raise
        return logs

    return train_function


def _local(strategy, data, replica):
    """What one replica gets of distributed data."""
    return map_leaves(
        lambda leaf: strategy.experimental_local_results(leaf)[replica], data
    )


def _make_update(model, accumulation):
    """A function of one update's data, with the graphs that it was traced to."""
    strategy = model.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    inspected: dict = {}  # what the compiled losses divide by, for a structure of data

    def on_replicas(pieces_of, *data):
        def run(*data):
            return _update(model, accumulation, pieces_of(*data), inspected)

        outputs = strategy.run(run, args=data)
        return reduce_per_replica(outputs, strategy, reduction="auto")

    def from_batch(data):
        return on_replicas(lambda d: _cut(d, accumulation.microbatch_size), data)

    def from_pieces(pieces, count):
        return on_replicas(_hold, pieces, count)

    graphs: dict = {}

    def graph_of(function, spec, signature):
        # Traced once for all that the data set may yield, not for each of its shapes.
        key = None if spec is None else str(spec)
        if key not in graphs:
            graphs[key] = tf.function(
                function,
                input_signature=signature if spec is not None else None,
                reduce_retracing=True,
                autograph=False,
            )
        return function if model.run_eagerly else graphs[key]

    def update(data, spec):
        spec = keras.tree.map_structure(_without_optional, spec)
        if replicas > 1:
            spec = None
        if not accumulation.accum_steps:
            return graph_of(from_batch, spec, (spec,))(data[0])
        count = tf.constant(len(data))
        data += data[-1:] * (accumulation.accum_steps - len(data))
        signature = ((spec,) * len(data), tf.TensorSpec((), tf.int32))
        return graph_of(from_pieces, spec, signature)(tuple(data), count)

    return update


@dataclass
class _Pieces:
    """The pieces of one update."""

    sizes: tf.Tensor  # the number of examples of each
    read: Callable[[tf.Tensor], Any]  # piece k
    example: Any  # what is known of any piece: nested, of KerasTensors
    even: bool  # whether all have one shape, but for the number of examples


def _cut(data: Any, microbatch_size: int) -> _Pieces:
    size = tf.shape(leaves(data)[0])[0]
    starts = tf.range(0, size, microbatch_size)
    sizes = tf.minimum(microbatch_size, size - starts)

    def read(k):
        start, stop = starts[k], starts[k] + sizes[k]
        return map_leaves(lambda array: array[start:stop], data)

    return _Pieces(sizes, read, map_leaves(_symbolic, data), even=True)


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

    sizes = tf.stack([tf.shape(leaves(piece)[0])[0] for piece in pieces])[:count]
    return _Pieces(sizes, read, map_leaves(_symbolic, pieces[0]), even)


def _trace(function, pieces):
    """What `function` returns for any piece, or its spec; without its effects."""
    if tf.executing_eagerly():
        with trainer.StatelessScope():
            return function(pieces.read(0))
    return trainer.compute_output_spec(function, pieces.example)


def _list(arrays):
    held = tf.TensorArray(
        arrays[0].dtype, len(arrays), infer_shape=False, clear_after_read=False
    )
    for k, array in enumerate(arrays):
        held = held.write(k, array)
    return held


def _common_shape(arrays):
    shapes = [array.shape for array in arrays]
    shape = functools.reduce(tf.TensorShape.most_specific_compatible_shape, shapes)
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


def _update(model, accumulation, pieces, inspected):
    """One update: what every piece is worth, the loop over them, the optimizer."""
    variables = model.trainable_weights
    sizes = tf.cast(pieces.sizes, normalizers.dtype())
    count = tf.size(sizes)
    shares = sizes / tf.reduce_sum(sizes)
    kinds, factors = _factors(model, pieces, shares, inspected)
    sums = _Sums(model, variables, accumulation.accum_dtype, pieces, count)
    add_piece = functools.partial(_add_piece, model, variables, sums, kinds)
    apply = functools.partial(_apply, model, variables)
    if model.jit_compile and not model.run_eagerly:
        add_piece, apply = [
            tf.function(function, jit_compile=True, autograph=False)
            for function in (add_piece, apply)
        ]

    def body(k, loss, dense, slices, own_logs):
        worth = (shares[k], None if factors is None else factors[k])
        part, dense, new_slices, own_logs = add_piece(dense, pieces.read(k), *worth)
        slices = [
            (values.write(k, new.values), indices.write(k, new.indices))
            for (values, indices), new in zip(slices, new_slices)
        ]
        return k + 1, loss + part, dense, slices, own_logs

    with tf.name_scope("accumulate_gradients"):
        _, loss, dense, slices, own_logs = tf.while_loop(
            lambda k, *_: k < count,
            body,
            (
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
        apply(sums.gradients(dense, slices))
    return trainer.logs(model, own_logs, loss, tf.reduce_sum(pieces.sizes))


class _Sums:
    """How an update holds the sum of each variable's gradients, between pieces.

    A dense gradient has an accumulator. The slices of a sparse one (an embedding's) are
    kept as they come: Keras's optimizers do not merge slices of one row, so that only
    the same slices give the same update.
    """

    def __init__(self, model, variables, accum_dtype, pieces, count):
        self.variables = variables
        self.accum_dtype = accum_dtype
        self.count = count
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
            return tf.TensorArray(dtype, self.count, infer_shape=False)

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

    def gradients(self, dense: list, slices: list) -> list:
        """The finished gradients, None where no piece had one."""
        sums, parts = iter(dense), iter(slices)

        def finished(i, variable):
            if i in self.sparse:
                values, indices = next(parts)
                shape = list(variable.shape)
                return tf.IndexedSlices(
                    tf.ensure_shape(values.concat(), [None, *shape[1:]]),
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

    _trace(run, pieces)
    return sparse


def _factors(model, pieces, shares, inspected):
    """The losses' kinds, and the factor of each in each piece: None if all are 1."""
    structure = str(pieces.example)
    if structure not in inspected:
        inspected[structure] = normalizers.inspect(model, pieces, trace=_trace)
    found = inspected[structure]
    kinds = normalizers.kinds_of(found, pieces.even)
    if set(kinds) <= {normalizers.BY_EXAMPLES}:
        return kinds, None

    def measure(k):
        data = pieces.read(k)
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
            fn_output_signature=tf.TensorSpec((len(found),), normalizers.dtype()),
        )
    return kinds, normalizers.factors(denominators, shares, kinds)


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
    examples = tf.shape(leaves(x)[0])[0]
    own_logs = trainer.update_metrics(
        model, (x, y, y_pred, sample_weight), loss, examples
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
        _trace(logs, pieces),
    )


@contextmanager
def drawing(epoch: Epoch, group: int) -> Iterator[None]:
    """Around `fit`: here the train function draws its pieces itself."""
    yield
