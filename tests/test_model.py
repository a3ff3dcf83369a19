"""What `accumulate` and `GradientAccumulateModel` do to a model, and to its files."""

import inspect
import os
import pickle
import re
import subprocess
import sys
import tempfile
import textwrap

import keras
import numpy as np
import problems
import pytest
from helpers import arrays, assert_close, core_on
from keras import layers, ops

from gradient_accumulator import GradientAccumulateModel, accumulate
from gradient_accumulator.fitting import accumulation_of

pytestmark = core_on("torch")

WAYS = ({"microbatch_size": 4}, {"accum_steps": 2})
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way)))


def data(count=16):
    r = problems.random()
    return problems.normal(r, count, problems.FEATURES), problems.normal(r, count, 3)


def compile_(model):
    model.compile(keras.optimizers.Adam(0.1, epsilon=1e-2), "mse", metrics=["mae"])
    return model


def fit(model, batch_size=8, **arguments):
    x, y = data()
    return model.fit(
        x, y, **{"batch_size": batch_size, "shuffle": False, "verbose": 0, **arguments}
    )


def batch_size(way):
    return 8 if "microbatch_size" in way else 4


def ours(way, **arguments):
    """A `GradientAccumulateModel` with the weights of `problems.mlp()`."""
    model = problems.mlp()()
    return GradientAccumulateModel(
        inputs=model.input, outputs=model.output, **way, **arguments
    )


@problems.seeded
def sequential():
    return keras.Sequential(
        [
            layers.Input((problems.FEATURES,)),
            layers.Dense(8, activation="tanh"),
            layers.Dense(3),
        ]
    )


KINDS = {
    "functional": problems.mlp(),
    "sequential": sequential,
    "subclassed": problems.written(problems.Written),
    "not_built": problems.seeded(
        lambda: keras.Sequential([layers.Dense(8, activation="tanh"), layers.Dense(3)])
    ),
    "subclassed_not_built": problems.seeded(problems.Written),
}
kinds = pytest.mark.parametrize("kind", KINDS)


# ------------------------------------------------------------------------- accumulate


@ways
@kinds
@pytest.mark.parametrize("compiled", ["compiled_before", "compiled_after"])
def test_accumulate_trains_any_model_in_place(kind, way, compiled):
    reference = compile_(KINDS[kind]())
    fit(reference, epochs=2)

    model = KINDS[kind]()
    if compiled == "compiled_before":
        compile_(model)
    cls, built = type(model), model.built
    assert accumulate(model, **way) is model
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert model.built == built
    assert model.compiled == (compiled == "compiled_before")
    if compiled == "compiled_after":
        compile_(model)
    fit(model, batch_size(way), epochs=2)
    assert_close(arrays(model.weights), arrays(reference.weights))


@ways
def test_accumulate_keeps_compile_and_optimizer_state(way):
    reference = compile_(problems.mlp()())
    fit(reference, epochs=3)

    model = compile_(problems.mlp()())
    fit(model)
    optimizer, loss = model.optimizer, model.loss
    before = arrays(optimizer.variables)
    accumulate(model, **way)
    assert model.optimizer is optimizer
    assert model.loss is loss
    assert_close(arrays(model.optimizer.variables), before)
    fit(model, batch_size(way), epochs=2)
    assert_close(arrays(model.weights), arrays(reference.weights))
    assert_close(
        arrays(model.optimizer.variables), arrays(reference.optimizer.variables)
    )


@ways
@core_on("jax", "torch")
def test_accumulate_by_one_gives_plain_training_back(way):
    model = accumulate(compile_(problems.mlp()()), **way)
    fit(model, batch_size(way))
    accumulate(model, accum_steps=1)
    reference = compile_(problems.mlp()())
    fit(reference)
    assert set(vars(model)) == set(vars(reference))
    for each in (model, reference):
        fit(each, batch_size=4, epochs=2)
    assert int(model.optimizer.iterations) == 2 + 8
    assert_close(arrays(model.weights), arrays(reference.weights))


def test_accumulate_again_changes_the_size():
    model = compile_(problems.mlp()())
    for settings, size, updates in (
        ({"accum_steps": 2}, 4, 2),
        ({"accum_steps": 4}, 4, 3),
        ({"microbatch_size": 2}, 8, 5),
        ({"accum_steps": 1}, 4, 9),
    ):
        accumulate(model, **settings)
        fit(model, size)
        assert int(model.optimizer.iterations) == updates


@ways
@core_on("jax", "torch")
def test_compile_again_goes_on_accumulating(way):
    model = accumulate(compile_(problems.mlp()()), **way)
    fit(model, batch_size(way))
    compile_(model)
    fit(model, batch_size(way))
    assert int(model.optimizer.iterations) == 2


def test_a_layer_of_two_models_accumulates_in_one_only():
    inner = problems.mlp()()
    x = layers.Input((problems.FEATURES,))
    outer = compile_(keras.Model(x, inner(x)))
    accumulate(compile_(inner), accum_steps=4)
    fit(outer, batch_size=4)
    assert int(outer.optimizer.iterations) == 4
    fit(inner, batch_size=4)
    assert int(inner.optimizer.iterations) == 1


class OwnTrainStep(keras.Model):
    def train_step(self, *args):
        return super().train_step(*args)


