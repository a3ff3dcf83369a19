"""An exception in a micro-batch leaves the model as it was."""

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND, arrays, assert_close, core_on
from helpers.failures import (
    WAYS,
    BadExample,
    assert_equal,
    compiled,
    data,
    failing,
    fit,
    momentum_model,
    state,
    ways,
)
from keras import layers, ops
from versions import DATA_THAT_FAILS, EXCEPTIONS, unless_plain_fails

from gradient_accumulator import accumulate

pytestmark = core_on("torch")


@ways
@unless_plain_fails(DATA_THAT_FAILS)
@pytest.mark.core
def test_data_that_fails_in_the_middle_of_an_update(way):
    settings, size = WAYS[way]
    model = accumulate(momentum_model(), **settings)
    after_two_updates = momentum_model()
    fit(after_two_updates, *data(), batch_size=8)
    batches = problems.cut(data(), size)

    def generator():
        # Two updates are complete. The third one has half of its micro-batches.
        yield from batches
        yield from batches[: {"microbatch_size": 0, "accum_steps": 2}[way]]
        raise BadExample

    with pytest.raises(Exception, match=r"BadExample|^$"):
        fit(model, generator(), steps_per_epoch=2 * len(batches))
    assert_close(state(model), state(after_two_updates))


FAILURES = {
    "tensorflow": "assertion failed|Condition x < y|assert_less",
    "jax": r"BadExample|callback|Fails\.call",
    "torch": r"^$|Fails\.call",
}


@ways
@pytest.mark.parametrize(
    "run_eagerly",
    [pytest.param(False, marks=unless_plain_fails(EXCEPTIONS)), True],
)
@pytest.mark.parametrize("bad", [8, 15], ids=["first_microbatch", "last_microbatch"])
@pytest.mark.core
def test_an_exception_in_a_microbatch_leaves_the_model_as_it_was(way, run_eagerly, bad):
    """The first update is complete, and an example of the second one fails."""
    settings, size = WAYS[way]
    model = accumulate(compiled(failing, run_eagerly=run_eagerly), **settings)
    fit(model, *data(8), batch_size=size)
    before = state(model)
    seeds = [ops.convert_to_numpy(v) for v in model.non_trainable_variables]
    x, y = data()
    x = x.copy()
    x[bad] = 1000
    with pytest.raises(Exception, match=FAILURES[BACKEND]):
        fit(model, x[8:], y[8:], batch_size=size)
    assert_equal(state(model), before)
    for a, b in zip(model.non_trainable_variables, seeds, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), b)
    # The model can be trained afterwards.
    fit(model, *data(8), batch_size=size)
    assert int(model.optimizer.iterations) == 2


@unless_plain_fails(EXCEPTIONS)
@pytest.mark.core
def test_an_exception_in_train_on_batch_leaves_the_model_as_it_was():
    model = accumulate(compiled(failing), microbatch_size=2)
    x, y = data(8)
    model.train_on_batch(x, y)
    before = state(model)
    x = x.copy()
    x[5] = 1000
    with pytest.raises(Exception, match=FAILURES[BACKEND]):
        model.train_on_batch(x, y)
    assert_equal(state(model), before)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch changes variables in place")
@ways
def test_a_frozen_layer_is_not_copied(way, monkeypatch):
    """An update copies only state that micro-batches move, to restore it."""
    import torch

    settings, size = WAYS[way]
    x = layers.Input((problems.FEATURES,))
    frozen = layers.Dense(1000, trainable=False)
    h = layers.BatchNormalization()(layers.Dropout(0.5)(frozen(x)))
    model = keras.Model(x, layers.Dense(3)(h))
    model.compile("sgd", "mse")
    accumulate(model, **settings, warn=False)
    copied = []
    clone = torch.Tensor.clone

    def spied(tensor, **arguments):
        copied.append(tensor.data_ptr())
        return clone(tensor, **arguments)

    monkeypatch.setattr(torch.Tensor, "clone", spied)
    fit(model, *data(), batch_size=size)
    places = {v.path: v.value.data_ptr() for v in model.non_trainable_variables}
    assert {path for path, place in places.items() if place not in copied} == {
        variable.path for variable in frozen.variables
    }


class FailsAtBuild(layers.Layer):
    def call(self, x, training=False):
        if training:
            raise BadExample("no such operation")
        return x


@ways
@pytest.mark.core
def test_a_layer_that_fails_while_it_is_traced(way):
    settings, size = WAYS[way]
    x = layers.Input((problems.FEATURES,))
    model = keras.Model(x, layers.Dense(3)(FailsAtBuild()(x)))
    model.compile("sgd", "mse")
    accumulate(model, **settings)
    before = arrays(model.weights)
    with pytest.raises(BadExample):
        fit(model, *data(), batch_size=size)
    assert_equal(arrays(model.weights), before)


@ways
def test_a_model_is_usable_after_an_error(way):
    """A `fit` that failed leaves no state that affects the next one."""
    settings, size = WAYS[way]
    model = accumulate(compiled(), **settings)
    with pytest.raises(ValueError):
        fit(model, (batch for batch in ()))
    fit(model, *data(), batch_size=size, epochs=2)
    reference = compiled()
    fit(reference, *data(), batch_size=8, epochs=2)
    assert model.steps_per_execution == 1
    assert_close(state(model), state(reference))
