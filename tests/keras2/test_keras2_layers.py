"""On Keras 2: batch normalization as the documentation of version 0.5.2 shows it."""

import numpy as np
import pytest
import tensorflow as tf
from api import KERAS_2

if not KERAS_2:
    pytest.skip("of Keras 2 only", allow_module_level=True)

from helpers.keras2 import EXAMPLES, HDF5_IS_OLD, K, compiled, values, wrapped

from gradient_accumulator import AccumBatchNormalization, GradientAccumulateOptimizer
from gradient_accumulator.utils import replace_batchnorm_layers

layers = tf.keras.layers


def images():
    r = np.random.default_rng(0)
    x = (r.normal(size=(EXAMPLES, 6, 6, 2)) * 2 + 3).astype("float32")
    return x, r.normal(size=(EXAMPLES, 1)).astype("float32")


def normalized(normalization):
    tf.keras.utils.set_random_seed(0)
    return tf.keras.Sequential(
        [
            layers.Input((6, 6, 2)),
            normalization,
            layers.Flatten(),
            layers.Dense(1),
        ]
    )


@pytest.mark.parametrize("wrapper", ["model", "optimizer"])
def test_batch_normalization_in_a_sequential_model(wrapper):
    reference = compiled(normalized(layers.BatchNormalization()), "sgd")
    x, y = images()
    reference.fit(x, y, batch_size=EXAMPLES, verbose=0)
    model = normalized(AccumBatchNormalization(accum_steps=K))
    assert len(model.weights) == len(reference.weights)
    if wrapper == "model":
        model = compiled(wrapped(model), "sgd")
    else:
        model = compiled(model, GradientAccumulateOptimizer("SGD", K))
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(values(model)[2:4], values(reference)[2:4]):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("first", ["images", "vectors"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_batch_normalization_of_images_and_of_vectors(first, policy, tmp_path):
    """Version 0.5.2 normalized inputs of any rank, which Keras's own layer cannot."""
    tf.keras.utils.set_random_seed(0)
    layer = AccumBatchNormalization(accum_steps=4, dtype=policy)
    a, b = layers.Input((6, 6, 2)), layers.Input((2,))
    if first == "images":
        outputs = [layer(a), layer(b)]
    else:
        outputs = [layer(b), layer(a)][::-1]
    model = tf.keras.Model([a, b], outputs)
    x, _ = images()
    inputs = [x, x[:, 0, 0]]
    model.compile(GradientAccumulateOptimizer("SGD", 2), ["mse", "mse"])
    model.fit(inputs, inputs, batch_size=6, verbose=0)
    assert layer.pending == 0
    gamma, beta, mean, variance = (w.numpy() for w in layer.weights)
    both = np.concatenate([x.reshape(-1, 2), inputs[1]])
    np.testing.assert_allclose(mean, 0.01 * both.mean(0), rtol=1e-5)

    def assert_normalizes(model):
        for value, output in zip(inputs, model.predict(inputs, verbose=0)):
            expected = (value - mean) / np.sqrt(variance + 1e-3) * gamma + beta
            np.testing.assert_allclose(
                output, expected, atol=1e-4 if policy == "float32" else 2e-2
            )

    assert_normalizes(model)
    for name in "model", "model.keras":
        model.save(tmp_path / name)
        loaded = tf.keras.models.load_model(tmp_path / name)
        assert_normalizes(loaded)
        loaded.fit(inputs, inputs, batch_size=6, verbose=0)


@HDF5_IS_OLD
@pytest.mark.parametrize("way", ["flush", "reset", ".keras", ".h5"])
def test_batch_normalization_ends_its_update_with_the_optimizer(way, tmp_path):
    layer = AccumBatchNormalization(accum_steps=K)
    model = compiled(normalized(layer), GradientAccumulateOptimizer("SGD", K))
    x, y = images()
    model.fit(x[:4], y[:4], batch_size=4, verbose=0)
    assert (model.optimizer.pending, layer.pending) == (1, 1)
    if way.startswith("."):
        model.save(tmp_path / f"model{way}")
        model = tf.keras.models.load_model(tmp_path / f"model{way}")
        (layer,) = [x for x in model.layers if isinstance(x, AccumBatchNormalization)]
        assert (model.optimizer.pending, layer.pending) == (1, 1)
        model.fit(x[:8], y[:8], batch_size=4, shuffle=False, verbose=0)
    else:
        getattr(model.optimizer, way)()
    assert (model.optimizer.pending, layer.pending) == (0, 0)


def test_replace_batchnorm_layers():
    model = tf.keras.applications.MobileNetV2(
        weights=None, input_shape=(32, 32, 3), classes=4
    )
    r = np.random.default_rng(0)
    for w in model.weights:
        w.assign(w + r.uniform(0.01, 0.1, w.shape))
    replaced = replace_batchnorm_layers(model, accum_steps=K)
    x = r.normal(size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(replaced(x), model(x), atol=1e-6)
    assert [w.name for w in replaced.weights] == [w.name for w in model.weights]
    kinds = [type(layer) for layer in replaced.layers]
    assert kinds.count(AccumBatchNormalization) == 52
    assert layers.BatchNormalization not in kinds
    assert_trains(wrapped(replaced, warn=False), x)


def test_replace_batchnorm_layers_that_nested_models_share():
    x = layers.Input((6,))
    shared = layers.BatchNormalization(name="shared")
    left = tf.keras.Model(x, layers.Dense(6)(shared(layers.Dense(6)(x))), name="left")
    right = tf.keras.Sequential([layers.Input((6,)), shared, left], name="right")
    h = layers.Add()([left(shared(x)), right(x)])
    model = tf.keras.Model(x, layers.Dense(4, "softmax")(shared(h)))
    r = np.random.default_rng(0)
    for w in model.weights:
        w.assign(w + r.uniform(0.01, 0.1, w.shape))
    replaced = replace_batchnorm_layers(model, accum_steps=K)
    x = r.normal(size=(2, 6)).astype("float32")
    np.testing.assert_allclose(replaced(x), model(x), atol=1e-6)
    assert [w.name for w in replaced.weights] == [w.name for w in model.weights]
    kinds = [type(layer) for layer in replaced._flatten_layers()]
    assert kinds.count(AccumBatchNormalization) == 1
    assert layers.BatchNormalization not in kinds
    assert_trains(wrapped(replaced, warn=False), x)


def assert_trains(model, x):
    before = values(model)
    compiled(model, "sgd", "categorical_crossentropy")
    model.fit(x, np.eye(4)[[0, 1]], batch_size=1, verbose=0)
    assert any((a != b).any() for a, b in zip(values(model), before))


def test_where_layers_are_replaced():
    model = normalized(layers.BatchNormalization())
    replace_batchnorm_layers(model, K, position="replace")
    with pytest.raises(ValueError, match=r"`position`.* Received: position='after'"):
        replace_batchnorm_layers(model, K, position="after")
