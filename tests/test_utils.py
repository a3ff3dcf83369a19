"""`replace_batchnorm_layers`, `restore_batchnorm_layers`: they change nothing else."""

import keras
import numpy as np
import pytest
from helpers import array, core_on
from keras import layers

from gradient_accumulator import (
    AccumBatchNormalization,
    GradientAccumulateModel,
    accumulate,
    replace_batchnorm_layers,
    restore_batchnorm_layers,
)
from gradient_accumulator.fit import accumulation_of
from gradient_accumulator.utils import replace_batchnorm_layers as by_its_old_path

pytestmark = core_on("torch")


def normalizations(model):
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, layers.BatchNormalization)
    ]


def with_random_statistics(model):
    r = np.random.default_rng(0)
    for layer in normalizations(model):
        for variable in layer.weights:
            low = (
                0.5
                if "beta" not in variable.path and "mean" not in variable.path
                else -0.5
            )
            variable.assign(r.uniform(low, low + 1, variable.shape))
    return model


@pytest.mark.parametrize(
    "name",
    [
        "MobileNetV2",
        *(  # these show nothing more than the first one
            pytest.param(name, marks=pytest.mark.full)
            for name in ("ResNet50V2", "EfficientNetB0", "DenseNet121")
        ),
    ],
)
@pytest.mark.slow
def test_applications(name):
    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=(32, 32, 3), classes=4)
    with_random_statistics(model)
    before = model.get_weights()
    replaced = replace_batchnorm_layers(model)
    assert len(normalizations(replaced)) == len(normalizations(model)) > 10
    assert all(type(x) is AccumBatchNormalization for x in normalizations(replaced))
    assert [x.name for x in replaced.layers] == [x.name for x in model.layers]
    r = np.random.default_rng(0)
    x, y = r.uniform(0, 1, (2, 32, 32, 3)), r.integers(0, 4, 2)
    assert_inference(replaced, model, x)
    for each in (model, replaced):
        each.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
        keras.utils.set_random_seed(1)
        each.train_on_batch(x, y)
    assert_weights(replaced, model, before)
    restored = restore_batchnorm_layers(replaced)
    assert all(type(x) is layers.BatchNormalization for x in normalizations(restored))
    assert_inference(restored, replaced, x)


def assert_inference(a, b, x):
    a, b = (m.predict(x, verbose=0) for m in (a, b))
    for got, expected in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def assert_weights(a, b, before):
    """Weights agree to 1e-5 of their movement, plus the spacing of float32."""
    for got, expected, start in zip(a.weights, b.weights, before, strict=True):
        got, expected = array(got), array(expected)
        moved = np.max(np.abs(expected - start))
        spacing = np.finfo("float32").eps * np.max(np.abs(expected))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * moved + spacing)


