"""`GradientAccumulateOptimizer` on all problems that an optimizer can make exact."""

import problems
import pytest
from api import KERAS_2, keras
from helpers import (
    assert_alike,
    assert_same,
    even,
    marks_of,
    moved,
    train,
    with_optimizer,
)

from gradient_accumulator import GradientAccumulateOptimizer

# On TensorFlow, Keras does not merge the slices of an embedding's gradient.
MERGED = keras.backend.backend() == "tensorflow"


def accumulating(problem, steps, **settings):
    return with_optimizer(
        problem, lambda inner: GradientAccumulateOptimizer(inner, steps, **settings)
    )


def merging(optimizer):
    """Plain Keras that merges the slices of an embedding's rows, as elsewhere."""
    import tensorflow as tf

    def merge(gradient):
        return None if gradient is None else tf.convert_to_tensor(gradient)

    name = "apply_gradients" if KERAS_2 else "apply"
    apply = getattr(optimizer, name)

    def merged(grads, trainable_variables=None):
        apply([merge(g) for g in grads], trainable_variables)

    def merged_pairs(grads_and_vars):
        apply([(merge(g), v) for g, v in grads_and_vars])

    setattr(optimizer, name, merged_pairs if KERAS_2 else merged)
    return optimizer


def cases(reduction):
    """The problems that an optimizer accumulates with this reduction."""
    for problem in problems.here():
        if problem.optimizer_reduction == reduction:
            marks = marks_of(problem, "optimizer")
            yield pytest.param(problem, marks=marks, id=problem.name)


@pytest.mark.parametrize("problem", [*cases("MEAN")])
def test_microbatches_equal_the_batch(problem):
    batch, microbatches = even(problem)
    plain = problem
    if MERGED and problem.repeated_rows:
        plain = with_optimizer(problem, merging)
    reference = train(plain, [batch])
    assert moved(reference) > 1e-2 or problem.skips_first
    trained = train(accumulating(problem, len(microbatches)), microbatches)
    assert_alike(problem, trained, reference)


@pytest.mark.parametrize("problem", [*cases("SUM")])
def test_sums_add_up(problem):
    batch, microbatches = even(problem)
    reference = train(problem, [batch])
    trained = train(
        accumulating(problem, len(microbatches), reduction="SUM"), microbatches
    )
    trained.history = reference.history  # Keras logs the mean over micro-batches
    assert_same(trained, reference, problem.floatx)
