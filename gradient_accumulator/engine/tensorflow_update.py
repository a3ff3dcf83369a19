"""An update on TensorFlow: one graph around a `tf.while_loop` over its micro-batches.

A loop, not an unrolled graph: TensorFlow would run unrolled micro-batches side by side
and hold the activations of all of them."""

from __future__ import annotations

import gc
import warnings
from contextlib import contextmanager
from functools import partial

import tensorflow as tf

from gradient_accumulator import losses as normalizers
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras
from gradient_accumulator.devices.tensorflow_devices import finite_together, ready
from gradient_accumulator.engine.tensorflow_accumulators import clip
from gradient_accumulator.engine.tensorflow_microbatches import (
    size_of,
    trace_microbatch,
)
from gradient_accumulator.engine.tensorflow_slices import (
    joined,
    no_slices,
    with_slices,
)
from gradient_accumulator.statistics import Statistics, apart, synchronizes


def run_update(model, accumulation, microbatches, losses):
    """One update: what every micro-batch is worth, the loop over them, the optimizer.

    Returns the logs, and the number of micro-batches.
    """
    variables = model.trainable_weights
    kinds = losses.kinds(microbatches.even)
    statistics = Statistics(model)
    factors = _factors(model, statistics, microbatches, kinds)
    before = statistics.before()
    rewound = [(v, tf.identity(trainer.value(v))) for v in statistics.rewound]
    divided_last = normalizers.DIVIDED_LAST in kinds
    sums = _Sums(model, variables, accumulation.accum_dtype, microbatches)
    add_microbatch = partial(_add_microbatch, model, variables, statistics, sums, kinds)
    apply = partial(_apply, model, accumulation.clipping, variables)
    unrolled = waits(model)
    if model.jit_compile and not model.run_eagerly and not unrolled:
        compiled = partial(tf.function, jit_compile=True, autograph=False)
        add_microbatch = compiled(add_microbatch)
        # Replicas wait for each other in the optimizer, which is no part of XLA's.
        if model.distribute_strategy.num_replicas_in_sync == 1:
            apply = compiled(apply)

    def body(k, state, examples, divisor, loss, dense, slices, own_logs):
        data = microbatches.read(k, state)
        size = size_of(data)
        share = tf.cast(size, microbatches.expected.dtype) / microbatches.expected
        row = None if factors is None else factors[k]
        if divided_last:
            # Times its share, a numerator is then divided by `expected`.
            row = tf.expand_dims(1 / tf.cast(size, microbatches.expected.dtype), 0)
        for variable, value in rewound:
            variable.assign(value)
        part, denominator, dense, new_slices, own_logs = add_microbatch(
            dense, data, share, row
        )
        slices = [
            with_slices(held, k, new, microbatches.most)
            for held, new in zip(slices, new_slices)
        ]
        state = microbatches.following(k + 1, state)
        return (
            k + 1,
            state,
            examples + size,
            divisor + denominator,
            loss + part,
            dense,
            slices,
            own_logs,
        )

    with tf.name_scope("accumulate_gradients"):
        loop = _unrolled if unrolled else _loop
        count, _, examples, divisor, loss, dense, slices, own_logs = loop(
            microbatches,
            body,
            (
                tf.constant(0),
                microbatches.state,
                tf.constant(0),
                tf.zeros((), normalizers.dtype()),
                tf.zeros((), normalizers.dtype()),
                sums.dense(),
                sums.slices(),
                _zero_logs(model, microbatches),
            ),
        )
    # Nothing of the optimizer runs before all micro-batches are done: one may yet fail.
    done = tf.group(
        *dense,
        *(tensor for held in slices for tensor in held.tensors),
        microbatches.complete(count),
    )
    with tf.name_scope("apply_gradients"), tf.control_dependencies([done]):
        correction = None
        if divided_last:
            correction = normalizers.correction(microbatches.expected, divisor)
        elif microbatches.sizes is None:
            correction = microbatches.expected / tf.cast(
                examples, microbatches.expected.dtype
            )
        if correction is not None:
            loss *= correction
        apply(sums.gradients(dense, slices, correction))
        statistics.finish(before)
    return trainer.logs(model, own_logs, loss, examples), count


def waits(model):
    """Whether replicas wait for each other in a micro-batch.

    TensorFlow does not let them within a loop or a function of its own.
    """
    return model.distribute_strategy.num_replicas_in_sync > 1 and synchronizes(model)