class Block(layers.Layer):
    """A user's layer that contains a normalization."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units)
        self.normalization = layers.BatchNormalization(momentum=0.7, name="of_block")

    def build(self, shape):
        self.dense.build(shape)
        self.normalization.build((*shape[:-1], self.units))

    def call(self, x, training=None):
        return self.normalization(self.dense(x), training=training)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


SETTINGS = {
    "momentum": 0.8,
    "epsilon": 0.02,
    "beta_regularizer": keras.regularizers.L2(0.1),
    "gamma_constraint": "non_neg",
}


def everything():
    """A model with two inputs and outputs, a shared layer, nested models, and more."""
    keras.utils.set_random_seed(0)
    a, b = layers.Input((4, 6), name="a"), layers.Input((6,), name="b")
    shared = layers.BatchNormalization(name="shared", **SETTINGS)
    inner = keras.Sequential(
        [layers.Input((6,)), layers.Dense(6), layers.BatchNormalization(scale=False)],
        name="inner",
    )
    first = layers.TimeDistributed(layers.BatchNormalization(center=False))(a)
    second = layers.BatchNormalization(axis=1, name="of_steps")(first)
    h = layers.GlobalAveragePooling1D()(second)
    h = layers.Add()([shared(h), shared(inner(b))])
    h = Block(5, name="block")(h, training=None)
    frozen = layers.BatchNormalization(name="frozen", trainable=False)(h)
    outputs = [layers.Dense(2, name="left")(frozen), layers.Dense(1, name="right")(h)]
    model = keras.Model([a, b], outputs, name="everything")
    model.get_layer("inner").layers[0].trainable = False
    model.get_layer("block").normalization.trainable = False
    return with_random_statistics(model)


def inputs(count=6):
    r = np.random.default_rng(0)
    return {
        "a": r.normal(size=(count, 4, 6)).astype("float32"),
        "b": r.normal(size=(count, 6)).astype("float32"),
    }


def test_any_model():
    model = everything()
    before = model.get_weights()
    replaced = replace_batchnorm_layers(model, accum_steps=3)
    assert type(normalizations(model)[0]) is layers.BatchNormalization
    assert len(normalizations(replaced)) == 6
    for original, layer in zip(
        normalizations(model), normalizations(replaced), strict=True
    ):
        assert type(layer) is AccumBatchNormalization
        assert layer.accum_steps == 3
        config, kept = original.get_config(), layer.get_config()
        for name in ("renorm", "renorm_clipping", "renorm_momentum"):
            config.pop(name, None)
        assert {name: kept[name] for name in config} == config
    flags = [[x.trainable for x in m._flatten_layers()] for m in (model, replaced)]
    assert flags[0] == flags[1]
    names = [[x.name for x in m._flatten_layers()] for m in (model, replaced)]
    assert names[0] == names[1]
    assert_inference(replaced, model, inputs())
    replaced = replace_batchnorm_layers(model)
    targets = [np.ones((6, 2)), np.ones((6, 1))]
    for each in (model, replaced):
        each.compile(keras.optimizers.SGD(0.01), ["mse", "mse"])
        each.train_on_batch(inputs(), targets)
    assert_weights(replaced, model, before)


def test_back_again(tmp_path):
    model = everything()
    replaced = replace_batchnorm_layers(model, accum_steps=2)
    restored = restore_batchnorm_layers(replaced)
    assert all(type(x) is layers.BatchNormalization for x in normalizations(restored))
    for a, b in zip(normalizations(restored), normalizations(model), strict=True):
        assert a.get_config() == b.get_config()
    assert_inference(restored, model, inputs())
    restored.save(tmp_path / "m.keras")
    assert "gradient_accumulator" not in str(restored.get_config())
    targets = [np.ones((6, 2)), np.ones((6, 1))]
    restored.compile(keras.optimizers.SGD(0.01), ["mse", "mse"])
    restored.fit(inputs(), targets, verbose=0)


def test_a_renormalizing_layer_infers_as_a_plain_one():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [layers.Input((4,)), AccumBatchNormalization(renorm=True), layers.Dense(2)]
    )
    with_random_statistics(model)
    restored = restore_batchnorm_layers(model)
    assert_inference(restored, model, np.ones((3, 4), "float32"))


def test_a_model_that_is_not_built():
    model = keras.Sequential([layers.Dense(3), layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"`model`.*Received: model="):
        replace_batchnorm_layers(model)


@pytest.mark.parametrize("setting", [{"accum_steps": 3}, {"microbatch_size": 2}])
def test_how_the_model_accumulates_is_kept(setting):
    x = layers.Input((4,))
    y = layers.Dense(1)(layers.BatchNormalization()(x))
    in_place = accumulate(keras.Model(x, y), **setting)
    own = GradientAccumulateModel(inputs=x, outputs=y, **setting)
    for model in (in_place, own):
        replaced = replace_batchnorm_layers(model)
        assert accumulation_of(replaced) == accumulation_of(model) is not None
        replaced.compile("sgd", "mse")
        if "microbatch_size" in setting:
            replaced.fit(np.ones((4, 4)), np.ones((4, 1)), verbose=0)
    assert isinstance(replaced, GradientAccumulateModel)
    assert accumulation_of(replace_batchnorm_layers(keras.Model(x, y))) is None


class Written(keras.Model):
    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(units)
        self.normalization = layers.BatchNormalization(name="of_mine")

    def call(self, x, training=None):
        return self.normalization(self.dense(x), training=training)

    def get_config(self):
        return {**super().get_config(), "units": self.dense.units}


@pytest.mark.core
def test_what_preprocessing_layers_have_learned():
    r = np.random.default_rng(0)
    x = r.normal(3, 5, (64, 6)).astype("float32")
    normalization = layers.Normalization()
    normalization.adapt(x)
    bins = layers.Discretization(num_bins=4)
    bins.adapt(x)
    inputs = layers.Input((6,))
    h = layers.Add()([normalization(inputs), keras.ops.cast(bins(inputs), "float32")])
    h = layers.Lambda(lambda t: 2 * t)(h)
    outputs = layers.Dense(2)(layers.BatchNormalization()(h))
    model = with_random_statistics(keras.Model(inputs, outputs))
    assert_inference(replace_batchnorm_layers(model), model, x)


def test_a_nested_model_of_layers_of_ones_own():
    inner = keras.Sequential([layers.Input((6,)), Block(4), layers.Dense(3)])
    x = layers.Input((6,))
    inner = keras.Model(x, inner(layers.Lambda(lambda t: t + 1)(x)), name="inner")
    model = keras.Sequential([layers.Input((6,)), inner, layers.Dense(2)])
    inner.layers[-1].layers[1].bias.trainable = False
    with_random_statistics(model)
    replaced = replace_batchnorm_layers(model)
    assert_inference(replaced, model, np.ones((3, 6), "float32"))
    assert [w.trainable for w in replaced.weights] == [
        w.trainable for w in model.weights
    ]


def branches():
    """Two nested models, a functional and a sequential one, that share a layer."""
    shared = layers.BatchNormalization(name="shared")
    x = layers.Input((6,))
    left = keras.Model(x, layers.Dense(3)(shared(layers.Dense(6)(x))), name="left")
    right = keras.Sequential([layers.Input((6,)), shared, layers.Dense(3)])
    return x, layers.Add()([left(x), right(x)])


def a_part_outside():
    """A layer of a nested model that is also called before it and after it."""
    x = layers.Input((6,))
    inner = keras.Model(
        x, layers.Dense(6)(layers.BatchNormalization(name="part")(x)), name="inner"
    )
    inner = keras.Sequential([layers.Input((6,)), inner], name="outer")
    part = inner.layers[0].get_layer("part")
    return x, part(inner(part(x)))


def a_nested_model_twice():
    """A nested model that is called in another model and on its own."""
    x = layers.Input((6,))
    inner = keras.Sequential(
        [layers.Input((6,)), layers.BatchNormalization(), layers.Dense(6)], name="inner"
    )
    outer = keras.Model(x, layers.Dense(6)(inner(x)), name="outer")
    return x, layers.Add()([outer(x), inner(x)])


@pytest.mark.parametrize("graph", [branches, a_part_outside, a_nested_model_twice])
@pytest.mark.core
def test_what_nested_models_share_is_shared(graph):
    model = with_random_statistics(keras.Model(*graph()))
    replaced = replace_batchnorm_layers(model)
    for copy in (replaced, restore_batchnorm_layers(replaced)):
        for each, original in zip(
            copy._flatten_layers(), model._flatten_layers(), strict=True
        ):
            assert each.name == original.name
            assert each is not original
        assert [w.shape for w in copy.weights] == [w.shape for w in model.weights]
        assert_inference(copy, model, inputs()["b"])
    assert [type(x) for x in normalizations(replaced)] == [AccumBatchNormalization]
    copy = restore_batchnorm_layers(replaced)
    before = model.get_weights()
    for each in (model, copy):
        each.compile(keras.optimizers.SGD(0.01), "mse")
        each.train_on_batch(inputs()["b"], np.ones((6, *model.output_shape[1:])))
    assert_weights(copy, model, before)


class NotMadeAgain(Written):
    def __init__(self, table, **kwargs):
        super().__init__(table.shape[0], **kwargs)

    def get_config(self):
        raise NotImplementedError


def test_a_subclassed_model_that_can_be_made_again():
    model = Written(5)
    model(np.ones((2, 4), "float32"))
    with_random_statistics(model)
    replaced = replace_batchnorm_layers(model)
    assert type(replaced.normalization) is AccumBatchNormalization
    assert_inference(replaced, model, np.ones((3, 4), "float32"))


def test_a_subclassed_model_that_cannot_be_made_again():
    model = NotMadeAgain(np.ones((3, 2)), name="mine")
    model(np.ones((2, 4), "float32"))
    with pytest.raises(ValueError, match=r"'mine'.*Received: .*'of_mine'"):
        replace_batchnorm_layers(model)
    x = layers.Input((4,))
    with pytest.raises(ValueError, match=r"'mine'.*Received: .*'of_mine'"):
        replace_batchnorm_layers(keras.Model(x, model(x)))
    assert type(model.normalization) is layers.BatchNormalization


class OwnNormalization(layers.BatchNormalization):
    pass


def test_a_normalization_of_ones_own():
    model = keras.Sequential([layers.Input((4,)), OwnNormalization(name="own")])
    with pytest.raises(ValueError, match=r"Received: layer=.*own"):
        replace_batchnorm_layers(model)


def test_bad_arguments():
    model = keras.Sequential([layers.Input((4,)), layers.BatchNormalization()])
    with pytest.raises(TypeError, match=r"`accum_steps`.*Received: accum_steps='4'"):
        replace_batchnorm_layers(model, "4")
    for function in (replace_batchnorm_layers, restore_batchnorm_layers):
        with pytest.raises(TypeError, match=r"`model`.*Received: model=3"):
            function(3)
    assert by_its_old_path is replace_batchnorm_layers
