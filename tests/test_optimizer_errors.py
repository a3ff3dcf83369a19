"""`GradientAccumulateOptimizer`: its errors, and its state after them."""

import keras
import numpy as np
import pytest
from helpers import BACKEND, array, assert_close, core_on
from helpers.optimizers import fit, model_of, step
from keras import ops

from gradient_accumulator import GradientAccumulateOptimizer, accumulate

pytestmark = core_on("torch")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"accum_steps": 0}, ValueError, r"`accum_steps`.*Received: accum_steps=0"),
        ({"accum_steps": -1}, ValueError, r"`accum_steps`.*Received: accum_steps=-1"),
        ({"accum_steps": 2.0}, TypeError, r"`accum_steps`.*Received: accum_steps=2.0"),
        ({"accum_steps": np.True_}, TypeError, r"Received: accum_steps=.*True"),
        (
            {"accum_steps": True},
            TypeError,
            r"`accum_steps`.*Received: accum_steps=True",
        ),
        ({"accum_steps": "2"}, TypeError, r"`accum_steps`.*Received: accum_steps='2'"),
        ({"reduction": "AVG"}, ValueError, r"`reduction`.*Received: reduction='AVG'"),
        ({"accum_dtype": "int8"}, ValueError, "`accum_dtype`.*Received: accum_dtype="),
        ({"optimizer": "none"}, ValueError, "`optimizer`.*Received: optimizer='none'"),
        ({"optimizer": None}, TypeError, "`optimizer`.*Received: optimizer=None"),
        ({"optimizer": {"a": 1}}, ValueError, "`optimizer`.*Received: optimizer="),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        GradientAccumulateOptimizer(**arguments)


@pytest.mark.parametrize(
    "module, sentence",
    [
        ("torch.optim.adam", "optimizer of PyTorch's"),
        ("tf_keras.src.optimizers.adam", "optimizer of Keras 2's"),
        ("keras.optimizers.legacy", "optimizer of Keras 2's"),
    ],
)
@pytest.mark.core
def test_optimizers_of_others_get_a_sentence_of_their_own(module, sentence):
    other = type("Adam", (), {"__module__": module})()
    with pytest.raises(TypeError, match=f"{sentence}.*Received: optimizer="):
        GradientAccumulateOptimizer(other)


@pytest.mark.parametrize(
    "inner",
    [
        lambda: keras.optimizers.SGD(gradient_accumulation_steps=2),
        lambda: GradientAccumulateOptimizer("sgd", 2),
        lambda: keras.optimizers.LossScaleOptimizer(
            GradientAccumulateOptimizer("sgd", 2)
        ),
    ],
)
@pytest.mark.core
def test_an_optimizer_that_accumulates_already(inner):
    with pytest.raises(ValueError, match=r"accumulates already.*Received: "):
        GradientAccumulateOptimizer(inner(), 2)


def test_a_model_that_accumulates_too():
    model = accumulate(model_of(GradientAccumulateOptimizer("sgd", 2)), accum_steps=2)
    with pytest.raises(ValueError, match=r"The model accumulates.*accum_steps=2"):
        fit(model, 2)


@pytest.mark.core
def test_the_inner_one_of_a_loss_scale_optimizer_is_not_called():
    inner = GradientAccumulateOptimizer("sgd", 2)
    outer = keras.optimizers.LossScaleOptimizer(inner)
    outer.build([keras.Variable(np.ones(2, "float32"))])
    with pytest.raises(ValueError, match=r"give that one.*Received: "):
        inner.apply([ops.ones((2,))])
    assert inner.pending == 0


