"""Models of every kind that are trained in micro-batches in both ways."""

import keras
import problems
import pytest

from gradient_accumulator import GradientAccumulateModel

WAYS = ({"microbatch_size": 4}, {"accum_steps": 2})

ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way)))


def data(count=16):
    r = problems.random()
    return problems.normal(r, count, problems.FEATURES), problems.normal(r, count, 3)


def compile_(model):
    model.compile(keras.optimizers.Adam(0.1, epsilon=1e-2), "mse", metrics=["mae"])
    return model


def fit(model, batch_size=8, **arguments):
    x, y = data()
    return model.fit(
        x, y, **{"batch_size": batch_size, "shuffle": False, "verbose": 0, **arguments}
    )


def batch_size(way):
    return 8 if "microbatch_size" in way else 4


def ours(way, **arguments):
    """A `GradientAccumulateModel` with the weights of `problems.mlp()`."""
    model = problems.mlp()()
    return GradientAccumulateModel(
        inputs=model.input, outputs=model.output, **way, **arguments
    )
