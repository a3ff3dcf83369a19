"""Files and copies of models that accumulate, and the documentation's example."""

import inspect
import subprocess
import sys
import textwrap
import warnings

import keras
import numpy as np
import problems
import pytest
from helpers import (
    COUNT,
    FULL,
    WAYS,
    arrays,
    assert_close,
    compiled,
    core_on,
    data,
    fit,
    size,
    ways,
)
from helpers.notices import normalized
from keras import layers

from gradient_accumulator import (
    GradientAccumulateModel,
    accumulate,
    replace_batchnorm_layers,
    restore_batchnorm_layers,
)

pytestmark = core_on("torch")


# ---------------------------------------------------------------------- files, copies


def updates(model, way):
    """The number of updates in one more epoch."""
    before = int(model.optimizer.iterations)
    fit(model, *data(), batch_size=size(way))
    return int(model.optimizer.iterations) - before


def made(way, kind):
    if kind == "accumulate":
        return compiled(way)
    plain = compiled()
    model = GradientAccumulateModel(
        **WAYS[way][0], inputs=plain.input, outputs=plain.output
    )
    model.compile(keras.optimizers.SGD(0.3, 0.9), "mse")
    return model


def reload(model, tmp_path):
    model.save(tmp_path / "m.keras")
    return keras.saving.load_model(tmp_path / "m.keras")


def checkpoint(model, tmp_path):
    path = tmp_path / "checkpoint.keras"
    callback = keras.callbacks.ModelCheckpoint(path)
    fit(model, *data(), batch_size=FULL, callbacks=[callback])
    return keras.saving.load_model(path)


def clone(model, tmp_path):
    copy = keras.models.clone_model(model)
    copy.compile("sgd", "mse")
    return copy


@pytest.mark.parametrize("copy", [reload, checkpoint, clone])
@pytest.mark.parametrize("kind", ["accumulate", "GradientAccumulateModel"])
@ways
def test_what_a_copy_of_a_model_does(copy, kind, way, tmp_path):
    """The copy of a `GradientAccumulateModel` accumulates, and any other is plain."""
    model = made(way, kind)
    updates(model, way)
    copied = copy(model, tmp_path)
    in_microbatches, plain = COUNT // FULL, COUNT // size(way)
    if kind == "accumulate":
        assert not hasattr(copied, "accumulation")
        assert updates(copied, way) == plain
        accumulate(copied, **WAYS[way][0])
    assert copied.accumulation == model.accumulation
    assert updates(copied, way) == in_microbatches


@ways
def test_a_reloaded_model_goes_on_once_it_accumulates_again(way, tmp_path):
    model = compiled(way)
    updates(model, way)
    loaded = accumulate(reload(model, tmp_path), **WAYS[way][0])
    for each in (model, loaded):
        updates(each, way)
    assert_close(arrays(loaded.weights), arrays(model.weights))


@ways
def test_weights_and_backups_leave_a_model_accumulating(way, tmp_path):
    model = compiled(way)
    path = tmp_path / "m.weights.h5"
    callbacks = [
        keras.callbacks.ModelCheckpoint(path, save_weights_only=True),
        keras.callbacks.BackupAndRestore(str(tmp_path / "backup")),
    ]
    fit(model, *data(), batch_size=size(way), callbacks=callbacks)
    other = compiled(way)
    updates(other, way)
    other.load_weights(path)
    assert_close(arrays(other.weights), arrays(model.weights))
    assert updates(other, way) == COUNT // FULL


LOADS = """
import sys

sys.modules["gradient_accumulator"] = None  # not installed
import keras
import numpy as np

checkpoint, restored, x, out = sys.argv[1:]
try:
    keras.saving.load_model(checkpoint)
    sys.exit("it loads")
except Exception as error:
    if "AccumBatchNormalization" not in str(error):
        raise
model = keras.saving.load_model(restored)
np.save(out, model.predict(np.load(x), verbose=0))
"""


@pytest.mark.slow
def test_checkpoints_of_a_model_with_our_normalization(tmp_path):
    """They need the package. After the steps in README, plain Keras loads them."""
    model = replace_batchnorm_layers(normalized(layers.BatchNormalization()))
    model.compile("sgd", "mse")
    accumulate(model, microbatch_size=2)
    x = problems.normal(problems.random(), 8, 4)
    names = "checkpoint.keras", "restored.keras", "x.npy", "out.npy"
    checkpoint, restored, given, out = [str(tmp_path / name) for name in names]
    weights = str(tmp_path / "w.weights.h5")
    callbacks = [
        keras.callbacks.ModelCheckpoint(checkpoint),
        keras.callbacks.ModelCheckpoint(weights, save_weights_only=True),
    ]
    fit(model, x, np.zeros((8, 1), "float32"), batch_size=4, callbacks=callbacks)
    loaded = keras.saving.load_model(checkpoint)
    restore_batchnorm_layers(loaded).save(restored)
    # Weights can be loaded into a model with equal layers.
    plain = normalized(layers.BatchNormalization())
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match="batch_normalization"),
    ):
        warnings.simplefilter("ignore")
        plain.load_weights(weights)
    copy = replace_batchnorm_layers(plain)
    copy.load_weights(weights)
    assert_close(arrays(copy.weights), arrays(model.weights))

    np.save(given, x)
    run = subprocess.run(
        [sys.executable, "-c", LOADS, checkpoint, restored, given, out],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(np.load(out), expected, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------- the examples


@pytest.mark.parametrize("thing", [accumulate, GradientAccumulateModel])
def test_the_example_of_the_documentation_runs_without_a_warning(thing):
    _, _, example = inspect.getdoc(thing).partition("Example:")
    code = textwrap.dedent(example.split("```")[1].removeprefix("python"))
    r = problems.random()
    names = {
        "keras": keras,
        "accumulate": accumulate,
        "GradientAccumulateModel": GradientAccumulateModel,
        "x": problems.normal(r, 128, 32, 32, 3),
        "y": r.integers(0, 10, 128),
    }
    exec(code, names)
    assert int(names["model"].optimizer.iterations) == (2 if thing is accumulate else 4)
