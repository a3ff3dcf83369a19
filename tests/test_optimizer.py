"""`GradientAccumulateOptimizer`: equal micro-batches give what the batch gives."""

import functools
import warnings

import keras
import numpy as np
import problems
import pytest
from helpers import (
    BACKEND,
    array,
    arrays,
    assert_close,
    assert_same,
    core_on,
    even,
    named,
    train,
    with_optimizer,
)
from keras import ops

from gradient_accumulator import (
    FlushGradients,
    GradientAccumulateOptimizer,
    accumulate,
)

pytestmark = core_on("torch")


# ------------------------------------------------------------------------ loss scaling


def around(optimizer, steps):
    """A `LossScaleOptimizer` around what accumulates, in the place of one inside."""
    config = optimizer.get_config()
    config["inner_optimizer"] = GradientAccumulateOptimizer(
        optimizer.inner_optimizer, steps
    )
    return type(optimizer)(**config)


@pytest.mark.parametrize("name", [p.name for p in problems.here() if p.scaler_around])
@pytest.mark.core
def test_a_loss_scale_optimizer_around(name):
    problem = named(name)
    batch, microbatches = even(problem)
    reference = train(problem, [batch])
    wrapped = with_optimizer(problem, lambda o: around(o, len(microbatches)))
    assert_same(train(wrapped, microbatches), reference)


@pytest.mark.parametrize("order", ["inside", "around"])
@pytest.mark.core
def test_an_overflow_in_one_microbatch_skips_the_update_and_lowers_the_scale_once(
    order,
):
    inner = keras.optimizers.SGD(0.1)
    if order == "inside":
        scaler = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
        optimizer = GradientAccumulateOptimizer(scaler, 3)
    else:
        accumulating = GradientAccumulateOptimizer(inner, 3)
        scaler = optimizer = keras.optimizers.LossScaleOptimizer(
            accumulating, initial_scale=8.0
        )
    weight = keras.Variable(np.ones(2, "float32"))
    optimizer.build([weight])
    for microbatch in [1.0, np.inf, 1.0]:
        step(optimizer, [np.full(2, 8 * microbatch, "float32")], [weight])
    assert_close({"w": array(weight)}, {"w": np.ones(2)})
    assert float(scaler.dynamic_scale.numpy()) == 4
    assert int(array(scaler.iterations)) == 0
    for _ in range(3):
        step(optimizer, [np.full(2, 4.0, "float32")], [weight])
    assert_close({"w": array(weight)}, {"w": np.full(2, 0.9)})
    assert float(scaler.dynamic_scale.numpy()) == 4


def step(optimizer, gradients, variables, **arguments):
    """One call with tensors, without effects on JAX, whose branches want it."""
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


@pytest.mark.parametrize("inside", [False, True])
def test_the_policy_mixed_float16_puts_one_around(inside):
    def build():
        keras.utils.set_random_seed(0)
        dtype = keras.DTypePolicy("mixed_float16")
        return keras.Sequential(
            [keras.layers.Input((6,)), keras.layers.Dense(3, dtype=dtype)], name="m"
        )

    def trained(optimizer, size):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = build()
            model.compile(optimizer, "mse")
        finally:
            keras.config.set_dtype_policy("float32")
        x, y = whole()
        model.fit(x, y, batch_size=size, shuffle=False, verbose=0, epochs=2)
        return model

    plain = trained(keras.optimizers.SGD(0.5), 12)
    ours = trained(GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), 3), 4)
    assert isinstance(ours.optimizer, keras.optimizers.LossScaleOptimizer)
    assert int(array(ours.optimizer.iterations)) == int(
        array(plain.optimizer.iterations)
    )
    assert int(array(ours.optimizer.step_counter)) == 4
    for a, b in zip(ours.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(a, b, atol=2e-3)  # float16 rounds the gradients


@pytest.mark.parametrize("order", ["around", "both"])
@pytest.mark.core
def test_a_loss_scale_optimizer_around_flushes_and_resets(order):
    inner = keras.optimizers.SGD(1.0)
    if order == "both":
        inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    inner = GradientAccumulateOptimizer(inner, 3)
    scaler = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    weight = keras.Variable(np.ones(2, "float32"))
    scaler.build([weight])
    step(scaler, [np.full(2, 8.0, "float32")], [weight])
    assert scaler.inner_optimizer.pending == 1
    scaler.reset()
    assert scaler.inner_optimizer.pending == 0
    for gradient, worth in (16.0, 1.0), (8.0, 3.0):
        step(scaler, [np.full(2, gradient, "float32")], [weight], weight=worth)
    scaler.flush()
    assert scaler.inner_optimizer.pending == 0
    np.testing.assert_allclose(array(weight), 1 - 1.25)


@pytest.mark.parametrize("scaled", [False, True])
def test_averages_of_the_weights_are_swapped(scaled):
    def trained(size, wrap):
        optimizer = wrap(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5))
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8)
        model = model_of(optimizer)
        callback = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        fit(model, size, epochs=1, callbacks=[callback])
        return arrays(model.weights)

    plain = trained(8, lambda inner: inner)
    ours = trained(2, lambda inner: GradientAccumulateOptimizer(inner, 4))
    assert_close(ours, plain)


