"""For every problem, micro-batches give the results of plain Keras on the batch."""

import numpy as np
import problems
import pytest
from api import keras, ops
from helpers import assert_alike, in_microbatches, marks_of, moved, plain

from gradient_accumulator import accumulate


def cases():
    for number, problem in enumerate(problems.here()):
        for way in problems.WAYS_OF_FIT:
            marks = [
                # One process tests both ways, so that it trains the reference once.
                pytest.mark.xdist_group(problem.name),
                *marks_of(problem, way, problems.WAYS_OF_FIT[number % 2] != way),
            ]
            yield pytest.param(problem, way, marks=marks, id=f"{problem}-{way}")


@pytest.mark.parametrize(("problem", "way"), [*cases()])
def test_microbatches_equal_the_batch(problem, way):
    reference = plain(problem.name)
    assert moved(reference) > 1e-2
    trained = in_microbatches(problem, way)
    assert_alike(problem, trained, reference)


@pytest.mark.core
def test_every_optimizer_is_in_the_list():
    shipped = {
        cls.__name__
        for cls in vars(keras.optimizers).values()
        if isinstance(cls, type)
        and issubclass(cls, keras.optimizers.Optimizer)
        and cls is not keras.optimizers.Optimizer
    }
    # Compares names, because Keras on PyTorch has subclasses with equal names.
    listed = {type(problem.optimizer()).__name__ for problem in problems.here()}
    assert shipped <= listed


@pytest.mark.core
def test_problem_names_are_unique():
    names = [problem.name for problem in problems.PROBLEMS]
    assert len(names) == len(set(names))


class Multiplied(keras.losses.Loss):
    """A loss whose gradient with respect to the prediction is the target."""

    def call(self, y_true, y_pred):
        return ops.sum(y_true * y_pred, axis=-1)


@pytest.mark.parametrize(
    "accum_dtype, total",
    # bfloat16 has 8 binary digits: 256 + 1 is 256, and 319 rounds to 320.
    [("float32", 320.0), ("bfloat16", 256.0)],
)
@pytest.mark.core
def test_bfloat16_variables_get_the_float32_sum(accum_dtype, total):
    model = keras.Sequential(
        [
            keras.layers.Input((1,), dtype="bfloat16"),
            keras.layers.Dense(
                1, use_bias=False, kernel_initializer="zeros", dtype="bfloat16"
            ),
        ]
    )
    model.compile(keras.optimizers.SGD(1.0), Multiplied(reduction="sum"))
    accumulate(model, microbatch_size=1, accum_dtype=accum_dtype)
    x = np.ones((64, 1), "float32")
    x[0] = 256
    model.fit(x, np.ones_like(x), batch_size=64, shuffle=False, verbose=0)
    kernel = ops.convert_to_numpy(ops.cast(model.weights[0], "float32"))
    assert kernel == -total
