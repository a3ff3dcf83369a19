"""`accumulated_value_and_grad` gives the loss and the gradients of the batch."""

import dataclasses

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND, collector, core_on, counting_activations
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from gradient_accumulator import accumulated_value_and_grad

pytestmark = core_on("torch")

TOLERANCE = 2e-6


def network():
    """The variables of a model, and a function that predicts from them.

    The variables are in the form that the backend differentiates by.
    """
    model = problems.mlp()()
    variables = model.trainable_variables
    if BACKEND != "jax":
        return variables, lambda _, x: model(x, training=True)
    fixed = [v.value for v in model.non_trainable_variables]

    def predict(values, x):
        return model.stateless_call(values, fixed, x, training=True)[0]

    return [v.value for v in variables], predict


def of_backend(function):
    """The function as this backend calls it: only on JAX with the variables."""
    if BACKEND == "jax":
        return function
    return lambda *args, **kwargs: function(None, *args, **kwargs)


def mean(predict):
    def loss(variables, microbatch):
        x, y, _ = microbatch
        return ops.mean(ops.square(predict(variables, x) - y))

    return of_backend(loss)


def weighted(predict):
    def loss(variables, microbatch):
        x, y, weights = microbatch
        errors = ops.mean(ops.square(predict(variables, x) - y), axis=-1)
        return ops.sum(errors * weights), ops.sum(weights)

    return of_backend(loss)


def whole_mean(predict):
    return mean(predict)


def whole_weighted(predict):
    pair = weighted(predict)

    def loss(*args):
        numerator, denominator = pair(*args)
        return numerator / denominator

    return loss


LOSSES = {"mean": (mean, whole_mean), "pair": (weighted, whole_weighted)}


def batch(count, seed=0):
    r = np.random.default_rng(seed)
    arrays = (
        problems.normal(r, count, problems.FEATURES),
        problems.normal(r, count, 3),
        (r.uniform(0.1, 3, count) * (np.arange(count) % 3 > 0)).astype("float32"),
    )
    return tuple(ops.convert_to_tensor(a) for a in arrays)


def numbers(value, gradients):
    return np.asarray(ops.convert_to_numpy(value)), [
        None if g is None else np.asarray(ops.convert_to_numpy(g)) for g in gradients
    ]


def assert_same(got, expected):
    (value, gradients), (full, reference) = numbers(*got), numbers(*expected)
    np.testing.assert_allclose(value, full, rtol=1e-5)
    assert len(gradients) == len(reference)
    for a, b in zip(gradients, reference):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * max(1, abs(b).max()))


def full_batch(loss, variables, data):
    """The loss and the gradients of the whole batch, computed by the backend itself."""
    if BACKEND == "jax":
        import jax

        return jax.value_and_grad(loss)(variables, data)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss(data)
        return value, tape.gradient(value, variables)
    import torch

    value = loss(data)
    return value.detach(), torch.autograd.grad(value, [v.value for v in variables])


