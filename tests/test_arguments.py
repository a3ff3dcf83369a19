"""Bad arguments raise in Keras's form, and leave the model as it was."""

import re

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND, core_on
from helpers.failures import WAYS, assert_equal, compiled, data, fit, state, ways
from keras import layers, ops

from gradient_accumulator import GradientAccumulateModel, accumulate
from gradient_accumulator.received import described

pytestmark = core_on("torch")


def make_with(**arguments):
    model = problems.mlp()()
    return GradientAccumulateModel(
        inputs=model.input, outputs=model.output, **arguments
    )


BAD_SIZES = [
    (0, ValueError),
    (-2, ValueError),
    (2.0, TypeError),
    (True, TypeError),
    (False, TypeError),
    (np.True_, TypeError),
    (ops.convert_to_tensor(True), TypeError),
    (np.float32(2), TypeError),
    (np.int64(0), ValueError),
    ("4", TypeError),
    ([4], TypeError),
]


@pytest.mark.parametrize("value, error", BAD_SIZES)
@pytest.mark.parametrize("name", ["accum_steps", "microbatch_size"])
@pytest.mark.parametrize("kind", ["accumulate", "GradientAccumulateModel"])
def test_a_size_that_is_no_positive_int(kind, name, value, error):
    received = described(value) if error is TypeError else str(value)
    message = f"`{name}`.*Received: {name}={re.escape(received)}"
    if kind == "accumulate":
        model = compiled()
        attributes = dict(vars(model))
        with pytest.raises(error, match=message):
            accumulate(model, **{name: value})
        assert vars(model) == attributes
    else:
        with pytest.raises(error, match=message):
            make_with(**{name: value})


@pytest.mark.parametrize("value", [True, 1.0])
def test_a_size_that_equals_one_and_is_no_int(value):
    with pytest.raises(TypeError, match=r"`accum_steps`.*Received: accum_steps="):
        make_with(accum_steps=value, microbatch_size=3)


@pytest.mark.parametrize("make", [
    lambda **arguments: accumulate(compiled(), **arguments),
    make_with,
])  # fmt: skip
def test_both_sizes(make):
    with pytest.raises(ValueError, match=r"one of.*Received: accum_steps=2, micro.*=3"):
        make(accum_steps=2, microbatch_size=3)


def test_no_size():
    with pytest.raises(ValueError, match=r"one of.*Received: accum_steps=None, micro"):
        accumulate(compiled())


@pytest.mark.parametrize("value, error", [
    ("float31", ValueError), ("int32", ValueError), (None, TypeError), (32, TypeError)
])  # fmt: skip
@pytest.mark.core
def test_accum_dtype(value, error):
    with pytest.raises(error, match=r"`accum_dtype`.*Received: accum_dtype="):
        accumulate(compiled(), accum_steps=2, accum_dtype=value)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="micro_batch_size"):
        accumulate(compiled(), micro_batch_size=2)
    with pytest.raises((TypeError, ValueError), match="micro_batch_size"):
        make_with(micro_batch_size=2)
    with pytest.raises((TypeError, ValueError), match="micro_batch_size"):
        GradientAccumulateModel(accum_steps=2, micro_batch_size=2)


def test_sizes_are_keywords():
    with pytest.raises(TypeError):
        accumulate(compiled(), 2)


@pytest.mark.parametrize(
    "value", [None, "model", 3, layers.Dense(3), keras.Model, lambda x: x]
)
def test_not_a_model(value):
    with pytest.raises(TypeError, match=r"`model`.*Keras 3.*Received: model="):
        accumulate(value, accum_steps=2)


def test_a_keras_2_model_gets_a_sentence_of_its_own():
    keras_2 = type("Sequential", (), {"__module__": "tf_keras.src.engine.sequential"})
    with pytest.raises(TypeError, match=r"Keras 2.*Received: model="):
        accumulate(keras_2(), accum_steps=2)


def test_a_module_of_tensorflow_is_not_taken_for_a_keras_2_model():
    module = type("Module", (), {"__module__": "tensorflow.python.module.module"})
    with pytest.raises(TypeError, match=r"`keras.Model`. Received: model="):
        accumulate(module(), accum_steps=2)


def test_an_optimizer_that_accumulates_too():
    model = problems.mlp()()
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=2), "mse")
    accumulate(model, microbatch_size=2)
    with pytest.raises(ValueError, match="Received: gradient_accumulation_steps=2"):
        fit(model, *data(), batch_size=8)


def test_not_compiled():
    model = accumulate(problems.mlp()(), microbatch_size=2)
    with pytest.raises(ValueError, match="compile"):
        fit(model, *data())


@ways
def test_a_changed_backend(way, monkeypatch):
    model = compiled()
    before = state(model)
    monkeypatch.setenv("KERAS_BACKEND", "torch" if BACKEND != "torch" else "jax")
    with pytest.raises(ValueError, match=r"KERAS_BACKEND.*Received: KERAS_BACKEND="):
        accumulate(model, **WAYS[way][0])
    monkeypatch.setenv("KERAS_BACKEND", BACKEND)
    accumulate(model, **WAYS[way][0])
    monkeypatch.setenv("KERAS_BACKEND", "torch" if BACKEND != "torch" else "jax")
    with pytest.raises(ValueError, match=r"KERAS_BACKEND.*Received: KERAS_BACKEND="):
        fit(model, *data())
    assert_equal(state(model), before)