def _loop(microbatches, body, state):
    return tf.while_loop(
        lambda k, state, *_: microbatches.more(k, state),
        body,
        state,
        # Micro-batches side by side would hold their activations side by side.
        parallel_iterations=1,
    )


def _unrolled(microbatches, body, state):
    """The same for a number of micro-batches that the graph is for, one after the
    other.
    """
    for k in range(microbatches.count):
        done = [t for t in tf.nest.flatten(state) if isinstance(t, tf.Tensor)]
        with tf.control_dependencies(done):
            state = body(tf.constant(k), *state[1:])
    return tf.constant(microbatches.count), *state[1:]


class _Sums:
    """How an update holds the sum of each variable's gradients, between micro-batches.

    A dense gradient has an accumulator; the slices of a sparse one are kept.
    """

    def __init__(self, model, variables, accum_dtype, microbatches):
        self.variables = variables
        self.accum_dtype = accum_dtype
        self.connected: set[int] = (
            set()
        )  # variables with a gradient from some micro-batch
        self.eager: dict[int, list] = {}  # slices, where there is no graph
        self.sparse = _sparse_variables(model, variables, microbatches)
        self.even = microbatches.even

    def dense(self) -> list:
        return [
            tf.zeros_like(
                trainer.native(v), trainer.accumulator_dtype(v, self.accum_dtype)
            )
            for i, v in enumerate(self.variables)
            if i not in self.sparse
        ]

    def slices(self) -> list:
        return [
            no_slices(self.variables[i], dtype, self.even)
            for i, dtype in self.sparse.items()
        ]

    def add(self, dense: list, gradients: list) -> tuple[list, list]:
        """The new accumulators, and the slices of this micro-batch."""
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
        """The finished gradients, None where no micro-batch had one.

        Args:
            dense: The accumulators.
            slices: The slices of each sparse gradient.
            correction: What the sums are to be multiplied by, or None.
        """
        if correction is not None:
            dense = tf.cond(
                tf.equal(correction, 1),
                lambda: dense,
                lambda: self._corrected(dense, correction),
            )
        sums, kept = iter(dense), iter(slices)

        def finished(i, variable):
            if i in self.sparse:
                gradient = joined(next(kept), variable)
                if correction is not None:
                    factor = tf.cast(correction, gradient.dtype)
                    gradient = tf.IndexedSlices(
                        gradient.values * factor,
                        gradient.indices,
                        gradient.dense_shape,
                    )
                return gradient
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


def _sparse_variables(model, variables, microbatches) -> dict[int, tf.DType]:
    """The variables whose gradients are slices, with the dtype of their indices."""
    sparse: dict[int, tf.DType] = {}
    if tf.executing_eagerly() or not any(
        isinstance(layer, keras.layers.Embedding)
        or not trainer.is_keras_own(type(layer))
        for layer in trainer.layers_of(model)
    ):
        return sparse

    def run(data):
        with trainer.StatelessScope(collect_losses=True), apart(model):
            share = tf.constant(1.0)
            _, _, gradients = _gradients(model, variables, data, share)
        for i, gradient in enumerate(gradients):
            if isinstance(gradient, tf.IndexedSlices):
                sparse[i] = gradient.indices.dtype
        return tf.zeros(())

    trace_microbatch(run, microbatches.example, microbatches)
    # That trace's graph is in cycles, and as large as the one to come. Python would
    # find them among what is made for that one, whose memory then has holes.
    gc.collect()
    return sparse


def _factors(model, statistics, microbatches, kinds):
    """The factor of each compiled loss in each micro-batch, or None where all are 1.

    None too where a loss is divided last, for then each micro-batch knows its own.
    """
    if set(kinds) <= {normalizers.BY_EXAMPLES, normalizers.DIVIDED_LAST}:
        return None
    denominators = None
    if normalizers.NORMALIZED in kinds:
        with _only_what_is_used():
            denominators = _denominators(model, statistics, microbatches, len(kinds))
    shares = (
        tf.cast(microbatches.sizes, microbatches.expected.dtype) / microbatches.expected
    )
    return normalizers.factors(denominators, shares, kinds)


