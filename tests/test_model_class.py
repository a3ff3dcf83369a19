"""`GradientAccumulateModel`, its subclasses and its files."""

import inspect
import pickle
import tempfile

import keras
import numpy as np
import problems
import pytest
from helpers import arrays, assert_close, core_on
from helpers.models import batch_size, compile_, data, fit, ours, ways
from keras import layers, ops

from gradient_accumulator import GradientAccumulateModel, accumulate
from gradient_accumulator.fit import accumulation_of

pytestmark = core_on("torch")


@ways
@core_on("jax", "torch")
def test_gradient_accumulate_model_equals_the_batch(way):
    reference = compile_(problems.mlp()())
    expected = fit(reference, epochs=3).history
    model = compile_(ours(way))
    got = fit(model, batch_size(way), epochs=3).history
    assert isinstance(model, GradientAccumulateModel)
    assert isinstance(model, keras.Model)
    assert_close(arrays(model.weights), arrays(reference.weights))
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, rel=1e-5)


def settings(model):
    accumulation = model.accumulation
    return (
        accumulation.accum_steps,
        accumulation.microbatch_size,
        accumulation.accum_dtype,
    )


@ways
def test_gradient_accumulate_model_loads_back_as_what_it_is(way, tmp_path):
    model = compile_(ours(way, accum_dtype="bfloat16", name="mine"))
    fit(model, batch_size(way))
    path = tmp_path / "m.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert isinstance(loaded, GradientAccumulateModel)
    assert loaded.name == "mine"
    assert settings(loaded) == settings(model)
    for each in (model, loaded):
        fit(each, batch_size(way))
    assert int(loaded.optimizer.iterations) == 4
    assert_close(arrays(loaded.weights), arrays(model.weights))
    assert_close(arrays(loaded.optimizer.variables), arrays(model.optimizer.variables))


@ways
@pytest.mark.parametrize(
    "copy",
    [
        lambda model: type(model).from_config(model.get_config()),
        lambda model: GradientAccumulateModel.from_config(model.get_config()),
        keras.models.clone_model,
        lambda model: keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(model)
        ),
    ],
    ids=["from_config", "from_config_of_the_public_class", "clone_model", "serialize"],
)
def test_gradient_accumulate_model_can_be_copied(way, copy):
    model = ours(way, accum_dtype="bfloat16")
    copied = copy(model)
    assert isinstance(copied, GradientAccumulateModel)
    assert settings(copied) == settings(model)
    copied.set_weights(model.get_weights())
    for each in (model, copied):
        fit(compile_(each), batch_size(way))
    assert int(copied.optimizer.iterations) == 2
    assert_close(arrays(copied.weights), arrays(model.weights))


def test_gradient_accumulate_model_shows_no_trace():
    model = compile_(ours({"microbatch_size": 4}))
    fit(model)
    reference = compile_(problems.mlp()())
    fit(reference)
    assert [w.shape for w in model.get_weights()] == [
        w.shape for w in reference.get_weights()
    ]
    assert [v.path for v in model.variables] == [v.path for v in reference.variables]


def test_the_first_six_arguments_keep_their_order():
    parameters = list(inspect.signature(GradientAccumulateModel).parameters.values())
    assert [(p.name, p.default) for p in parameters[:6]] == [
        ("accum_steps", 1),
        ("mixed_precision", False),
        ("use_agc", False),
        ("clip_factor", 0.01),
        ("eps", 1e-3),
        ("experimental_distributed_support", False),
    ]
    plain = problems.mlp()()
    model = GradientAccumulateModel(
        2, True, False, 0.02, 1e-2, True, inputs=plain.input, outputs=plain.output
    )
    fit(compile_(model), batch_size=4)
    assert int(model.optimizer.iterations) == 2


@pytest.mark.core
def test_gradient_accumulate_model_is_plain_by_default():
    plain = problems.mlp()()
    model = GradientAccumulateModel(inputs=plain.input, outputs=plain.output)
    fit(compile_(model), batch_size=4)
    assert int(model.optimizer.iterations) == 4


@pytest.mark.parametrize("spelling", ["use_agc", "agc"])
def test_adaptive_clipping_has_two_spellings(spelling):
    model = ours({"accum_steps": 2}, clip_factor=1e-9, eps=1e-3, **{spelling: True})
    before = model.get_weights()
    fit(compile_(model))
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_accumulate_changes_a_gradient_accumulate_model():
    model = compile_(ours({"accum_steps": 2}))
    assert accumulate(model, microbatch_size=4) is model
    fit(model, batch_size=8)
    assert int(model.optimizer.iterations) == 2
    assert settings(keras.models.clone_model(model)) == (None, 4, "float32")


