"""Optimizers that accumulate, models that they train, and single calls of them."""

import problems
from keras import ops

from . import BACKEND, arrays
from .loops import data


def step(optimizer, gradients, variables, **arguments):
    """One call with tensors. On JAX it is stateless, as in its branches."""
    gradients = [None if g is None else ops.convert_to_tensor(g) for g in gradients]
    if BACKEND != "jax":
        optimizer.apply(gradients, variables, **arguments)
        return
    new, state = optimizer.stateless_apply(
        [v.value for v in optimizer.variables],
        gradients,
        [v.value for v in variables],
        **arguments,
    )
    for variable, value in zip([*variables, *optimizer.variables], [*new, *state]):
        variable.assign(value)


def model_of(optimizer, **arguments):
    model = problems.mlp()()
    model.compile(optimizer, "mse", metrics=["mae"], **arguments)
    return model


def state(model):
    """The weights and state of a model, without the state of accumulation."""
    optimizer = model.optimizer
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return {
        **arrays(model.weights),
        **{f"o{k}": v for k, v in arrays(inner.variables).items()},
    }


def fit(model, size, count=24, **arguments):
    x, y = data(count)
    arguments = {"epochs": 2, "shuffle": False, "verbose": 0, **arguments}
    return model.fit(x, y, batch_size=size, **arguments).history
