"""Tensors as arguments: of another framework, in generators, and in errors."""

import re

import keras
import numpy as np
import pytest
from helpers import BACKEND, array
from helpers.functional import VALUE, examples, mean, model, value_and_grad, variable
from keras import layers, ops

from gradient_accumulator import (
    AccumBatchNormalization,
    FlushGradients,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    accumulate,
    accumulated_value_and_grad,
    adaptive_clip_grad,
)
from gradient_accumulator.received import described

pytestmark = pytest.mark.core


# --------------------------------------------------- tensors of another framework


def torch_parameters():
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, VALUE)
    return module.parameters()


def tensorflow_variables():
    tf = pytest.importorskip("tensorflow")
    return (tf.Variable(np.full(shape, VALUE, "float32")) for shape in [(2, 3), (2,)])


def jax_arrays():
    jnp = pytest.importorskip("jax.numpy")
    return (jnp.full(shape, VALUE) for shape in [(2, 3), (2,)])


OTHERS = {
    "torch": (torch_parameters, "parameters of PyTorch's"),
    "tensorflow": (tensorflow_variables, "variables of TensorFlow's"),
    "jax": (jax_arrays, "tensors of JAX's"),
}

CALLS = {
    "accumulated_value_and_grad": lambda given: accumulated_value_and_grad(
        lambda *_: 0.0, microbatch_size=2
    )(given(), examples()),
    "apply": lambda given: GradientAccumulateOptimizer("sgd", 2).apply(
        [ops.ones((2, 3)), ops.ones((2,))], given()
    ),
    "build": lambda given: GradientAccumulateOptimizer("sgd", 2).build(given()),
    "adaptive_clip_grad": lambda given: adaptive_clip_grad(given(), given()),
}


@pytest.mark.parametrize("of", [name for name in OTHERS if name != BACKEND])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [iter, list])
def test_tensors_of_another_framework(call, of, kind):
    make, what = OTHERS[of]
    with pytest.raises(TypeError, match=what) as caught:
        CALLS[call](lambda: kind(list(make())))
    message = str(caught.value)
    assert f"KERAS_BACKEND={of} before Keras is imported" in message
    assert "shape (2, 3)" in message
    sentence, received = message.split(" Received: ")
    assert sentence.count(". ") == 0
    assert "0.12" not in received and "\n" not in message


def test_gradients_of_another_framework():
    of = next(name for name in OTHERS if name != BACKEND)
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    with pytest.raises(TypeError, match=rf"`grads`.*KERAS_BACKEND={of}.*Received: "):
        optimizer.apply(list(OTHERS[of][0]()), [variable((2, 3)), variable((2,))])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="whose variables Keras takes")
@pytest.mark.parametrize("call", ["apply", "build"])
def test_an_optimizer_of_kerass_updates_its_variables_only(call):
    """Plain Keras fails only in an update, with "no attribute 'value'"."""
    with pytest.raises(TypeError, match=r"accumulated_value_and_grad.*Received: ") as e:
        CALLS[call](OTHERS[BACKEND][0])
    assert "0.12" not in str(e.value)


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere variables are what it takes")
@pytest.mark.parametrize("given", [lambda: [variable()], lambda: model()])
def test_variables_on_jax(given):
    with pytest.raises(TypeError, match=r"\[v.value for v in .*Received: ") as caught:
        accumulated_value_and_grad(lambda *_: 0.0, microbatch_size=2)(
            given(), examples()
        )
    assert "0.12" not in str(caught.value)


@pytest.mark.skipif(BACKEND == "torch", reason="whose own it is")
def test_a_module_of_pytorchs_is_no_list_of_variables():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"(holds objects|a list of var).*Linear"):
        accumulated_value_and_grad(lambda *_: 0.0, microbatch_size=2)(
            torch.nn.Linear(3, 2), examples()
        )


def test_a_module_of_pytorchs_is_no_model():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"accumulated_value_and_grad.*Received: model"):
        accumulate(torch.nn.Linear(3, 2), microbatch_size=2)


# ------------------------------------------------------------ generators of variables


def test_the_function_takes_a_generator():
    weight = variable()
    given = weight.value if BACKEND == "jax" else weight
    loss = (
        (lambda values, microbatch: mean(values[0], microbatch))
        if BACKEND == "jax"
        else lambda microbatch: mean(weight.value, microbatch)
    )
    function = accumulated_value_and_grad(loss, microbatch_size=2)
    expected = function([given], examples())
    for variables in ({"kernel": given}.values(), (v for v in [given]), (given,)):
        value, (gradient,) = function(variables, examples())
        np.testing.assert_array_equal(array(value), array(expected[0]))
        np.testing.assert_array_equal(array(gradient), array(expected[1][0]))


def test_a_generator_that_is_used_up():
    """Without an error it would silently train nothing."""
    given = (v for v in ())
    with pytest.raises(
        ValueError, match=r"gives its variables only once.*Received: variables"
    ):
        accumulated_value_and_grad(lambda *_: 0.0, microbatch_size=2)(given, examples())


