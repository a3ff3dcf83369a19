"""On Keras 2: models are saved in every format, loaded, and continue to accumulate."""

import copy
import dataclasses
import functools
import pathlib
import pickle
import tempfile
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from api import KERAS_2

if not KERAS_2:
    pytest.skip("of Keras 2 only", allow_module_level=True)

from helpers.keras2 import LEGACY, compiled

from gradient_accumulator import (
    AccumBatchNormalization,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    accumulate,
)
from gradient_accumulator.utils import restore_batchnorm_layers

pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")

layers, optimizers = tf.keras.layers, tf.keras.optimizers
Scaled = tf.keras.mixed_precision.LossScaleOptimizer
K, EXAMPLES = 2, 8
FORMATS = "", ".h5", ".keras"


def data():
    r = np.random.default_rng(0)
    x = r.normal(size=(EXAMPLES, 6)).astype("float32")
    return x, r.normal(size=(EXAMPLES, 3)).astype("float32")


def network(normalization=False):
    tf.keras.utils.set_random_seed(0)
    x = tf.keras.Input((6,))
    h = layers.Dense(4, use_bias=not normalization)(x)
    if normalization:
        h = AccumBatchNormalization(K, momentum=0.5)(h)
    return tf.keras.Model(x, layers.Dense(3, dtype="float32")(h))


