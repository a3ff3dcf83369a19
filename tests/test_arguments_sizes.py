"""A size may be anything that Python takes for an integer, and is kept as an int."""

import json

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND
from keras import ops

from gradient_accumulator import (
    AccumBatchNormalization,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    accumulate,
    accumulated_value_and_grad,
    replace_batchnorm_layers,
)
from gradient_accumulator.fit import accumulation_of


class Size:
    """A number from a configuration, which is no int, but can be used as one."""

    def __index__(self):
        return 4


SIZES = [
    np.int64(4),
    np.uint8(4),
    np.array(4),
    Size(),
    ops.convert_to_tensor(4, "int32"),
]


def plain(size):
    return type(size) is int and size == 4


def model_of(way, size):
    model = problems.mlp()()
    return GradientAccumulateModel(
        inputs=model.input, outputs=model.output, **{way: size}
    )


@pytest.mark.parametrize("size", SIZES, ids=lambda size: type(size).__name__)
@pytest.mark.parametrize("way", ["accum_steps", "microbatch_size"])
@pytest.mark.core
def test_of_a_model(way, size):
    model = problems.mlp()()
    accumulate(model, **{way: size})
    assert plain(getattr(accumulation_of(model), way))
    model = model_of(way, size)
    again = type(model).from_config(json.loads(json.dumps(model.get_config())))
    for each in (model, again):
        assert plain(getattr(accumulation_of(each), way))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: type(size).__name__)
def test_of_an_optimizer(size):
    optimizer = GradientAccumulateOptimizer("sgd", accum_steps=size)
    config = optimizer.get_config()
    again = GradientAccumulateOptimizer.from_config({**config, "accum_steps": size})
    for each in (optimizer, again):
        assert plain(each.accum_steps)
        assert plain(each.get_config()["accum_steps"])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: type(size).__name__)
def test_of_a_normalization(size):
    layer = AccumBatchNormalization(accum_steps=size)
    again = AccumBatchNormalization.from_config(
        {**layer.get_config(), "accum_steps": size}
    )
    x = keras.Input((3,))
    model = keras.Model(x, keras.layers.BatchNormalization()(x))
    replaced = replace_batchnorm_layers(model, accum_steps=size).layers[-1]
    for each in (layer, again, replaced):
        assert plain(each.accum_steps)
        assert plain(each.get_config()["accum_steps"])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: type(size).__name__)
def test_of_a_function(size):
    weight = keras.Variable(np.ones(1, "float32")).value

    def loss(weight, x):
        return ops.sum(weight) * ops.mean(x), ops.sum(x)

    if BACKEND == "jax":
        function, variables = loss, weight
    else:
        function, variables = (lambda x: loss(weight, x)), [weight]
    value_and_grad = accumulated_value_and_grad(
        function, microbatch_size=size, has_aux=True
    )
    (_, of_each), _ = value_and_grad(variables, ops.ones((8,)))
    assert of_each.shape == (2,)


@pytest.mark.parametrize("way", ["accum_steps", "microbatch_size"])
def test_trains(way):
    weights = []
    x = problems.normal(problems.random(), 8, problems.FEATURES)
    for given in (4, np.int64(4)):
        model = problems.mlp()()
        model.compile("sgd", "mse")
        accumulate(model, **{way: given})
        size = {"accum_steps": 2, "microbatch_size": 8}[way]
        model.fit(x, x[:, :3], batch_size=size, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)
