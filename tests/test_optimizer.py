"""`GradientAccumulateOptimizer`: equal micro-batches give the result of the batch."""

import functools
import warnings

import keras
import numpy as np
import pytest
from helpers import BACKEND, array, arrays, assert_close, core_on
from helpers.loops import data
from helpers.optimizers import fit, model_of, state, step
from keras import ops

from gradient_accumulator import FlushGradients, GradientAccumulateOptimizer

pytestmark = core_on("torch")


# ------------------------------------------------------------- the ways to call `fit`


ADAM = functools.partial(
    keras.optimizers.Adam,
    0.05,
    epsilon=1e-2,
    global_clipnorm=0.5,
    weight_decay=0.05,
    use_ema=True,
    ema_overwrite_frequency=2,
)

# Arguments of `compile`, and whether PyTorch has it: its compiler takes minutes on a
# processor, and it runs eagerly, a step at a time.
MODES = {
    "compiled": ({"jit_compile": True}, False),
    "not_compiled": ({"jit_compile": False}, True),
    "steps_per_execution": ({"steps_per_execution": 3}, False),
    "eagerly": ({"run_eagerly": True}, False),
}


@pytest.mark.parametrize(
    "mode",
    [mode for mode, (_, on_torch) in MODES.items() if on_torch or BACKEND != "torch"],
)
@pytest.mark.core
def test_every_way_to_run(mode):
    arguments, _ = MODES[mode]
    plain = model_of(ADAM(), **arguments)
    expected = fit(plain, 8)
    ours = model_of(GradientAccumulateOptimizer(ADAM(), 4), **arguments)
    got = fit(ours, 2)
    assert_close(state(ours), state(plain))
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-5)


def test_one_call_an_update_is_plain_training():
    plain, ours = model_of(ADAM()), model_of(GradientAccumulateOptimizer(ADAM()))
    fit(plain, 8)
    fit(ours, 8)
    assert_close(state(ours), state(plain))
    assert ours.optimizer.pending == 0


# ------------------------------------------------------- what waits for its update


def test_nothing_of_the_inner_optimizer_runs_before():
    optimizer = GradientAccumulateOptimizer(ADAM(), 3)
    weight = keras.Variable(np.ones(4, "float32"))
    optimizer.build([weight])
    before = arrays([weight, *optimizer.inner_optimizer.variables])
    for pending in 1, 2:
        step(optimizer, [np.ones(4, "float32")], [weight])
        assert optimizer.pending == pending
        after = arrays([weight, *optimizer.inner_optimizer.variables])
        assert_close(after, before)
    step(optimizer, [np.ones(4, "float32")], [weight])
    assert optimizer.pending == 0
    assert int(array(optimizer.iterations)) == 1
    assert np.all(array(weight) < 1)


@pytest.mark.parametrize("left", [1, 2])
def test_flush_weighs_by_the_microbatches_that_there_were(left):
    weight, reference = (keras.Variable(np.ones(4, "float32")) for _ in range(2))
    optimizer = GradientAccumulateOptimizer(ADAM(), 3)
    plain = ADAM()
    optimizer.build([weight])
    plain.build([reference])
    gradients = np.random.default_rng(0).normal(size=(left, 4)).astype("float32")
    for gradient in gradients:
        step(optimizer, [gradient], [weight])
    optimizer.flush()
    step(plain, [gradients.mean(axis=0)], [reference])
    assert_close({"w": array(weight)}, {"w": array(reference)})
    assert optimizer.pending == 0
    optimizer.flush()  # nothing waits
    assert int(array(optimizer.iterations)) == 1


def test_reset_forgets():
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    weight = keras.Variable(np.ones(4, "float32"))
    optimizer.build([weight])
    step(optimizer, [np.full(4, 7, "float32")], [weight])
    optimizer.reset()
    assert optimizer.pending == 0
    for _ in range(2):
        step(optimizer, [np.ones(4, "float32")], [weight])
    assert_close({"w": array(weight)}, {"w": np.zeros(4)})


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@core_on("jax", "torch")
def test_flush_gradients_at_each_epochs_end(validation, scaled):
    """The 20 examples are in batches of 8, 8 and 4, in micro-batches of 2."""
    extra = {"validation_data": data(8)} if validation else {}
    plain = model_of(ADAM())
    expected = fit(plain, 8, count=20, **extra)
    optimizer = GradientAccumulateOptimizer(ADAM(), 4)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)
    ours = model_of(optimizer)
    got = fit(ours, 2, count=20, callbacks=[FlushGradients()], **extra)
    assert_close(arrays(ours.weights), arrays(plain.weights))
    for name in expected if validation else ():
        if name.startswith("val_"):
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)


def test_without_flushing_microbatches_wait_for_the_next_epoch():
    ours = model_of(GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 4))
    fit(ours, 2, count=20, epochs=1)
    assert ours.optimizer.pending == 2
    fit(ours, 2, count=20, epochs=1)
    assert ours.optimizer.pending == 0
    assert int(array(ours.optimizer.iterations)) == 5


def test_flush_gradients_needs_what_accumulates():
    with pytest.raises(ValueError, match=r"GradientAccumulateOptimizer.*Received: opt"):
        fit(model_of("sgd"), 2, callbacks=[FlushGradients()])