# ------------------------------------------------------------- the ways to call `fit`


def whole(count=24):
    r = np.random.default_rng(0)
    x = problems.normal(r, count, problems.FEATURES)
    return x, np.tanh(x[:, :3] + problems.normal(r, count, 3))


ADAM = functools.partial(
    keras.optimizers.Adam,
    0.05,
    epsilon=1e-2,
    global_clipnorm=0.5,
    weight_decay=0.05,
    use_ema=True,
    ema_overwrite_frequency=2,
)


def model_of(optimizer, **arguments):
    model = problems.mlp()()
    model.compile(optimizer, "mse", metrics=["mae"], **arguments)
    return model


def state(model):
    """Weights and state of a model, but what accumulation adds."""
    optimizer = model.optimizer
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return {
        **arrays(model.weights),
        **{f"o{k}": v for k, v in arrays(inner.variables).items()},
    }


def fit(model, size, count=24, **arguments):
    x, y = whole(count)
    arguments = {"epochs": 2, "shuffle": False, "verbose": 0, **arguments}
    return model.fit(x, y, batch_size=size, **arguments).history


MODES = {"compiled": {"jit_compile": True}, "not_compiled": {"jit_compile": False}}
if BACKEND != "torch":
    MODES["steps_per_execution"] = {"steps_per_execution": 3}
    MODES["eagerly"] = {"run_eagerly": True}
else:
    MODES.pop("compiled")  # PyTorch's compiler takes minutes on a processor


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.core
def test_every_way_to_run(mode):
    plain = model_of(ADAM(), **MODES[mode])
    expected = fit(plain, 8)
    ours = model_of(GradientAccumulateOptimizer(ADAM(), 4), **MODES[mode])
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
    """20 examples: batches of 8, 8 and 4, micro-batches of 2."""
    extra = {"validation_data": whole(8)} if validation else {}
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
    """As in plain Keras, which then leaves the variable and its momentum alone."""
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0, 0.9), 2)
    a, b = variables = [keras.Variable(np.ones(2, "float32"), name=n) for n in "ab"]
    optimizer.build(variables)
    one = np.ones(2, "float32")
    for of_b in (None, one, None, None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras says that there is none
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
    """The gradient of a micro-batch that is all padding is 0 / 0."""
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


# --------------------------------------------------------- learning rates, configs


def test_the_learning_rate_is_the_inner_optimizers():
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), 2)
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == 0.5
    optimizer.learning_rate = 0.25
    assert float(ops.convert_to_numpy(optimizer.inner_optimizer.learning_rate)) == 0.25
    optimizer.lr = 0.125
    assert float(ops.convert_to_numpy(optimizer.lr)) == 0.125


@pytest.mark.parametrize("way", ["scheduler", "plateau"])
def test_callbacks_that_look_for_a_learning_rate(way):
    def callback():
        if way == "scheduler":
            return keras.callbacks.LearningRateScheduler(
                lambda epoch: 0.2 / (1 + epoch)
            )
        return keras.callbacks.ReduceLROnPlateau(
            monitor="loss", factor=0.5, patience=0, min_delta=10.0
        )

    plain = model_of(keras.optimizers.SGD(0.3))
    expected = fit(plain, 8, epochs=4, callbacks=[callback()])
    ours = model_of(GradientAccumulateOptimizer(keras.optimizers.SGD(0.3), 4))
    got = fit(ours, 2, epochs=4, callbacks=[callback()])
    assert_close(state(ours), state(plain))
    np.testing.assert_allclose(got["learning_rate"], expected["learning_rate"])
    assert len(set(got["learning_rate"])) > 1