@pytest.mark.core
def test_an_update_that_fails_leaves_all_as_it_was():
    class Fails(keras.optimizers.SGD):
        failing = True

        def update_step(self, *args):
            if self.failing:
                raise RuntimeError("no update")
            super().update_step(*args)

        def _parallel_update_step(self, grads, variables, learning_rate):
            for gradient, variable in zip(grads, variables):
                self.update_step(gradient, variable, learning_rate)

    inner = Fails(1.0)
    optimizer = GradientAccumulateOptimizer(inner, 2)
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer.build([variable])
    optimizer.apply([ops.ones((2,))], [variable])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no update"):
            optimizer.apply([ops.ones((2,)) * 5], [variable])
        assert optimizer.pending == 1
    inner.failing = False
    optimizer.apply([ops.ones((2,)) * 3], [variable])
    assert optimizer.pending == 0
    np.testing.assert_allclose(array(variable), -2, rtol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of `tf.function` only")
@pytest.mark.core
def test_variables_that_change_between_compiled_functions():
    import tensorflow as tf

    optimizer, (a, b) = two_variables()

    def compiled(variable):
        return tf.function(lambda: optimizer.apply([tf.ones(2)], [variable]))

    of_a, of_b = compiled(a), compiled(b)
    for function in of_a, of_a, of_b, of_b:
        function()
    of_a()
    with pytest.raises(tf.errors.InvalidArgumentError, match="variables changed"):
        of_b()
    assert optimizer.pending == 1


def compiled_calls(optimizer, variables):
    """Returns a function that makes compiled functions: apply ones, or flush."""

    def of_tensorflow(pattern):
        import tensorflow as tf

        if pattern == "flush":
            return tf.function(optimizer.flush)
        gradients = [g and tf.ones(2) for g in pattern]
        return tf.function(lambda: optimizer.apply(gradients, variables))

    def of_jax(pattern):
        import jax

        @jax.jit
        def pure(state, values):
            if pattern == "flush":
                return optimizer.stateless_flush(state, values)
            gradients = [g and ops.ones((2,)) for g in pattern]
            return optimizer.stateless_apply(state, gradients, values)

        def function():
            owned = optimizer.variables
            new, state = pure([v.value for v in owned], [v.value for v in variables])
            for variable, value in zip([*variables, *owned], [*new, *state]):
                variable.assign(value)

        return function

    return of_tensorflow if BACKEND == "tensorflow" else of_jax


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.skipif(BACKEND == "torch", reason="runs calls as they are")
@pytest.mark.parametrize("flushed", [False, True])
def test_compiled_functions_with_gradients_of_other_variables(flushed):
    """There are two tasks, and the loss of each does not use the other's variable."""
    inner = keras.optimizers.SGD(1.0, weight_decay=0.5)
    optimizer = GradientAccumulateOptimizer(inner, 4 if flushed else 2)
    a, b = variables = [keras.Variable(np.ones(2, "float32"), name=n) for n in "ab"]
    optimizer.build(variables)
    compiled = compiled_calls(optimizer, variables)
    of_a, of_b = compiled((1, None)), compiled((None, 1))
    flush = compiled("flush") if flushed else lambda: None
    value = np.ones(2)
    for functions in (of_a, of_b), (of_b, of_a):
        for function in (*functions, flush):
            function()
        assert optimizer.pending == 0
        value = value / 2 - 0.5  # the decay, and the mean of 1 and 0
        for variable in variables:
            np.testing.assert_allclose(array(variable), value)
    if not flushed:  # a variable without a gradient in any micro-batch stays
        of_a()
        of_a()
        np.testing.assert_allclose(array(a), value / 2 - 1)
        np.testing.assert_allclose(array(b), value)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of `tf.function` only")
@pytest.mark.parametrize("compiled", [False, True])
def test_flush_after_compiled_functions_of_other_variables(compiled):
    """It updates the summed variables, and not those of the last compiled function."""
    import tensorflow as tf

    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0, 0.5), 2)
    a, b = variables = [keras.Variable(np.zeros(2, "float32"), name=n) for n in "ab"]
    optimizer.build(variables)
    of_a, of_b = (compiled_calls(optimizer, [v])((1,)) for v in variables)
    for function in of_a, of_a, of_b, of_b, of_a:
        function()
    (tf.function(optimizer.flush) if compiled else optimizer.flush)()
    assert optimizer.pending == 0
    np.testing.assert_allclose(array(a), -2.5)
    np.testing.assert_allclose(array(b), -1)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.core
def test_no_gradient_is_none_after_loading_too():
    def built():
        inner = keras.optimizers.SGD(1.0, weight_decay=0.5)
        optimizer = GradientAccumulateOptimizer(inner, 2)
        variables = [keras.Variable(np.ones(2, "float32"), name=n) for n in "ab"]
        optimizer.build(variables)
        return optimizer, variables

    optimizer, variables = built()
    step(optimizer, [np.ones(2, "float32"), None], variables)
    optimizer.save_own_variables(store := {})
    optimizer, (a, b) = built()
    optimizer.load_own_variables(store)
    optimizer.flush()
    np.testing.assert_allclose(array(a), -0.5)
    np.testing.assert_allclose(array(b), 1)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="works elsewhere")
@pytest.mark.core
def test_no_stateless_apply_on_tensorflow():
    optimizer, variables = two_variables()
    with pytest.raises(ValueError, match=r"`stateless_apply`.*Received: "):
        optimizer.stateless_apply(optimizer.variables, [ops.ones((2,))] * 2, variables)
    assert optimizer.pending == 0


def two_variables():
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    variables = [keras.Variable(np.ones(2, "float32"), name=n) for n in "ab"]
    optimizer.build(variables)
    return optimizer, variables


@pytest.mark.core
def test_variables_that_change_while_microbatches_wait():
    optimizer, (a, b) = two_variables()
    gradient = ops.ones((2,))
    optimizer.apply([gradient], [a])
    with pytest.raises(ValueError, match=r"variables changed.*Received: .*b.*a"):
        optimizer.apply([gradient], [b])
    assert optimizer.pending == 1  # the sum is not lost
    optimizer.apply([gradient], [a])
    assert_close({"a": array(a), "b": array(b)}, {"a": np.zeros(2), "b": np.ones(2)})
    for _ in range(2):  # the next update may have other variables
        optimizer.apply([gradient], [b])
    assert_close({"a": array(a), "b": array(b)}, {"a": np.zeros(2), "b": np.zeros(2)})


@pytest.mark.parametrize(
    "gradients, names, message",
    [
        ([np.ones(2)], "ab", "one gradient for each variable.*Received: 1"),
        ([np.ones(3), np.ones(2)], "ab", r"shape.*Received: .*\(3,\)"),
        ([np.ones(2)], "c", "built with.*Received: unknown variables"),
    ],
)
@pytest.mark.core
def test_gradients_that_do_not_fit(gradients, names, message):
    optimizer, variables = two_variables()
    by_name = dict(zip("ab", variables))
    by_name["c"] = keras.Variable(np.ones(2, "float32"), name="c")
    gradients = [ops.convert_to_tensor(g.astype("float32")) for g in gradients]
    with pytest.raises(ValueError, match=message):
        optimizer.apply(gradients, [by_name[n] for n in names])
    assert optimizer.pending == 0


@pytest.mark.core
def test_not_built():
    with pytest.raises(ValueError, match=r"not built.*Received: "):
        GradientAccumulateOptimizer("sgd", 2).apply([ops.ones((2,))])
