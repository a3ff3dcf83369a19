"""`GradientAccumulateOptimizer`: its learning rate, its config, its files."""

import keras
import numpy as np
import pytest
from helpers import arrays, assert_close, core_on
from helpers.optimizers import fit, model_of, state
from keras import ops

from gradient_accumulator import FlushGradients, GradientAccumulateOptimizer

pytestmark = core_on("torch")


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
        # It has no averages, with which plain Keras on JAX cannot call `fit` twice.
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
