"""`GradientAccumulateOptimizer` on the list of problems, as far as it can know."""

import problems
import pytest
from api import KERAS_2, keras
from helpers import (
    assert_alike,
    assert_same,
    even,
    has_alike,
    moved,
    train,
    with_optimizer,
)
from versions import unless_plain_fails

from gradient_accumulator import GradientAccumulateOptimizer

# What an optimizer cannot know, by the beginnings of problems' names: with these,
# pieces of one number of examples are not worth the same.
UNEQUAL = {
    "a mask leaves each piece another number of values": (
        "fully_masked_full_batch",
        "ignore_class",
        "layer_gru_bidirectional_masked",
        "mask_computed_from_activations",
        "masking_layer",
        "metrics_masked",
        "outputs_",
        "pieces_of_different_length",
        "reduction_mean_masked",
        "reduction_sum_over_batch_size_masked",
        "reduction_sum_over_batch_size_weights_of_steps",
        "regularizer_of_activity_masked",
    ),
    "divided by the sum of the weights, another one in each piece": (
        "class_weight_mean_with_sample_weight",
        "metrics_of_mean_with_sample_weight",
        "reduction_mean_with_sample_weight_",
        "weights_zero_in_a_full_batch_mean_with_sample_weight",
    ),
    "pieces add up": (
        "add_loss_of_each_example",
        "add_loss_only_of_each_example",
        "float64",
        "reduction_none",
        "reduction_sum_masked",
        "reduction_sum_piece",
        "reduction_sum_weight",
        "regularizer_of_weights_loss_sum",
    ),
    "float8 is rounded by how large a piece's own gradients are": ("float8",),
}
SUMS = (
    "reduction_sum",
    "reduction_sum_masked",
    "reduction_sum_weighted",
    "ignore_class_sum",
    "pieces_of_different_length_sum",
    "add_loss_only_of_each_example",
    "float64",
)
# Keras on TensorFlow keeps the parts of an embedding's gradient apart.
MERGED = keras.backend.backend() == "tensorflow"


def equal(problem):
    starts = tuple(name for names in UNEQUAL.values() for name in names)
    return problem.name not in SUMS and not problem.name.startswith(starts)


def accumulating(problem, steps, **settings):
    return with_optimizer(
        problem, lambda inner: GradientAccumulateOptimizer(inner, steps, **settings)
    )


def merging(optimizer):
    """Plain Keras with the gradients of an embedding's rows merged, as elsewhere."""
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


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(
            problem,
            marks=[
                unless_plain_fails(problem.name),
                *([pytest.mark.full] if has_alike(problem) else []),
            ],
        )
        for problem in problems.here()
        if equal(problem)
    ],
    ids=str,
)
def test_pieces_equal_the_full_batch(problem):
    batch, pieces = even(problem)
    plain = problem
    if MERGED and problem.name.startswith("embedding"):
        plain = with_optimizer(problem, merging)
    reference = train(plain, [batch])
    assert moved(reference) > 1e-2 or "skips" in problem.name
    trained = train(accumulating(problem, len(pieces)), pieces)
    assert_alike(problem, trained, reference)


@pytest.mark.parametrize(
    "problem", [p for p in problems.here() if p.name in SUMS], ids=str
)
def test_sums_add_up(problem):
    batch, pieces = even(problem)
    reference = train(problem, [batch])
    trained = train(accumulating(problem, len(pieces), reduction="SUM"), pieces)
    trained.history = reference.history  # Keras's mean over pieces
    assert_same(trained, reference, problem.floatx)


@pytest.mark.parametrize("name", [n for names in UNEQUAL.values() for n in names])
def test_unequal_pieces_are_problems(name):
    assert any(p.name.startswith(name) for p in problems.PROBLEMS)
