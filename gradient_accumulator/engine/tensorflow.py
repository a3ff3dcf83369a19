"""An update on TensorFlow: one graph around a `tf.while_loop` over its micro-batches.

The graph has a loop because TensorFlow would run unrolled micro-batches side by side,
and hold the activations of all of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import tensorflow as tf

from gradient_accumulator import losses
from gradient_accumulator.compat import CompiledModel, internals
from gradient_accumulator.compat.api import keras
from gradient_accumulator.devices.tensorflow_devices import finite_everywhere, ready
from gradient_accumulator.engine.engine_base import Carry, Steps, Sums
from gradient_accumulator.engine.tensorflow_accumulators import clip
from gradient_accumulator.engine.tensorflow_fit import TensorFlowFit, waits
from gradient_accumulator.engine.tensorflow_functional import value_and_grad
from gradient_accumulator.engine.tensorflow_microbatches import (
    Microbatches,
    size_of,
    stateless,
    trace_microbatch,
)
from gradient_accumulator.engine.tensorflow_slices import (
    joined,
    no_slices,
    with_slices,
)
from gradient_accumulator.functional import LossFunction
from gradient_accumulator.statistics import unsynchronized
from gradient_accumulator.update import Update


class TensorFlowEngine(TensorFlowFit):
    """An update as a graph. It has no state, because each replica makes an update."""

    def weigh(self, update: Update, microbatches: Any) -> Any:
        kinds = microbatches.losses.kinds(microbatches.even)
        return Weighed(
            microbatches, update, kinds, _factors(update, microbatches, kinds)
        )

    def steps(self, update: Update) -> Steps:
        add, apply = update.add, update.apply
        model = update.model
        if model.jit_compile and not model.run_eagerly and not waits(model):
            compiled = partial(tf.function, jit_compile=True, autograph=False)
            add = compiled(add)
            # In the optimizer replicas wait for each other, which XLA cannot compile.
            if model.distribute_strategy.num_replicas_in_sync == 1:
                apply = compiled(apply)
        return Steps(update.zeros, add, apply, update.finish)

    def sums(self, update: Update, weighed: Any) -> Sums:
        return SparseSums(update, weighed.microbatches)

    def fold(self, step: Callable[..., Carry], carry: Carry, weighed: Any) -> Carry:
        microbatches = weighed.microbatches

        def body(k, state, examples, carry):
            data = microbatches.read(k, state)
            size = size_of(data)
            expected = microbatches.expected
            share = tf.cast(size, expected.dtype) / expected
            dense, slices = carry.sums
            carry = step(
                carry._replace(sums=(dense, ()), logs={}),
                weighed.kinds,
                data,
                share,
                weighed.row(k, size),
            )
            dense, new_slices = carry.sums
            slices = [
                with_slices(held, k, new, microbatches.most)
                for held, new in zip(slices, new_slices)
            ]
            state = microbatches.following(k + 1, state)
            carry = carry._replace(sums=(dense, slices))
            return k + 1, state, examples + size, carry

        with tf.name_scope("accumulate_gradients"):
            carry = carry._replace(logs=_zero_logs(weighed.update.model, microbatches))
            zero = tf.constant(0)
            start = zero, microbatches.state, zero, carry
            loop = _unrolled if waits(weighed.update.model) else _loop
            microbatches.drawn, _, weighed.examples, carry = loop(
                microbatches, body, start
            )
        return carry

    def value_and_grad(
        self, function: Callable[[Any], tuple], variables: list
    ) -> tuple[list, Any]:
        # Before the call: in a stateless scope it may give variables other values.
        sources = [
            internals.native(v) if internals.is_variable(v) else v for v in variables
        ]
        with tf.GradientTape() as tape:
            loss, aux = function(variables)
        return tape.gradient(loss, sources) if sources else [], aux

    def total(
        self, update: Update, carry: Carry, weighed: Any
    ) -> tuple[Carry, Any, bool]:
        # The optimizer sums over replicas.
        expected = weighed.microbatches.expected
        if losses.DIVIDED_LAST in weighed.kinds:
            return carry, expected, True
        if weighed.microbatches.sizes is None:
            return carry, expected / tf.cast(weighed.examples, expected.dtype), False
        return carry, None, False

    @contextmanager
    def finishing(self, weighed, carry) -> Iterator[None]:
        microbatches = weighed.microbatches
        dense, slices = carry.sums
        # The optimizer runs after all micro-batches, because one of them may fail.
        done = tf.group(
            *dense,
            *(tensor for held in slices for tensor in held.tensors),
            microbatches.complete(microbatches.drawn),
        )
        with tf.name_scope("apply_gradients"), tf.control_dependencies([done]):
            yield

    def clip(
        self, clipping: Any, optimizer: Any, variables: list, gradients: list
    ) -> list:
        return clip(clipping, optimizer, variables, gradients)

    def step(self, optimizer: Any, gradients: list, variables: list) -> None:
        gradients = finite_everywhere(optimizer, gradients)
        with ready(gradients):
            super().step(optimizer, gradients, variables)

    def accumulated(self, loss: LossFunction) -> Callable:
        return value_and_grad(self, loss)


ENGINE = TensorFlowEngine


@dataclass
class Weighed:
    """The micro-batches of one update, and the weights of their losses."""

    microbatches: Microbatches
    update: Update
    kinds: Sequence[str]
    factors: tf.Tensor | None  # of shape `(microbatches, losses)`; None if all are 1
    examples: tf.Tensor | None = None  # after the loop, the number of all examples

    def row(self, k: tf.Tensor, size: tf.Tensor) -> tf.Tensor | None:
        """The factors of micro-batch k, which has `size` examples."""
        if losses.DIVIDED_LAST in self.kinds:
            # Times the share, this divides the numerator by `expected`.
            dtype = self.microbatches.expected.dtype
            return tf.expand_dims(1 / tf.cast(size, dtype), 0)
        return None if self.factors is None else self.factors[k]


def _loop(microbatches, body, state):
    return tf.while_loop(
        lambda k, state, *_: microbatches.more(k, state),
        body,
        state,
        # Parallel micro-batches would hold their activations at one time.
        parallel_iterations=1,
    )


def _unrolled(microbatches, body, state):
    """`_loop` without a loop: the graph has each micro-batch, one after another."""
    for k in range(microbatches.count):
        done = [t for t in tf.nest.flatten(state) if isinstance(t, tf.Tensor)]
        with tf.control_dependencies(done):
            state = body(tf.constant(k), *state[1:])
    return tf.constant(microbatches.count), *state[1:]


class SparseSums(Sums):
    """A pair: the sums of dense gradients, and the slices of sparse gradients."""

    def __init__(self, update: Update, microbatches: Microbatches):
        super().__init__(update.variables, update.dtypes)
        self.eager: dict[int, list] = {}  # slices, if the update runs eagerly
        self.sparse = _sparse_variables(update, microbatches)
        self.even = microbatches.even
        self.places = [i for i in range(len(self.variables)) if i not in self.sparse]

    def zeros(self):
        dense = [
            # `tf.zeros` would put a constant of this size into the graph.
            tf.zeros_like(internals.native(self.variables[i]), self.dtypes[i])
            for i in self.places
        ]
        slices = [
            no_slices(self.variables[i], dtype, self.even)
            for i, dtype in self.sparse.items()
        ]
        return dense, slices

    def add(self, sums, gradients):
        """Returns the new dense sums, and the slices of this micro-batch."""
        dense, _ = sums
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            self.connected.add(i)
            if tf.executing_eagerly() and isinstance(gradient, tf.IndexedSlices):
                self.eager.setdefault(i, []).append(gradient)
                gradients[i] = None
        dense = [
            sum_
            if gradients[i] is None
            else self._added(sum_, gradients[i], self.variables[i])
            for i, sum_ in zip(self.places, dense)
        ]
        return dense, [gradients[i] for i in self.sparse]

    def finish(self, sums, scale):
        dense, slices = sums
        if scale is not None:
            dense = tf.cond(
                tf.equal(scale, 1),
                lambda: dense,
                lambda: [
                    self._scaled(sum_, scale, self.variables[i])
                    for i, sum_ in zip(self.places, dense)
                ],
            )
        gradients: list = [None] * len(self.variables)
        for i, sum_ in zip(self.places, dense):
            if i in self.eager:
                gradients[i] = self._of_eager(i)
            elif i in self.connected:
                gradients[i] = tf.cast(sum_, self.variables[i].dtype)
        for i, held in zip(self.sparse, slices):
            gradient = joined(held, self.variables[i])
            if scale is not None:
                factor = tf.cast(scale, gradient.dtype)
                gradient = tf.IndexedSlices(
                    gradient.values * factor, gradient.indices, gradient.dense_shape
                )
            gradients[i] = gradient
        return gradients

    def _of_eager(self, i):
        return tf.IndexedSlices(
            tf.concat([g.values for g in self.eager[i]], axis=0),
            tf.concat([g.indices for g in self.eager[i]], axis=0),
            tf.constant(list(self.variables[i].shape)),
        )


def _sparse_variables(update, microbatches) -> dict[int, tf.DType]:
    """The variables whose gradients are slices, with the dtype of their indices."""
    sparse: dict[int, tf.DType] = {}
    if tf.executing_eagerly() or not any(
        isinstance(layer, keras.layers.Embedding)
        or not internals.is_keras_own(type(layer))
        for layer in CompiledModel(update.model).layers
    ):
        return sparse

    def run(data):
        with (
            internals.StatelessScope(collect_losses=True),
            unsynchronized(update.model),
        ):
            gradients, _ = update.gradients(data, tf.constant(1, losses.dtype()))
        for i, gradient in enumerate(gradients):
            if isinstance(gradient, tf.IndexedSlices):
                sparse[i] = gradient.indices.dtype
        return tf.zeros(())

    trace_microbatch(run, microbatches.example, microbatches)
    # This trace leaves a large graph in reference cycles. If Python freed it while it
    # makes the next graph, the memory of that graph would have holes.
    gc.collect()
    return sparse


def _factors(update, microbatches, kinds):
    """The factor of each compiled loss in each micro-batch; None if all are 1.

    It is also None if the loss is divided last: each micro-batch then computes its own.
    """
    if set(kinds) <= {losses.BY_EXAMPLES, losses.DIVIDED_LAST}:
        return None
    denominators = None
    if losses.NORMALIZED in kinds:
        with _only_what_is_used():
            denominators = _denominators(update, microbatches, len(kinds))
    shares = (
        tf.cast(microbatches.sizes, microbatches.expected.dtype) / microbatches.expected
    )
    return losses.factors(denominators, shares, kinds)


def _denominators(update, microbatches, count_of_losses):
    """The denominators of all micro-batches, of shape `(microbatches, losses)`.

    These forward passes have no effects, and compute only masks.
    """
    carried = update.statistics.carried if internals.MEASURES_IN_TRAINING else []

    def body(k, rows, values):
        data = microbatches.read(k, ())
        mapping = list(zip(carried, values))
        with (
            stateless(update.model, mapping) as scope,
            unsynchronized(update.model),
        ):
            row = update.denominators(data)
        # Masks may depend on the state that the micro-batch will be trained in.
        values = [scope.get_current_value(variable) for variable in carried]
        return k + 1, rows.write(k, row), values

    count = tf.size(microbatches.sizes)
    dtype = tf.as_dtype(losses.dtype())
    rows = tf.TensorArray(dtype, count, element_shape=(count_of_losses,))
    _, rows, _ = tf.while_loop(
        lambda k, *_: k < count,
        body,
        (tf.constant(0), rows, [tf.identity(internals.value(v)) for v in carried]),
        parallel_iterations=1,
    )
    return rows.stack()


@contextmanager
def _only_what_is_used():
    """A context in which a loop runs only the operations that its results need.

    Keras's cross-entropy asserts the shape of predictions. The loop would otherwise run
    this assertion, and for it the forward pass.
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


def _zero_logs(model, microbatches):
    """Zeros, nested as the logs that a model's own `compute_metrics` returns."""
    if not CompiledModel(model).has_own_metrics:
        return {}

    def logs(data):
        x, y, sample_weight = CompiledModel(model).unpack(data)
        y_pred = CompiledModel(model).forward(x, training=False)
        return model.compute_metrics(x, y, y_pred, sample_weight)

    return keras.tree.map_structure(
        lambda spec: tf.zeros(spec.shape, spec.dtype),
        trace_microbatch(logs, microbatches.example, microbatches),
    )
