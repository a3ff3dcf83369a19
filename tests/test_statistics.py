"""State of layers that belongs to the update (docs/layers.md), against plain Keras."""

import contextlib
import re
import threading
from pathlib import Path

import keras
import numpy as np
import problems
import pytest
from helpers import FULL, arrays, both, compiled, data, fit, of_arrays, size, ways
from keras import layers, ops

EXAMPLES = Path(__file__).parents[1] / "docs" / "layers.md"


def documented(name):
    """A class, made from its code in docs/layers.md."""
    blocks = re.findall(r"```python\n(.*?)```", EXAMPLES.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if f"class {name}(" in block]
    namespace = {"keras": keras, "ops": ops, "contextlib": contextlib}
    exec(block, namespace)
    return namespace[name]


LAYERS = {
    "Annealed": lambda: documented("Annealed")(),
    "Codebook": lambda: documented("Codebook")(4),
    "SpectralNormalization": lambda: layers.SpectralNormalization(layers.Dense(5)),
}
layer = pytest.mark.parametrize("layer", LAYERS)


def model_with(layer):
    @problems.seeded
    def build():
        x = layers.Input((problems.FEATURES,))
        h = layers.Dense(6, activation="tanh")(x)
        return keras.Model(x, layers.Dense(problems.CLASSES)(LAYERS[layer]()(h)))

    return build


@layer
@ways
def test_state_moves_once_an_update(way, layer):
    both(way, of_arrays, model_with(layer))


@layer
@ways
@pytest.mark.core
def test_a_failed_update_leaves_state_as_it_was(way, layer):
    seen = []

    class Fails(layers.Layer):
        def call(self, x):
            seen.append(x)
            if len(seen) > 1 and failing:
                raise RuntimeError("as asked")
            return x

    @problems.seeded
    def build():
        x = layers.Input((problems.FEATURES,))
        h = LAYERS[layer]()(layers.Dense(6, activation="tanh")(x))
        return keras.Model(x, layers.Dense(problems.CLASSES)(Fails()(h)))

    failing = False
    x, y = data(FULL)
    model = compiled(way, build, run_eagerly=True, jit_compile=False)
    fit(model, x, y, batch_size=size(way))
    before = arrays(model.variables)
    seen.clear()
    failing = True
    with pytest.raises(RuntimeError, match="as asked"):
        fit(model, x, y, batch_size=size(way))
    for name, value in arrays(model.variables).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@ways
@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "mean_with_sample_weight"]
)
def test_threads_may_share_a_loss(way, reduction):
    """A model in training does not change the loss for another model."""
    inside, others = threading.Event(), threading.Event()

    class Waits(keras.losses.MeanSquaredError):
        def call(self, y_true, y_pred):
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                others.wait(10)
            return super().call(y_true, y_pred)

    loss = Waits(reduction=reduction)
    x, y = data()
    weights = np.linspace(0.1, 2, len(x)).astype("float32")

    def trained(way):
        model = compiled(way, loss=loss, run_eagerly=True, jit_compile=False)
        fit(model, x, y, batch_size=size(way), sample_weight=weights)
        return arrays(model.weights)

    expected = trained(None)
    found = []
    thread = threading.Thread(target=lambda: found.append(trained(way)))
    thread.start()
    try:
        assert inside.wait(60)  # the thread is in the loss, and computes its numerator
        assert loss.reduction == reduction
        assert_near(trained(way), expected)
        assert_near(trained(None), expected)
    finally:
        others.set()
        thread.join()
    assert_near(found[0], expected)
    assert loss.reduction == reduction


def assert_near(got, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)
