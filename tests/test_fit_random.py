"""Hypothesis draws sizes, weights, masks, losses and reductions.

`HYPOTHESIS_PROFILE=many` draws many more examples than the default.
"""

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND, assert_same, core_on, in_microbatches, moved, train
from hypothesis import assume, given
from hypothesis import strategies as st
from versions import MASKS_IN_PLACE, unless_plain_fails

LOSSES = {
    "mse": lambda reduction: keras.losses.MeanSquaredError(reduction=reduction),
    "huber": lambda reduction: keras.losses.Huber(reduction=reduction),
    "log_cosh": lambda reduction: keras.losses.LogCosh(reduction=reduction),
    "own": lambda reduction: problems.LossByCall(reduction=reduction),
}
REDUCTIONS = [
    reduction
    for reduction in problems.REDUCTIONS
    if BACKEND in problems.REDUCTIONS[reduction].backends
]
MOST_EXAMPLES = 13
weight = st.sampled_from([0.0, 0.0, 0.25, 1.0, 3.5])


def sgd(*reductions):
    """A rate with which no example diverges, because divergence magnifies rounding."""
    summed = any(problems.REDUCTIONS[name].adds_up for name in reductions)
    terms = MOST_EXAMPLES * problems.STEPS if summed else 1
    return keras.optimizers.SGD(0.05 / terms, momentum=0.5)


@st.composite
def sizes(draw):
    """The numbers of examples of each batch of an epoch, and of a micro-batch.

    All batches but the last have equally many micro-batches, as `accum_steps` requires.
    """
    microbatch = draw(st.integers(1, 6))
    full = draw(st.integers(1, MOST_EXAMPLES))
    updates = draw(st.integers(1, 3))
    last = draw(st.integers(1, full))
    return [full] * updates + [last], microbatch


def check(problem, way, microbatch):
    reference = train(problem, problem.batches())
    assert_same(in_microbatches(problem, way, microbatch, warn=False), reference)
    return reference


def problem_of(
    build, batches, microbatch, reduction, loss, microbatches=None, metrics=True
):
    return problems.Problem(
        "drawn",
        build,
        lambda: batches,
        arguments=lambda: {
            "loss": LOSSES[loss](reduction),
            **({"metrics": ["mae"], "weighted_metrics": ["mse"]} if metrics else {}),
        },
        optimizer=lambda: sgd(reduction),
        microbatches=microbatches or (lambda batch: problems.cut(batch, microbatch)),
        epochs=1,
    )


def of_every_step(weights):
    """The weights of examples, for each step, as a mask of steps requires.

    They have float64, which Keras copies. On PyTorch plain Keras too multiplies weights
    in float32 by the mask in place, before the metrics see them.
    """
    return np.repeat(np.float64(weights)[:, None], problems.STEPS, axis=1)


ways = pytest.mark.parametrize("way", ["microbatch_size", "accum_steps"])


@ways
@given(
    sizes=sizes(),
    reduction=st.sampled_from(REDUCTIONS),
    loss=st.sampled_from([*LOSSES]),
    weights=st.none()
    | st.lists(weight, min_size=MOST_EXAMPLES, max_size=MOST_EXAMPLES),
)
@core_on("torch")
def test_vectors(way, sizes, reduction, loss, weights):
    counts, microbatch = sizes
    batches = problems.each_size(
        lambda r, n: (
            problems.normal(r, n, problems.FEATURES),
            problems.normal(r, n, 2),
        ),
        counts,
    )
    if weights is not None:
        batches = [(x, y, np.float32(weights[: len(y)])) for x, y in batches]
    problem = problem_of(problems.mlp(2), batches, microbatch, reduction, loss)
    reference = check(problem, way, microbatch)
    if weights is None:
        assert moved(reference) > 1e-4


@ways
@given(
    sizes=sizes(),
    reduction=st.sampled_from(REDUCTIONS),
    loss=st.sampled_from([*LOSSES]),
    lengths=st.lists(
        st.integers(0, problems.STEPS), min_size=MOST_EXAMPLES, max_size=MOST_EXAMPLES
    ),
    weights=st.none()
    | st.lists(weight, min_size=MOST_EXAMPLES, max_size=MOST_EXAMPLES),
    trim=st.booleans(),
)
@core_on("torch")
def test_masked_sequences(way, sizes, reduction, loss, lengths, weights, trim):
    """Rows have any length, also 0, and micro-batches are cut to their longest row."""
    counts, microbatch = sizes
    # Without reduction the log is a mean over all steps, including padding.
    assume(not trim or reduction != "none")

    def make(r, n):
        x = r.integers(1, problems.TOKENS, (n, problems.STEPS)).astype("int32")
        x *= np.arange(problems.STEPS) < np.array(lengths[:n])[:, None]
        y = problems.normal(r, n, problems.STEPS, 2)
        return (x, y) if weights is None else (x, y, of_every_step(weights[:n]))

    def microbatches(batch):
        return [shortened(each) for each in problems.cut(batch, microbatch)]

    def shortened(each):
        longest = max(int((each[0] > 0).sum(axis=1).max()), 1) if trim else None
        return tuple(array[:, :longest] for array in each)

    batches = problems.each_size(make, counts)
    found = [each[0].shape[1] for batch in batches for each in microbatches(batch)]
    # If the first two micro-batches of a generator have one length, TensorFlow requires
    # this length of all.
    assume(way != "accum_steps" or len({*found[:2]}) > 1 or len({*found}) == 1)
    problem = problem_of(
        problems.tagger,
        batches,
        microbatch,
        reduction,
        loss,
        microbatches=microbatches if way == "accum_steps" else None,
        # Keras's metrics first take means over an example's steps, including padding.
        metrics=not trim,
    )
    check(problem, way, microbatch)


@ways
@unless_plain_fails(MASKS_IN_PLACE)
@given(
    sizes=sizes(),
    reductions=st.tuples(
        st.sampled_from(problems.TO_A_NUMBER), st.sampled_from(problems.TO_A_NUMBER)
    ),
    lengths=st.lists(
        st.integers(1, problems.STEPS), min_size=MOST_EXAMPLES, max_size=MOST_EXAMPLES
    ),
    weights=st.lists(
        st.tuples(weight, weight), min_size=MOST_EXAMPLES, max_size=MOST_EXAMPLES
    ),
    loss_weights=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)),
)
@core_on("torch")
def test_two_outputs(way, sizes, reductions, lengths, weights, loss_weights):
    counts, microbatch = sizes
    of_steps, of_whole = (np.float32(column) for column in zip(*weights, strict=True))

    def make(r, n):
        x = r.integers(1, problems.TOKENS, (n, problems.STEPS)).astype("int32")
        x *= np.arange(problems.STEPS) < np.array(lengths[:n])[:, None]
        y = (
            problems.normal(r, n, problems.STEPS, 2),
            r.integers(0, problems.CLASSES, n).astype("int32"),
        )
        return x, y, (of_every_step(of_steps[:n]), of_whole[:n])

    problem = problems.Problem(
        "drawn",
        problems.tagger_and_classifier,
        lambda: problems.each_size(make, counts),
        arguments=problems.two_losses(*reductions, loss_weights=list(loss_weights)),
        optimizer=lambda: sgd(*reductions),
        microbatches=lambda batch: problems.cut(batch, microbatch),
        epochs=1,
    )
    check(problem, way, microbatch)
