"""`accumulated_value_and_grad`: losses and batches that raise or warn."""

import inspect
import re
import typing

import numpy as np
import pytest
from helpers import BACKEND, array
from helpers.functional import VALUE, examples, mean, value_and_grad, variable
from keras import ops

from gradient_accumulator import accumulated_value_and_grad
from gradient_accumulator.functional import ValueAndGrad, ValueAuxAndGrad

pytestmark = pytest.mark.core


def ignored_means(weight, microbatch):
    """The mean over the examples that are not 0."""
    kept = ops.cast(microbatch[:, 0] != 0, "float32")
    return ops.sum(ops.matmul(microbatch, weight)[:, 0] * kept) / ops.sum(kept)


def ignored_pairs(weight, microbatch):
    kept = ops.cast(microbatch[:, 0] != 0, "float32")
    return ops.sum(ops.matmul(microbatch, weight)[:, 0] * kept), ops.sum(kept)


def test_the_mean_over_nothing_warns_and_names_the_pair():
    batch = np.full((6, 3), 0.5, "float32")
    batch[2:4] = 0  # the second micro-batch
    batch = ops.convert_to_tensor(batch)
    with pytest.warns(UserWarning, match="return a pair") as caught:
        value, _ = value_and_grad(ignored_means)(batch)
    assert [each.filename for each in caught] == [value_and_grad.__code__.co_filename]
    assert np.isnan(array(value))
    # Warnings are errors here. A pair does not warn, and is right.
    value, (gradient,) = value_and_grad(ignored_pairs)(batch)
    np.testing.assert_allclose(array(value), 3 * 0.5 * VALUE, rtol=1e-5)
    assert np.all(np.isfinite(array(gradient)))
    # A pair that is not a number for another reason does not warn either.
    value, _ = value_and_grad(lambda w, x: (mean(w, x) * np.nan, ops.sum(x)))(batch)
    assert np.isnan(array(value))


def test_the_mean_over_nothing_in_a_later_update_warns():
    function = value_and_grad(ignored_means)
    batch = np.full((4, 3), 0.5, "float32")
    for _ in range(3):
        function(ops.convert_to_tensor(batch))
    batch[:2] = 0
    with pytest.warns(UserWarning, match="return a pair"):
        for _ in range(3):  # on JAX the warning comes when the value is known
            value, _ = function(ops.convert_to_tensor(batch))
            array(value)


@pytest.mark.skipif(BACKEND != "jax", reason="its functions are pure")
def test_the_returned_loss_has_a_gradient():
    import jax

    def loss_fn(weight, microbatch):
        return ops.mean(ops.square(ops.matmul(microbatch, weight)))

    function = accumulated_value_and_grad(loss_fn, microbatch_size=2)
    batch, weight = np.arange(10.0).reshape(5, 2), np.ones(2)
    found = jax.grad(lambda weight: function(weight, batch)[0])(weight)
    expected = jax.grad(loss_fn)(weight, batch)
    np.testing.assert_allclose(array(found), array(expected), rtol=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="which compiles nothing here")
def test_compiled_functions_do_not_look():
    """While they are traced, values are not known (see the docstring)."""
    batch = ops.zeros((4, 3))
    if BACKEND == "jax":
        import jax

        function = jax.jit(
            accumulated_value_and_grad(
                lambda values, microbatch: ignored_means(values[0], microbatch),
                microbatch_size=2,
            )
        )
        value, _ = function([variable().value], batch)
    else:
        import tensorflow as tf

        value, _ = tf.function(value_and_grad(ignored_means))(batch)
    assert np.isnan(array(value))


@pytest.mark.skipif(BACKEND != "jax", reason="who donates arrays")
def test_a_loss_that_was_donated():
    function = value_and_grad(mean)
    for _ in range(3):
        value, _ = function(examples())
        value.delete()
    function(examples())


class Named(typing.NamedTuple):
    x: typing.Any
    name: typing.Any


@pytest.mark.parametrize(
    "more, place, error",
    [
        ("abc", r"batch['more']='abc' (of type str)", TypeError),
        (4, r"batch['more']=4 (of type int)", TypeError),
        (["a", "b"], r"batch['more'][0]='a' (of type str)", TypeError),
        ({"deep": (None, 2.5)}, r"batch['more']['deep'][1]=2.5", TypeError),
        (np.float32(3), r"batch['more']=<float32 of shape (), float32>", ValueError),
    ],
)
def test_what_is_no_array_in_a_batch_is_named(more, place, error):
    with pytest.raises(error, match=re.escape(f"Received: {place}")) as caught:
        value_and_grad(mean)({"x": examples(), "more": more})
    assert "further argument" in str(caught.value)


def test_a_batch_that_is_no_array():
    with pytest.raises(TypeError, match=re.escape("Received: batch=4 ")):
        value_and_grad(mean)(4)
    with pytest.raises(TypeError, match=re.escape("Received: batch[1]='a' ")):
        value_and_grad(mean)(Named(examples(), "a"))


@pytest.mark.parametrize(
    "more",
    [
        lambda loss, x: {"loss": loss},
        lambda loss, x: (loss, x),
        lambda loss, x: (loss, {"x": x}),
        lambda loss, x: (loss, 1.0, x),
        lambda loss, x: [loss, x],
    ],
)
def test_more_than_a_loss_names_has_aux(more):
    with pytest.raises(ValueError, match=r"`has_aux=True`.*Received: "):
        value_and_grad(lambda w, x: more(mean(w, x), x))(examples())


@pytest.mark.parametrize("returned", [None, "loss", lambda: 0])
def test_a_loss_that_is_none(returned):
    with pytest.raises(ValueError, match=r"must return a scalar.*Received: ") as caught:
        value_and_grad(lambda w, x: returned)(examples())
    assert "has_aux" not in str(caught.value)


@pytest.mark.skipif(BACKEND != "torch", reason="others convert what they are given")
def test_a_loss_of_arrays_that_are_not_pytorchs():
    function = accumulated_value_and_grad(
        lambda microbatch: microbatch.mean(), microbatch_size=2
    )
    with pytest.raises(TypeError, match=r"tensor of PyTorch's.*Received: <float32"):
        function([variable()], np.ones((4, 3), "float32"))


def test_types_say_what_is_returned():
    returned = typing.get_type_hints(accumulated_value_and_grad)["return"]
    assert set(typing.get_args(returned)) == {ValueAndGrad, ValueAuxAndGrad}
    hints = typing.get_type_hints(ValueAndGrad.__call__)
    assert hints["return"] == tuple[typing.Any, typing.Any]
    hints = typing.get_type_hints(ValueAuxAndGrad.__call__)
    inner = tuple[typing.Any, typing.Any]
    assert hints["return"] == tuple[inner, typing.Any]
    function = accumulated_value_and_grad(lambda *_: 0.0, microbatch_size=2)
    names = [*inspect.signature(function).parameters]
    assert ["self", *names] == [*inspect.signature(ValueAndGrad.__call__).parameters]