class OfMyOwn(GradientAccumulateModel):
    """A subclass with its own `call`, `compute_loss` and `compute_metrics`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(8, activation="tanh")
        self.head = layers.Dense(3)
        self.largest = keras.metrics.Mean(name="size")

    def call(self, x):
        return self.head(self.hidden(x))

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return ops.mean(ops.square(y - y_pred)) + 0.1 * ops.mean(ops.abs(y_pred))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        self.largest.update_state(ops.mean(ops.abs(y_pred), axis=-1))
        return {**logs, "size": self.largest.result()}


@ways
def test_a_subclass_of_gradient_accumulate_model(way):
    results = []
    for arguments, size in (({}, 8), (way, batch_size(way))):
        keras.utils.set_random_seed(7)
        model = OfMyOwn(**arguments)
        model.compile(keras.optimizers.SGD(0.3))
        history = fit(model, size, epochs=2).history
        results.append((arrays(model.weights), history))
    (expected, expected_history), (got, history) = results
    assert_close(got, expected)
    assert history.keys() == {"loss", "size"}
    for name, values in expected_history.items():
        assert history[name] == pytest.approx(values, rel=1e-5)


@keras.saving.register_keras_serializable("tests")
class Registered(GradientAccumulateModel):
    """A registered class without its own constructor."""


class NotRegistered(GradientAccumulateModel):
    """A class without its own constructor, which is not registered."""


class WithCall(GradientAccumulateModel):
    """Passes on unknown arguments, as Keras recommends."""

    def __init__(self, width=3, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(width)

    def call(self, x):
        return self.dense(x)


def saved_and_loaded(model):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/m.keras"
        model.save(path)
        if type(model).__name__ == "Registered":
            return keras.saving.load_model(path)
        known = {kind.__name__: kind for kind in (NotRegistered, WithCall)}
        return keras.saving.load_model(path, custom_objects=known)


@ways
@pytest.mark.parametrize("kind", [Registered, NotRegistered, WithCall])
@pytest.mark.parametrize(
    "copy",
    [
        lambda model: type(model).from_config(model.get_config()),
        keras.models.clone_model,
        saved_and_loaded,
    ],
    ids=["from_config", "clone_model", "saved"],
)
def test_a_subclass_goes_on_training_in_microbatches_when_it_is_copied(way, copy, kind):
    if kind is WithCall:
        model = kind(**way)
        model(data()[0])
    else:
        plain = problems.mlp()()
        model = kind(**way, inputs=plain.input, outputs=plain.output)
    copied = copy(model)
    assert isinstance(copied, kind)
    assert accumulation_of(copied) == accumulation_of(model)
    copied(data()[0])
    copied.set_weights(model.get_weights())
    for each in (model, copied):
        fit(compile_(each), batch_size(way))
    assert int(copied.optimizer.iterations) == 2
    assert_close(arrays(copied.weights), arrays(model.weights))


@ways
@pytest.mark.parametrize("kind", [GradientAccumulateModel, Registered])
@pytest.mark.core
def test_a_functional_model_is_pickled_as_what_it_is(way, kind):
    plain = problems.mlp()()
    model = compile_(kind(**way, inputs=plain.input, outputs=plain.output))
    fit(model, batch_size(way))
    copied = pickle.loads(pickle.dumps(model))
    assert isinstance(copied, kind)
    assert accumulation_of(copied) == accumulation_of(model)
    for each in (model, copied):
        fit(each, batch_size(way))
    assert int(copied.optimizer.iterations) == 4
    assert_close(arrays(copied.weights), arrays(model.weights))


def test_accumulate_changes_a_functional_subclass_and_keeps_its_type():
    plain = problems.mlp()()
    model = Registered(accum_steps=2, inputs=plain.input, outputs=plain.output)
    assert accumulate(model, microbatch_size=4) is model
    assert isinstance(model, Registered)
    assert settings(keras.models.clone_model(model)) == (None, 4, "float32")


def test_a_subclass_saves_what_clipping_leaves_out():
    model = WithCall(use_agc=True, agc_exclude=lambda variable: "bias" in variable.path)
    model(data()[0])
    copied = WithCall.from_config(model.get_config())
    (excluded,) = accumulation_of(copied).clipping.agc_exclude
    assert excluded.endswith("bias")