def test_config():
    optimizer = GradientAccumulateOptimizer(
        keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.9)),
        accum_steps=4,
        reduction="SUM",
        name="mine",
        accum_dtype="float64",
    )
    again = GradientAccumulateOptimizer.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert type(again.inner_optimizer) is type(optimizer.inner_optimizer)
    by_name = keras.optimizers.get(keras.optimizers.serialize(optimizer))
    assert by_name.get_config() == optimizer.get_config()


@pytest.mark.parametrize("inner", ["Adam", {"class_name": "Adam", "config": {}}])
def test_an_optimizer_by_name_or_config(inner):
    optimizer = GradientAccumulateOptimizer(inner, accum_steps=2)
    assert isinstance(optimizer.inner_optimizer, keras.optimizers.Adam)


@pytest.mark.parametrize("scaled", ["no", "inside", "around"])
@pytest.mark.core
def test_saved_in_the_middle_of_an_accumulation(scaled, tmp_path):
    def optimizer():
        # Without averages: plain Keras cannot call `fit` twice with them on JAX.
        inner = keras.optimizers.Adam(0.05, global_clipnorm=0.5)
        if scaled == "inside":
            inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
        outer = GradientAccumulateOptimizer(inner, 4)
        if scaled == "around":
            outer = keras.optimizers.LossScaleOptimizer(outer, initial_scale=8.0)
        return outer

    def pending(model):
        outer = model.optimizer
        return (outer.inner_optimizer if scaled == "around" else outer).pending

    uninterrupted = model_of(optimizer())
    fit(uninterrupted, 2, count=12, epochs=1)
    assert pending(uninterrupted) == 2
    uninterrupted.save(tmp_path / "m.keras")
    resumed = keras.saving.load_model(tmp_path / "m.keras")
    assert pending(resumed) == 2
    for model in uninterrupted, resumed:
        fit(model, 2, count=20, epochs=1)
    assert pending(resumed) == 0
    assert_close(arrays(resumed.weights), arrays(uninterrupted.weights))
    assert_close(
        arrays(resumed.optimizer.variables), arrays(uninterrupted.optimizer.variables)
    )


def test_flushed_in_every_epoch_and_after_reset():
    ours = model_of(GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), 4))
    plain = model_of(keras.optimizers.SGD(0.5))
    fit(ours, 2, count=20, epochs=3, callbacks=[FlushGradients()])
    fit(plain, 8, count=20, epochs=3)
    assert_close(arrays(ours.weights), arrays(plain.weights))
    before = ours.get_weights()
    fit(ours, 2, count=6, epochs=1)
    ours.optimizer.reset()
    fit(ours, 2, count=4, epochs=1)
    fit(plain, 4, count=4, epochs=1)
    ours.optimizer.flush()
    assert_close(arrays(ours.weights), arrays(plain.weights))
    assert any(np.any(a != b) for a, b in zip(before, ours.get_weights()))


def test_flushed_after_loading(tmp_path):
    model = model_of(GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), 4))
    fit(model, 2, count=12, epochs=1)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    before = arrays(loaded.weights)
    for each in model, loaded:
        each.optimizer.flush()
    assert_close(arrays(loaded.weights), arrays(model.weights))
    assert any(np.any(before[k] != v) for k, v in arrays(loaded.weights).items())


# ----------------------------------------------------------------------------- errors


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
    """Makes compiled functions that `apply` gradients of 1, or flush."""

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
    """Two tasks, each of which leaves the other's variable out."""
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
    if not flushed:  # what had no gradient of any micro-batch is left alone
        of_a()
        of_a()
        np.testing.assert_allclose(array(a), value / 2 - 1)
        np.testing.assert_allclose(array(b), value)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of `tf.function` only")
@pytest.mark.parametrize("compiled", [False, True])
def test_flush_after_compiled_functions_of_other_variables(compiled):
    """The variables of what waits, not those of the function compiled last."""
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
    assert optimizer.pending == 1  # nothing lost
    optimizer.apply([gradient], [a])
    assert_close({"a": array(a), "b": array(b)}, {"a": np.zeros(2), "b": np.ones(2)})
    for _ in range(2):  # nothing waits
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