def test_own_train_step_raises():
    x = layers.Input((problems.FEATURES,))
    model = OwnTrainStep(x, layers.Dense(3)(x))
    attributes = set(vars(model))
    with pytest.raises(ValueError, match=r"train_step.*compute_loss.*Received: model="):
        accumulate(model, microbatch_size=4)
    assert set(vars(model)) == attributes
    fit(compile_(model))


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.LSTM(3, stateful=True),
        lambda: layers.GRU(3, stateful=True),
        lambda: layers.RNN(layers.SimpleRNNCell(3), stateful=True),
        lambda: layers.Bidirectional(layers.LSTM(3, stateful=True)),
        lambda: keras.Sequential([layers.LSTM(3, stateful=True)]),
    ],
)
@pytest.mark.core
def test_a_stateful_rnn_raises(make):
    model = keras.Sequential([layers.Input(batch_shape=(8, 5, 2)), make()])
    with pytest.raises(ValueError, match=r"[Ss]tateful.*Received: "):
        accumulate(model, microbatch_size=4)


# -------------------------------------------------------------------- no trace is left


@ways
@kinds
def test_weights_and_summary_show_no_trace(kind, way):
    reference = compile_(KINDS[kind]())
    fit(reference)
    keras.backend.clear_session()
    model = accumulate(compile_(KINDS[kind]()), **way)
    fit(model, batch_size(way))
    assert [w.shape for w in model.get_weights()] == [
        w.shape for w in reference.get_weights()
    ]
    assert [v.path for v in model.variables] == [v.path for v in reference.variables]
    assert [v.path for v in model.optimizer.variables] == [
        v.path for v in reference.optimizer.variables
    ]
    assert [m.name for m in model.metrics] == [m.name for m in reference.metrics]
    assert summary(model) == summary(reference)


def summary(model):
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    # The batch size that a model was built with is shown, and may be unknown.
    return re.sub(r"\((?:\d+|None), (\d+)\) *", r"(\1) ", "\n".join(lines))


@ways
def test_configuration_shows_no_trace(way):
    reference = compile_(problems.mlp()())
    keras.backend.clear_session()
    model = accumulate(compile_(problems.mlp()()), **way)
    assert model.get_config() == reference.get_config()
    assert keras.saving.serialize_keras_object(
        model
    ) == keras.saving.serialize_keras_object(reference)
    clone = keras.models.clone_model(model)
    assert type(clone) is type(reference)
    fit(compile_(clone), batch_size=4)
    assert int(clone.optimizer.iterations) == 4


@ways
def test_weights_files_are_those_of_plain_keras(way, tmp_path):
    path = tmp_path / "m.weights.h5"
    model = accumulate(compile_(problems.mlp()()), **way)
    fit(model, batch_size(way))
    model.save_weights(path)
    other = problems.mlp()()
    other.load_weights(path)
    assert_close(arrays(other.weights), arrays(model.weights))


WITHOUT_THE_PACKAGE = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gradient_accumulator":
            raise ImportError("this package is not installed")


sys.meta_path.insert(0, Refuse())
import keras
import numpy as np

model = keras.saving.load_model(sys.argv[1])
model.summary()
x, y = (np.load(path) for path in sys.argv[2:4])
model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
values = [v for v in (*model.weights, *model.optimizer.variables)]
np.savez(sys.argv[4], *[keras.ops.convert_to_numpy(v) for v in values])
assert not any(name.startswith("gradient_accumulator") for name in sys.modules)
print(type(model).__module__, type(model).__name__)
"""


@pytest.mark.parametrize("kind", ["accumulate", "GradientAccumulateModel"])
@pytest.mark.slow
def test_a_saved_model_trains_on_where_the_package_is_not_installed(kind, tmp_path):
    if kind == "accumulate":
        model = accumulate(compile_(problems.mlp()()), microbatch_size=4)
    else:
        model = compile_(ours({"microbatch_size": 4}))
    fit(model, epochs=2)
    saved, x, y, out = [
        str(tmp_path / name) for name in ("m.keras", "x.npy", "y.npy", "out.npz")
    ]
    model.save(saved)
    for path, value in zip((x, y), data(), strict=True):
        np.save(path, value)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, saved, x, y, out],
        env=os.environ | {"KERAS_BACKEND": keras.backend.backend()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].split()[0].startswith("keras.")

    fit(model)
    expected = [*model.weights, *model.optimizer.variables]
    with np.load(out) as values:
        got = [values[name] for name in values]
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            a, ops.convert_to_numpy(b), rtol=1e-5, atol=1e-6, err_msg=b.path
        )


@ways
def test_a_model_that_accumulates_is_saved_as_a_plain_one(way, tmp_path):
    model = accumulate(compile_(problems.mlp()()), **way)
    fit(model, batch_size(way))
    path = tmp_path / "m.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert type(loaded) is type(problems.mlp()())
    assert_close(arrays(loaded.weights), arrays(model.weights))
    fit(loaded, batch_size=4)  # plain: an update for each batch
    assert int(loaded.optimizer.iterations) == 2 + 4


# ------------------------------------------------------------ GradientAccumulateModel


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
    """Without a constructor of its own."""


class NotRegistered(GradientAccumulateModel):
    """Without a constructor of its own."""


class WithCall(GradientAccumulateModel):
    """Hands on what it does not know, as Keras recommends."""

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


# ------------------------------------------------------------------------- importing


def test_importing_loads_only_the_active_backend():
    script = textwrap.dedent(
        """
        import sys
        import keras
        before = set(sys.modules)
        import gradient_accumulator
        after = set(sys.modules) - before
        others = {"tensorflow", "jax", "torch"} - {keras.backend.backend()}
        print(sorted(others & {name.split(".")[0] for name in after}))
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"
