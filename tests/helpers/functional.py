"""A function of one variable, and tensors whose values no error may print."""

import keras
import numpy as np
import problems
from keras import ops

from gradient_accumulator import accumulated_value_and_grad

from . import BACKEND

VALUE = 0.123456  # the value of all tensors here, which no error may print


def variable(shape=(3, 2), value=VALUE):
    return keras.Variable(np.full(shape, value, "float32"), name="kernel")


def value_and_grad(loss, weight=None, **arguments):
    """The function for one variable and a loss `loss(its value, microbatch)`."""
    weight = variable() if weight is None else weight
    if BACKEND == "jax":
        given = [weight.value]

        def loss_fn(values, microbatch):
            return loss(values[0], microbatch)

    else:
        given = [weight]

        def loss_fn(microbatch):
            return loss(weight.value, microbatch)

    function = accumulated_value_and_grad(loss_fn, microbatch_size=2, **arguments)
    return lambda batch: function(given, batch)


def mean(weight, microbatch):
    return ops.mean(ops.matmul(microbatch, weight))


def examples(count=4):
    return ops.convert_to_tensor(np.full((count, 3), VALUE, "float32"))


def model():
    return problems.mlp()()