@pytest.mark.skipif(BACKEND == "jax", reason="where any nested arrays are taken")
@pytest.mark.parametrize("given", ["one", "dict", "module", "names"])
def test_variables_that_are_no_list(given):
    given = {
        "one": variable(),
        "dict": {"kernel": variable()},
        "module": layers.Dense(3),
        "names": ["kernel"],
    }[given]
    with pytest.raises(TypeError, match=r"a list of variables.*Received: ") as caught:
        accumulated_value_and_grad(lambda *_: 0.0, microbatch_size=2)(given, examples())
    assert "0.12" not in str(caught.value)


def test_optimizer_and_clipping_take_generators():
    trained, listed = variable(), variable()
    gradient = ops.ones((3, 2))
    optimizer, other = (
        GradientAccumulateOptimizer(
            keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=None), 1
        )
        for _ in range(2)
    )
    optimizer.build(v for v in [trained])
    other.build([listed])
    optimizer.apply((g for g in [gradient]), (v for v in [trained]))
    other.apply([gradient], [listed])
    if BACKEND == "jax":
        for each, v, kind in (optimizer, trained, iter), (other, listed, list):
            state = [x.value for x in each.variables]
            (new,), state = each.stateless_apply(
                kind(state), kind([gradient]), kind([v.value])
            )
            (new,), _ = each.stateless_flush(kind(state), kind([new]))
            v.assign(new)
    optimizer.finalize_variable_values(v for v in [trained])
    other.finalize_variable_values([listed])
    np.testing.assert_array_equal(array(trained), array(listed))
    assert np.all(array(trained) < VALUE)
    clipped = adaptive_clip_grad(
        (v for v in [trained]), (g for g in [gradient]), clip_factor=0.01
    )
    expected = adaptive_clip_grad([listed], [gradient], clip_factor=0.01)
    np.testing.assert_array_equal(array(clipped[0]), array(expected[0]))


# -------------------------------------------------------- no error prints a tensor


def tensor():
    return ops.convert_to_tensor(np.full((3, 2), VALUE, "float32"))


PRINTED = {
    "microbatch_size": lambda: accumulate(model(), microbatch_size=tensor()),
    "both_sizes": lambda: accumulate(
        model(), accum_steps=tensor(), microbatch_size=tensor()
    ),
    "accum_dtype": lambda: accumulate(model(), accum_steps=2, accum_dtype=tensor()),
    "model": lambda: accumulate(tensor(), accum_steps=2),
    "model_of_variables": lambda: accumulate([variable()], accum_steps=2),
    "clip_factor": lambda: adaptive_clip_grad([], [], clip_factor=tensor()),
    "agc_exclude": lambda: adaptive_clip_grad(
        [variable()], [tensor()], agc_exclude=[tensor()]
    ),
    "loss_fn": lambda: accumulated_value_and_grad(tensor(), microbatch_size=2),
    "optimizer": lambda: GradientAccumulateOptimizer(tensor()),
    "optimizers": lambda: GradientAccumulateOptimizer([variable()]),
    "reduction": lambda: GradientAccumulateOptimizer("sgd", reduction=tensor()),
    "weight": lambda: GradientAccumulateOptimizer("sgd", 2).apply(
        [tensor()], [variable()], weight=tensor()
    ),
    "unknown": lambda: GradientAccumulateOptimizer("sgd", clipnorm=tensor()),
    "by_position": lambda: accumulate(model(), tensor()),
    "functional": lambda: GradientAccumulateModel(
        inputs=tensor(), outputs=tensor(), other=tensor()
    ),
    "momentum": lambda: AccumBatchNormalization(momentum=tensor()),
    "flush": lambda: FlushGradients([variable()]),
    "loss_of_examples": lambda: value_and_grad(lambda w, x: ops.matmul(x, w))(
        examples()
    ),
    "loss_in_a_list": lambda: value_and_grad(lambda w, x: [mean(w, x)])(examples()),
    "no_aux": lambda: value_and_grad(mean, has_aux=True)(examples()),
    "batch": lambda: value_and_grad(mean)({"x": examples(), "n": ops.mean(examples())}),
}


@pytest.mark.parametrize("what", PRINTED)
def test_no_error_prints_the_values_of_a_tensor(what):
    with pytest.raises((TypeError, ValueError), match="Received: ") as caught:
        PRINTED[what]()
    message = str(caught.value)
    assert not re.search(r"0\.12\d|\d\.\d{4}", message), message
    assert "\n" not in message


def test_what_is_received():
    assert described([1, "a", None, 4.5]) == "[1, 'a', None, ... (4 in all)]"
    assert described({"a": (True,)}) == "{'a': (True)}"
    assert described("x" * 500) == repr("x" * 500)[:117] + "..."
    assert described(np.zeros((2, 3))) == "<ndarray of shape (2, 3), float64>"
    assert described(variable()).endswith("'kernel' of shape (3, 2), float32>")

    class Own:
        def __repr__(self):
            return f"{VALUE}"

    assert described(Own()).endswith(".Own>")
    if BACKEND == "tensorflow":
        import tensorflow as tf

        seen = []
        specs = [tf.TensorSpec(None, "float32")]
        tf.function(lambda x: seen.append(described(x)), specs).get_concrete_function()
        assert "of shape unknown, float32" in seen[0]
