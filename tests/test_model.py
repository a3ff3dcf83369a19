"""`accumulate`: its effects on a model, and on the model's files."""

import os
import re
import subprocess
import sys
import textwrap

import keras
import numpy as np
import problems
import pytest
from helpers import arrays, assert_close, core_on
from helpers.models import batch_size, compile_, data, fit, ours, ways
from keras import layers, ops

from gradient_accumulator import accumulate

pytestmark = core_on("torch")


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
    # This shows the batch size that a model was built with, which may be unknown.
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
    fit(loaded, batch_size=4)  # the model is plain: each batch is an update
    assert int(loaded.optimizer.iterations) == 2 + 4


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