def fit(model):
    x, y = data()
    model.fit(x, y, batch_size=EXAMPLES // K, shuffle=False, verbose=0)
    return model


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer.

    Args:
        make: A function that makes it.
        formats_untrained: The formats from which plain Keras 2 loads it untrained.
    """

    make: Callable
    formats_untrained: tuple[str, ...] = FORMATS


OPTIMIZERS = {
    "new": Optimizer(lambda: optimizers.Adam(0.1)),
    "legacy": Optimizer(lambda: LEGACY.Adam(0.1)),
    # Loading from ".keras" fails: "no attribute 'name'".
    "scaled": Optimizer(lambda: Scaled(optimizers.Adam(0.1)), ("", ".h5")),
}


@dataclasses.dataclass(frozen=True)
class Entrance:
    """A way to accumulate.

    Args:
        make: A function of a model and an optimizer, which returns both, one of them
            accumulating.
        optimizers: The names of the optimizers that the tests use.
        inside: The name of the optimizer that `make` gets, if it returns another kind.
        is_saved: Whether a saved model accumulates when it is loaded.
        formats: The formats that keep the optimizer's state; None for those that keep
            it in plain Keras.
    """

    make: Callable
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    inside: str | None = None
    is_saved: bool = True
    formats: tuple[str, ...] | None = None

    def __call__(self, model, optimizer):
        return self.make(model, optimizer)


ENTRANCES = {
    "optimizer": Entrance(
        lambda model, optimizer: (model, GradientAccumulateOptimizer(optimizer, K)),
        formats=(".h5", ".keras"),
    ),
    "inside_of_the_scaler": Entrance(
        lambda model, optimizer: (
            model,
            Scaled(GradientAccumulateOptimizer(optimizer, K)),
        ),
        optimizers=("scaled",),
        inside="new",
    ),
    "accumulate": Entrance(
        lambda model, optimizer: (accumulate(model, accum_steps=K), optimizer),
        is_saved=False,
    ),
    "model": Entrance(
        lambda model, optimizer: (
            GradientAccumulateModel(K, inputs=model.input, outputs=model.output),
            optimizer,
        ),
    ),
}
OF_ANY_OPTIMIZER = [name for name, each in ENTRANCES.items() if each.inside is None]


def saved_and_loaded(model, suffix, folder):
    model.save(folder / f"model{suffix}")
    loaded = tf.keras.models.load_model(folder / f"model{suffix}", compile=True)
    assert type(loaded.optimizer) is type(model.optimizer)
    assert isinstance(loaded, GradientAccumulateModel) is isinstance(
        model, GradientAccumulateModel
    )
    for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    x, _ = data()
    loaded.run_eagerly = True  # this takes less time than to trace a graph
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model(x), atol=1e-6)
    return loaded


@functools.cache
def plain_keras_keeps(name, suffix):
    """Whether a format keeps an optimizer's state, which depends on the version."""
    model = fit(compiled(network(), OPTIMIZERS[name].make()))
    with tempfile.TemporaryDirectory() as folder:
        loaded = saved_and_loaded(model, suffix, pathlib.Path(folder))
    a, b = fit(loaded).get_weights(), fit(model).get_weights()
    return all(np.allclose(x, y, atol=1e-4) for x, y in zip(a, b, strict=True))


CASES = [
    (entrance, name, normalization, trained)
    for entrance in ENTRANCES
    for name in ENTRANCES[entrance].optimizers
    for normalization in (False, True)
    for trained in (False, True)
]


@pytest.mark.parametrize("entrance, name, normalization, trained", CASES)
def test_all_is_saved_and_trains_on(entrance, name, normalization, trained, tmp_path):
    def optimizer():
        return OPTIMIZERS[name if enter.inside is None else enter.inside].make()

    enter = ENTRANCES[entrance]
    model = compiled(*enter(network(normalization), optimizer()))
    if trained:
        fit(model)
    loaded = {
        suffix: saved_and_loaded(model, suffix, tmp_path)
        for suffix in (FORMATS if trained else OPTIMIZERS[name].formats_untrained)
    }
    before = model.get_weights()
    model.run_eagerly = not trained
    expected = {True: fit(model).get_weights()}
    model.set_weights(before)
    _, fresh = enter(network(), optimizer())
    expected[False] = fit(compiled(model, fresh, run_eagerly=True)).get_weights()
    for suffix, each in loaded.items():
        if not enter.is_saved:
            accumulate(each, accum_steps=K)
        if enter.formats is None:
            kept = plain_keras_keeps(name, suffix)
        else:
            kept = suffix in enter.formats
        weights = expected[kept]
        for a, b, c in zip(fit(each).get_weights(), weights, before, strict=True):
            moved = np.abs(b - c).max()
            assert moved > 1e-3
            assert np.abs(a - b).max() <= 1e-5 * moved + 1e-7


NAMES = ["SGD", "Adam", "Adagrad", "Adadelta", "Adamax", "Nadam", "RMSprop", "Ftrl"]
KINDS = [(LEGACY, name) for name in NAMES] + [
    (optimizers, name)
    for name in [*NAMES, "AdamW", "Adafactor", "Lion"]
    if hasattr(optimizers, name)
]


@pytest.mark.parametrize("module, name", KINDS)
def test_a_saved_model_with_every_optimizer(module, name, tmp_path):
    optimizer = GradientAccumulateOptimizer(getattr(module, name)(0.1), K)
    model = fit(compiled(network(), optimizer))
    loaded = saved_and_loaded(model, "", tmp_path)
    assert type(loaded.optimizer.inner_optimizer) is getattr(module, name)
    assert loaded.optimizer.accum_steps == K


@pytest.mark.parametrize("entrance", OF_ANY_OPTIMIZER)
def test_a_saved_model_of_mixed_precision(entrance, tmp_path):
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model, adam = ENTRANCES[entrance](network(True), optimizers.Adam(0.1))
        loaded = saved_and_loaded(fit(compiled(model, adam)), "", tmp_path)
    finally:
        tf.keras.mixed_precision.set_global_policy(None)  # the policy is `floatx` again
    before = loaded.get_weights()
    assert any((a != b).any() for a, b in zip(fit(loaded).get_weights(), before))


@pytest.mark.parametrize("kind", ["new", "legacy"])
@pytest.mark.parametrize("built", [False, True])
def test_a_checkpoint_in_the_middle_of_an_update(kind, built, tmp_path):
    def make():
        optimizer = GradientAccumulateOptimizer(OPTIMIZERS[kind].make(), K)
        return compiled(network(True), optimizer)

    def checkpoint(model):
        return tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    x, y = data()
    model, other = make(), make()
    model.fit(x[:4], y[:4], batch_size=4, verbose=0)
    if built:
        fit(other)
    status = checkpoint(other).restore(checkpoint(model).save(tmp_path / "checkpoint"))
    for each in (model, other):
        each.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        (layer,) = [x for x in each.layers if isinstance(x, AccumBatchNormalization)]
        assert (each.optimizer.pending, layer.pending) == (1, 1)
    status.assert_consumed()
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("copied", [
    tf.keras.models.clone_model,
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
], ids=["clone_model", "deepcopy", "pickle"])  # fmt: skip
@pytest.mark.parametrize("entrance", OF_ANY_OPTIMIZER)
def test_copies(entrance, copied):
    model = fit(compiled(*ENTRANCES[entrance](network(True), OPTIMIZERS["new"].make())))
    other = copied(model)
    other.set_weights(model.get_weights())  # `clone_model` makes new weights
    x, _ = data()
    np.testing.assert_allclose(other(x), model(x), atol=1e-6)
    assert isinstance(other, GradientAccumulateModel) is (entrance == "model")


def test_statistics_of_an_update_are_no_weights_and_go_with_the_layer(tmp_path):
    model = network(True)
    assert len(model.weights) == 7
    restore_batchnorm_layers(model).save(tmp_path / "model")
    variables = tf.train.list_variables(str(tmp_path / "model/variables/variables"))
    names = " ".join(name for name, _ in variables)
    assert "moving_mean" in names
    assert "pool" not in names