def _denominators(model, statistics, microbatches, losses):
    """The denominators of all micro-batches, of shape `(microbatches, losses)`.

    Nothing of these forward passes stays, and only their masks are computed.
    """
    carried = statistics.carried if trainer.MEASURES_IN_TRAINING else []

    def body(k, rows, values):
        data = microbatches.read(k, ())
        x, _, _ = trainer.unpack(model, data)
        mapping = list(zip(carried, values))
        with (
            trainer.StatelessScope(state_mapping=mapping) as scope,
            statistics.pooling(),
            apart(model),
        ):
            y_pred = trainer.forward(model, x, trainer.MEASURES_IN_TRAINING)
            found = normalizers.measure(model, data, y_pred)
            row = normalizers.values(found)
        # Each micro-batch sees the state that it will be trained in, for its masks.
        values = [scope.get_current_value(variable) for variable in carried]
        return k + 1, rows.write(k, row), values

    count = tf.size(microbatches.sizes)
    dtype = tf.as_dtype(normalizers.dtype())
    rows = tf.TensorArray(dtype, count, element_shape=(losses,))
    _, rows, _ = tf.while_loop(
        lambda k, *_: k < count,
        body,
        (tf.constant(0), rows, [tf.identity(trainer.value(v)) for v in carried]),
        parallel_iterations=1,
    )
    return rows.stack()


@contextmanager
def _only_what_is_used():
    """Where a loop runs nothing but what its results need.

    Else an assertion about the shape of predictions, which Keras's cross-entropy makes,
    runs for its own sake, and with it the forward pass.
    """
    if tf.executing_eagerly():
        yield
        return
    graph = tf.compat.v1.get_default_graph()
    before = graph._add_control_dependencies
    graph._add_control_dependencies = False
    try:
        yield
    finally:
        graph._add_control_dependencies = before


def _add_microbatch(
    model, variables, statistics, sums, kinds, dense, data, share, factors
):
    """Add a micro-batch's part of the batch's gradient, and its metrics.

    Returns its part of the batch's loss, what that is divided by last, the
    accumulators, the slices, and the logs if they are the model's own.
    """
    x, y, sample_weight = trainer.unpack(model, data)
    weigh = None
    if factors is not None:
        weigh = normalizers.Weighing(kinds, tf.unstack(factors))
    with statistics.pooling():
        loss, y_pred, gradients = _gradients(model, variables, data, share, weigh)
    dense, slices = sums.add(dense, gradients)
    own_logs = trainer.update_metrics(
        model, (x, y, y_pred, sample_weight), loss, size_of(data), share
    )
    part = tf.reduce_mean(tf.cast(loss, normalizers.dtype())) * share
    denominator = tf.cast(0.0 if weigh is None else weigh.denominator, part.dtype)
    return part, denominator, dense, slices, own_logs


def _gradients(model, variables, data, share, weigh=None):
    """A micro-batch's loss, predictions, and part of the batch's gradients."""
    x, y, sample_weight = trainer.unpack(model, data)
    with tf.GradientTape() as tape:
        y_pred = trainer.forward(model, x, training=True)
        loss = trainer.compute_loss(
            model, (x, y, y_pred, sample_weight), model.losses, share, weigh
        )
        # Of a loss without reduction TensorFlow sums the values: micro-batches of it
        # add up.
        worth = loss if len(loss.shape) else loss * tf.cast(share, loss.dtype)
        worth = trainer.scale_loss(model.optimizer, worth)
    return loss, y_pred, tape.gradient(worth, variables) if variables else []


def _add(accumulator, gradient, variable):
    if gradient is None:
        return accumulator
    gradient = tf.cast(tf.convert_to_tensor(gradient), accumulator.dtype)
    if trainer.overwrites(variable):
        return tf.maximum(accumulator, gradient)
    return accumulator + gradient


def _apply(model, clipping, variables, gradients):
    """The finished gradient to the optimizer, once."""
    if not variables:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return
    if clipping is not None:
        gradients = clip(clipping, model.optimizer, variables, gradients)
    gradients = finite_together(model.optimizer, gradients)
    with ready(gradients):
        trainer.apply_gradients(model.optimizer, gradients, variables)


def _zero_logs(model, microbatches):
    """Zeros in the form of what a user's own `compute_metrics` returns."""
    if not trainer.has_own_metrics(model):
        return {}

    def logs(data):
        x, y, sample_weight = trainer.unpack(model, data)
        y_pred = trainer.forward(model, x, training=False)
        return model.compute_metrics(x, y, y_pred, sample_weight)

    return keras.tree.map_structure(
        lambda spec: tf.zeros(spec.shape, spec.dtype),
        trace_microbatch(logs, microbatches.example, microbatches),
    )