@pytest.mark.skipif(BACKEND == "jax", reason="a function of JAX's has one graph")
def test_no_gradient_in_a_later_update_is_none():
    """Plain Keras then does not change the variable and its momentum."""
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0, 0.9), 2)
    a, b = variables = [keras.Variable(np.ones(2, "float32"), name=n) for n in "ab"]
    optimizer.build(variables)
    one = np.ones(2, "float32")
    for of_b in (None, one, None, None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns that there is none
            step(optimizer, [one, of_b], variables)
    assert_close({"b": array(b)}, {"b": np.full(2, 0.5)})
    assert_close({"a": array(a)}, {"a": np.full(2, -1.9)})


@pytest.mark.skipif(BACKEND != "tensorflow", reason="variables of TensorFlow's")
def test_plain_variables():
    import tensorflow as tf

    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    weight = tf.Variable(np.ones(2, "float32"))
    for _ in range(2):
        optimizer.apply_gradients([(tf.ones(2), weight)])
    np.testing.assert_allclose(weight.numpy(), 0)


# ------------------------------------------------------------------------- weights


@pytest.mark.parametrize("reduction", ["MEAN", "SUM"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.core
def test_a_weight_tells_what_a_microbatch_is_worth(reduction, steps):
    r = np.random.default_rng(0)
    gradients = r.normal(size=(steps, 4)).astype("float32")
    weights = [2.0, 0, ops.convert_to_tensor(5.0)][-steps:]
    numbers = np.array([2.0, 0.0, 5.0])[-steps:]
    weight = keras.Variable(np.ones(4, "float32"))
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), steps, reduction)
    optimizer.build([weight])
    for gradient, each in zip(gradients, weights):
        step(optimizer, [gradient], [weight], weight=each)
    total = (numbers[:, None] * gradients).sum(axis=0)
    expected = total / numbers.sum() if reduction == "MEAN" else total
    assert_close({"w": array(weight)}, {"w": 1 - expected})


def test_microbatches_without_weight_are_an_update_of_zero():
    weight = keras.Variable(np.ones(4, "float32"))
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    optimizer.build([weight])
    for _ in range(2):
        step(optimizer, [np.ones(4, "float32")], [weight], weight=0.0)
    assert_close({"w": array(weight)}, {"w": np.ones(4)})
    assert int(array(optimizer.iterations)) == 1


@pytest.mark.parametrize("reduction", ["MEAN", "SUM"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("none", [0.0, "tensor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_over_nothing_counts_for_nothing(reduction, steps, none, dtype):
    """If a micro-batch is all padding, its gradient is 0 / 0."""
    none = ops.zeros(()) if none == "tensor" else none
    weight = keras.Variable(np.ones(4, "float32"), dtype=dtype)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), steps, reduction)
    optimizer.build([weight])
    nothing = np.array([np.nan, np.inf, -np.inf, 1], "float32")
    microbatches = [(np.ones(4), 2.0), (nothing, none), (nothing, none)]
    for gradient, each in microbatches[-steps:]:
        gradient = ops.cast(gradient, dtype)
        step(optimizer, [gradient], [weight], weight=each)
    moved = {"MEAN": 1, "SUM": 2}[reduction] if steps == 3 else 0
    expected = np.full(4, 1.0 - moved)
    np.testing.assert_array_equal(np.asarray(array(weight), "float32"), expected)


def test_what_is_not_finite_of_a_microbatch_with_weight_is_seen():
    scaler = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1.0), initial_scale=8.0
    )
    optimizer = GradientAccumulateOptimizer(scaler, 2)
    weight = keras.Variable(np.ones(4, "float32"))
    optimizer.build([weight])
    for microbatch, worth in (np.nan, 1.0), (np.nan, 0.0):
        step(optimizer, [np.full(4, microbatch, "float32")], [weight], weight=worth)
    np.testing.assert_array_equal(array(weight), np.ones(4))
    assert float(scaler.dynamic_scale.numpy()) == 4


@pytest.mark.skipif(BACKEND != "tensorflow", reason="slices are TensorFlow's")
@pytest.mark.parametrize("steps", [1, 2])
def test_slices_of_a_microbatch_without_weight(steps):
    import tensorflow as tf

    weight = keras.Variable(np.ones((3, 2), "float32"))
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), steps)
    optimizer.build([weight])

    def slices(value):
        return tf.IndexedSlices(tf.fill((2, 2), value), tf.constant([1, 1]), (3, 2))

    for value, each in [(1.0, 2.0), (np.nan, 0.0)][-steps:]:
        optimizer.apply([slices(value)], [weight], weight=each)
    moved = np.zeros((3, 2))
    moved[1] = 2 if steps == 2 else 0
    np.testing.assert_array_equal(array(weight), 1 - moved)


@pytest.mark.parametrize(
    "weight", [-1, float("nan"), float("inf"), True, "2", np.ones(3, "float32")]
)
@pytest.mark.core
def test_weights_that_are_none(weight):
    variable = keras.Variable(np.ones(4, "float32"))
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    with pytest.raises((ValueError, TypeError), match=r"`weight`.*Received: weight"):
        optimizer.apply([np.ones(4, "float32")], [variable], weight=weight)
    assert optimizer.pending == 0