def compiled(function):
    """The function, compiled as a user's training step is."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        # A training step uses variables from outside.
        return lambda variables, data: tf.function(
            lambda data: function(variables, data)
        )(data)
    return function


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("within", ["eager", "compiled"])
@given(count=st.integers(2, 13), size=st.integers(1, 14), seed=st.integers(0, 9))
@pytest.mark.core
def test_microbatches_equal_the_batch(kind, within, count, size, seed):
    variables, predict = network()
    of_microbatches, of_all = LOSSES[kind]
    data = batch(count, seed)
    function = accumulated_value_and_grad(
        of_microbatches(predict), microbatch_size=size
    )
    if within == "compiled":
        function = compiled(function)
    got = function(variables, data)
    assert_same(got, full_batch(of_all(predict), variables, data))


def test_averaging_microbatches_is_wrong_where_they_are_not_worth_the_same():
    """An optimizer wrapper that counts averages micro-batches like this."""
    variables, predict = network()
    data = batch(9)
    full = numbers(*full_batch(whole_weighted(predict), variables, data))[1]
    microbatches = [tuple(a[i : i + 3] for a in data) for i in (0, 3, 6)]
    weights = [float(ops.sum(w)) for _, _, w in microbatches]
    assert len(set(weights)) == 3
    each = [
        numbers(*full_batch(whole_weighted(predict), variables, microbatch))[1]
        for microbatch in microbatches
    ]
    averaged = [np.mean(gs, axis=0) for gs in zip(*each)]
    off = max(abs(a - b).max() / abs(b).max() for a, b in zip(averaged, full))
    assert off > 0.05
    function = accumulated_value_and_grad(weighted(predict), microbatch_size=3)
    ours = numbers(*function(variables, data))[1]
    off = max(abs(a - b).max() / abs(b).max() for a, b in zip(ours, full))
    assert off < 1e-5


@pytest.mark.parametrize("within", ["eager", "compiled"])
@pytest.mark.core
def test_aux_of_examples_is_joined_and_of_microbatches_listed(within):
    variables, predict = network()

    def loss(variables, microbatch):
        x, y, _ = microbatch
        predictions = predict(variables, x)
        value = ops.mean(ops.square(predictions - y))
        return value, {"predictions": predictions, "loss": value}

    function = accumulated_value_and_grad(
        of_backend(loss), microbatch_size=3, has_aux=True
    )
    if within == "compiled":
        function = compiled(function)
    data = batch(8)
    (_, aux), _ = function(variables, data)
    predictions = ops.convert_to_numpy(predict(variables, data[0]))
    np.testing.assert_allclose(
        ops.convert_to_numpy(aux["predictions"]), predictions, atol=1e-6
    )
    losses = [
        np.mean(
            (predictions[i : i + 3] - ops.convert_to_numpy(data[1])[i : i + 3]) ** 2
        )
        for i in (0, 3, 6)
    ]
    np.testing.assert_allclose(ops.convert_to_numpy(aux["loss"]), losses, rtol=1e-5)


@pytest.mark.parametrize("within", ["eager", "compiled"])
@pytest.mark.core
def test_further_arguments_go_to_every_microbatch(within):
    variables, predict = network()

    def loss(variables, microbatch, factor, power=1.0):
        x, y, _ = microbatch
        return ops.mean(ops.square(predict(variables, x) - y)) * factor**power

    def run(variables, data):
        factor = ops.convert_to_tensor(3.0)
        return accumulated_value_and_grad(of_backend(loss), microbatch_size=3)(
            variables, data, factor, power=2.0
        )

    data = batch(8)
    value, gradients = (compiled(run) if within == "compiled" else run)(variables, data)
    full, reference = full_batch(mean(predict), variables, data)
    assert_same((value, gradients), (9 * full, [9 * g for g in reference]))


def test_no_weight_at_all_is_a_gradient_of_zero():
    variables, predict = network()
    x, y, weights = batch(6)
    function = accumulated_value_and_grad(weighted(predict), microbatch_size=4)
    value, gradients = numbers(*function(variables, (x, y, weights * 0)))
    assert value == 0
    assert all(np.all(g == 0) for g in gradients)


@pytest.mark.parametrize(
    "accum_dtype, total", [("float32", 320.0), ("bfloat16", 256.0)]
)
@pytest.mark.core
def test_half_precision_sums_in_float32(accum_dtype, total):
    """The values are 256 and 63 ones. In bfloat16, 319 rounds to 320, 257 to 256."""
    variable = keras.Variable(ops.ones((1,), "bfloat16"), dtype="bfloat16")
    variables = [variable.value] if BACKEND == "jax" else [variable]

    def loss(variables, microbatch):
        weight = variable.value if variables is None else variables[0]
        return ops.sum(weight * ops.cast(microbatch, "bfloat16")), 1 / 64

    x = np.ones((64, 1), "float32")
    x[0] = 256
    function = accumulated_value_and_grad(
        of_backend(loss), microbatch_size=1, accum_dtype=accum_dtype
    )
    _, (gradient,) = function(variables, ops.convert_to_tensor(x))
    assert gradient.dtype == variables[0].dtype or BACKEND == "torch"
    assert float(ops.cast(gradient, "float32")[0]) == total


@pytest.mark.skipif(BACKEND == "jax", reason="JAX gives zeros there, as jax.grad does")
@pytest.mark.core
def test_no_gradient_is_none():
    variables, predict = network()
    unused = keras.Variable(np.ones(2, "float32"))
    function = accumulated_value_and_grad(mean(predict), microbatch_size=4)
    _, gradients = function([*variables, unused], batch(6))
    assert gradients[-1] is None
    assert all(g is not None for g in gradients[:-1])


@pytest.mark.skipif(BACKEND != "torch", reason="parameters have `grad` on PyTorch only")
@pytest.mark.core
def test_grad_is_left_as_it_was():
    import torch

    model = torch.nn.Linear(6, 3)
    model.weight.grad = before = torch.ones(3, 6)

    def loss(microbatch):
        x, y, _ = microbatch
        if x.shape[0] == 1:
            raise RuntimeError("a bad example")
        return torch.nn.functional.mse_loss(model(x), y)

    parameters = model.parameters()
    function = accumulated_value_and_grad(loss, microbatch_size=3)
    _, gradients = function(parameters, batch(6))
    with pytest.raises(RuntimeError, match="a bad example"):
        function(model.parameters(), batch(7))
    assert model.weight.grad is before and torch.all(before == 1)
    assert model.bias.grad is None
    assert [g.shape for g in gradients] == [(3, 6), (3,)]


@pytest.mark.skipif(BACKEND != "torch", reason="parameters have `grad` on PyTorch only")
def test_grad_of_other_parameters_is_left_alone():
    import torch

    ours, other = torch.nn.Linear(6, 3), torch.nn.Linear(3, 1)
    function = accumulated_value_and_grad(
        lambda microbatch: other(ours(microbatch[0])).mean(), microbatch_size=3
    )
    function(ours.parameters(), batch(6))
    assert all(p.grad is None for p in [*ours.parameters(), *other.parameters()])


@pytest.mark.parametrize("dtype, count", [("float16", 4096), ("bfloat16", 1024)])
@pytest.mark.core
def test_denominators_in_half_precision(dtype, count):
    """Their sum is larger than the dtype can hold, or can hold exactly."""
    variable = keras.Variable(np.ones(1, "float32"))
    variables = [variable.value] if BACKEND == "jax" else [variable]

    def loss(variables, microbatch):
        weight = variable.value if variables is None else variables[0]
        mask = ops.cast(microbatch, dtype)
        return ops.sum(weight * microbatch), ops.sum(mask)

    data = ops.ones((count, 32))
    function = accumulated_value_and_grad(of_backend(loss), microbatch_size=7)
    value, (gradient,) = numbers(*function(variables, data))
    np.testing.assert_allclose(value, 1, rtol=1e-3)
    np.testing.assert_allclose(gradient, 1, rtol=1e-3)


@pytest.mark.skipif(BACKEND != "jax", reason="arguments of JAX's")
@pytest.mark.core
def test_any_argument_and_any_pytree_on_jax():
    import jax

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Microbatch:
        x: jax.Array

    def loss(variables, microbatch, function, double=False):
        value = ops.mean(function(microbatch.x) * variables["scale"])
        return value * 2 if double else value

    x = np.arange(5, dtype="float32")
    function = accumulated_value_and_grad(loss, microbatch_size=2)
    for run in function, jax.jit(function, static_argnums=2, static_argnames="double"):
        value, gradients = run({"scale": 3.0}, Microbatch(x), ops.square, double=True)
        np.testing.assert_allclose(value, 36, rtol=1e-6)
        np.testing.assert_allclose(gradients["scale"], 12, rtol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="compiled by its static arguments")
def test_floats_are_traced_and_what_shapes_are_made_of_is_static_on_jax():
    traces = []

    def loss(variables, microbatch, beta, width, squared=False, *, unit="one"):
        traces.append(width)
        factor = {"one": 1.0, "two": 2.0}[unit]
        value = ops.mean(microbatch * ops.ones((width,)) * variables["scale"]) * beta
        return factor * (value**2 if squared else value).real

    function = accumulated_value_and_grad(loss, microbatch_size=2)
    x, variables = np.ones((4, 1), "float32"), {"scale": np.float32(3)}
    for number in (float, np.float32, np.float64, complex):
        traces.clear()
        for i in range(6):
            beta = number(0.1 * i)
            value, _ = function(variables, x, beta, 5)
            np.testing.assert_allclose(value, 0.3 * i, rtol=1e-6)
        assert len(traces) <= 1  # NumPy's and Python's numbers may share a trace
    assert float(function(variables, x, 1.0, 2, True)[0]) == 9
    assert float(function(variables, x, 1.0, 2, np.True_, unit="two")[0]) == 18
    assert float(function(variables, x, 1.0, np.int64(3))[0]) == 3
    assert traces[1:] == [2, 2, 3]


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere random states move on")
@pytest.mark.parametrize("within", ["eager", "compiled"])
@pytest.mark.parametrize("kind", ["typed", "raw"])
def test_a_random_key_for_each_example_on_jax(within, kind):
    """With the code of the docstring, the masks are those of the batch."""
    import jax

    new = {"typed": jax.random.key, "raw": jax.random.PRNGKey}[kind]

    def apply(params, x, key):
        return params["scale"] * x * jax.random.bernoulli(key, 0.5, x.shape)

    def loss(params, microbatch, shared=None):
        x, y, keys = microbatch
        if shared is not None:
            keys = jax.random.split(shared, len(x))
        predictions = jax.vmap(apply, (None, 0, 0))(params, x, keys)
        return ((predictions - y) ** 2).mean(), predictions

    params = {"scale": np.float32(3)}
    x, y = np.ones((8, 16), "float32"), np.zeros((8, 16), "float32")
    data = x, y, jax.random.split(new(0), 8)
    function = accumulated_value_and_grad(loss, microbatch_size=2, has_aux=True)
    function = compiled(function) if within == "compiled" else function
    (value, masked), gradients = function(params, data)
    (full, expected), reference = jax.value_and_grad(loss, has_aux=True)(params, data)
    np.testing.assert_array_equal(masked, expected)
    np.testing.assert_allclose(value, full, rtol=1e-6)
    np.testing.assert_allclose(gradients["scale"], reference["scale"], rtol=1e-6)
    assert len(np.unique(masked, axis=0)) == 8
    # The docstring also describes a key that all micro-batches share.
    (_, masked), _ = function(params, data, new(1))
    assert len(np.unique(masked, axis=0)) == 2


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"microbatch_size": 0}, ValueError, "Received: microbatch_size=0"),
        ({"microbatch_size": 2.0}, TypeError, "Received: microbatch_size=2.0"),
        ({"accum_dtype": "int8"}, ValueError, "Received: accum_dtype='int8'"),
        ({"loss_fn": 3}, TypeError, "Received: loss_fn=3"),
    ],
)
def test_bad_arguments(arguments, error, message):
    arguments = {"loss_fn": lambda: 0, "microbatch_size": 2, **arguments}
    with pytest.raises(error, match=message):
        accumulated_value_and_grad(**arguments)


@pytest.mark.parametrize(
    "returned, has_aux",
    [
        (lambda x: ops.sum(x, axis=-1), False),
        (lambda x: (ops.sum(x), ops.sum(x), ops.sum(x)), False),
        (lambda x: ops.sum(x), True),
    ],
)
def test_losses_that_are_none(returned, has_aux):
    variables, predict = network()
    function = accumulated_value_and_grad(
        of_backend(
            lambda variables, microbatch: returned(predict(variables, microbatch[0]))
        ),
        microbatch_size=2,
        has_aux=has_aux,
    )
    with pytest.raises(ValueError, match=r"`loss_fn` must return .*Received: "):
        function(variables, batch(4))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of `tf.function` only")
def test_tensors_in_the_place_of_variables():
    import tensorflow as tf

    variables, predict = network()
    function = accumulated_value_and_grad(mean(predict), microbatch_size=2)
    with pytest.raises(TypeError, match=r"`variables`.*from outside.*Received: "):
        tf.function(lambda variables: function(variables, batch(4)))(variables)


@pytest.mark.core
def test_a_batch_without_examples():
    variables, predict = network()
    function = accumulated_value_and_grad(mean(predict), microbatch_size=2)
    with pytest.raises(ValueError, match=r"at least one example.*Received: "):
        function(variables, tuple(a[:0] for a in batch(2)))


@pytest.mark.core
def test_arrays_with_different_numbers_of_examples():
    variables, predict = network()
    x, y, weights = batch(6)
    function = accumulated_value_and_grad(mean(predict), microbatch_size=2)
    with pytest.raises(ValueError, match=r"same number of examples.*Received: "):
        function(variables, (x, y[:5], weights))


@pytest.mark.skipif(BACKEND != "torch", reason="others' functions are pure, or traced")
def test_a_microbatches_activations_are_gone_before_the_next():
    alive = []
    model = counting_activations(alive)
    loss = mean(lambda _, x: model(x, training=True))
    function = accumulated_value_and_grad(loss, microbatch_size=3)
    with collector(young=10**6):
        function(model.trainable_variables, batch(9, 0))
    assert alive == [0] * 3
