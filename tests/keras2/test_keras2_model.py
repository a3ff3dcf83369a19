"""On Keras 2: what the documentation of gradient-accumulator 0.5.2 shows, exactly.

Its users change nothing but the version.
"""

import re

import numpy as np
import pytest
import tensorflow as tf
from api import KERAS_2

if not KERAS_2:
    pytest.skip("of Keras 2 only", allow_module_level=True)

from helpers import Batches
from problems import cut

from gradient_accumulator import (
    AccumBatchNormalization,
    AccumulationWarning,
    FlushGradients,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    accumulate,
    accumulated_value_and_grad,
    adaptive_clip_grad,
)
from gradient_accumulator.utils import replace_batchnorm_layers

layers, optimizers = tf.keras.layers, tf.keras.optimizers
K, EXAMPLES = 3, 12


def data(examples=EXAMPLES):
    r = np.random.default_rng(0)
    x = r.normal(size=(examples, 6)).astype("float32")
    return x, r.normal(size=(examples, 3)).astype("float32")


def network(**arguments):
    tf.keras.utils.set_random_seed(0)
    x = tf.keras.Input((6,))
    h = layers.Dense(8, activation="tanh", kernel_regularizer="l2")(x)
    return tf.keras.Model(x, layers.Dense(3, **arguments)(h))


def values(model):
    return [np.asarray(tf.cast(w, "float32")) for w in model.weights]


def assert_same(model, reference, tolerance=1e-5):
    start = values(network())
    for a, b, c in zip(values(model), values(reference), start):
        moved = np.abs(b - c).max()
        assert np.abs(a - b).max() <= tolerance * moved + 1e-7


def fit(model, batch=EXAMPLES, **arguments):
    x, y = data()
    model.fit(x, y, batch_size=batch, epochs=3, shuffle=False, verbose=0, **arguments)
    return model


def wrapped(model=None, **arguments):
    model = network() if model is None else model
    arguments = {"accum_steps": K, **arguments}
    return GradientAccumulateModel(
        inputs=model.input, outputs=model.output, **arguments
    )


def compiled(model, optimizer, loss="mse", **arguments):
    model.compile(optimizer, loss, **arguments)
    return model


@pytest.mark.parametrize("jit_compile", [None, True])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_the_model_wrapper(run_eagerly, jit_compile):
    if run_eagerly and jit_compile:
        pytest.skip("Keras 2 compiles nothing where it runs eagerly")
    settings = {"run_eagerly": run_eagerly, "jit_compile": jit_compile}
    reference = fit(compiled(network(), optimizers.Adam(0.1), metrics=["mae"]))
    model = compiled(wrapped(), optimizers.Adam(0.1), metrics=["mae"], **settings)
    assert_same(fit(model, EXAMPLES // K), reference)
    np.testing.assert_allclose(
        model.evaluate(*data(), verbose=0),
        reference.evaluate(*data(), verbose=0),
        rtol=1e-5,
    )


def test_the_wrappers_settings_by_position():
    model = network()
    made = GradientAccumulateModel(
        K, True, False, 0.01, 1e-3, True, inputs=model.input, outputs=model.output
    )
    reference = fit(compiled(network(), optimizers.Adam(0.1)))
    assert_same(fit(compiled(made, optimizers.Adam(0.1)), EXAMPLES // K), reference)


LEGACY = optimizers.legacy
OPTIMIZERS = {
    "name": lambda: "Adam",
    "adam": lambda: optimizers.Adam(0.1, clipnorm=0.1),
    "schedule": lambda: optimizers.SGD(
        optimizers.schedules.ExponentialDecay(0.4, 1, 0.6), momentum=0.9
    ),
    "averages": lambda: optimizers.AdamW(0.1, use_ema=True),
    "legacy_adam": lambda: LEGACY.Adam(0.1, clipvalue=0.01),
    "legacy_sgd": lambda: LEGACY.SGD(0.1, momentum=0.9, global_clipnorm=0.1),
    "legacy_decay": lambda: LEGACY.RMSprop(0.01, decay=0.3, epsilon=1e-2),
    "legacy_schedule": lambda: LEGACY.Adagrad(
        optimizers.schedules.PiecewiseConstantDecay([1, 2], [0.4, 0.2, 0.1])
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_wrapper(name):
    reference = fit(compiled(network(), OPTIMIZERS[name]()))
    optimizer = GradientAccumulateOptimizer(optimizer=OPTIMIZERS[name](), accum_steps=K)
    model = fit(compiled(network(), optimizer), EXAMPLES // K)
    assert_same(model, reference)
    assert int(optimizer.iterations) == int(reference.optimizer.iterations) == 3


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_loss_scaling(legacy, around):
    def scaled(optimizer):
        return tf.keras.mixed_precision.LossScaleOptimizer(optimizer)

    def adam():
        return (LEGACY if legacy else optimizers).Adam(0.1)

    reference = fit(compiled(network(), scaled(adam())))
    if around:
        optimizer = scaled(GradientAccumulateOptimizer(adam(), K))
    else:
        optimizer = GradientAccumulateOptimizer(scaled(adam()), K)
    model = fit(compiled(network(), optimizer), EXAMPLES // K)
    assert_same(model, reference)
    # One micro-batch that is not finite skips the update, and lowers the scale once.
    scaler = optimizer if around else optimizer.inner_optimizer
    before, scale = values(model), float(scaler.loss_scale)
    x, y = data()
    y[5] = np.inf
    model.fit(x, y, batch_size=EXAMPLES // K, shuffle=False, verbose=0)
    for a, b in zip(values(model), before):
        np.testing.assert_array_equal(a, b)
    assert float(scaler.loss_scale) == scale / 2


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("wrapper", ["model", "optimizer"])
def test_mixed_precision(policy, wrapper):
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        head = {"dtype": "float32"}
        reference = compiled(network(**head), optimizers.Adam(0.01, epsilon=1e-3))
        if wrapper == "model":
            model = compiled(
                wrapped(network(**head), mixed_precision=True),
                optimizers.Adam(0.01, epsilon=1e-3),
            )
        else:
            adam = optimizers.Adam(0.01, epsilon=1e-3)
            if policy == "mixed_float16":
                adam = tf.keras.mixed_precision.LossScaleOptimizer(adam)
            model = compiled(
                network(**head), GradientAccumulateOptimizer(adam, accum_steps=K)
            )
    finally:
        tf.keras.mixed_precision.set_global_policy(None)  # what `floatx` says
    # Rounding of half precision, which sums of micro-batches have another of.
    assert_same(fit(model, EXAMPLES // K), fit(reference), tolerance=0.1)


def test_a_loss_scale_optimizer_around_flushes_and_resets():
    inner = GradientAccumulateOptimizer(optimizers.SGD(1.0), 3)
    scaler = tf.keras.mixed_precision.LossScaleOptimizer(inner)
    weight = tf.Variable(tf.ones(2))
    for finish, expected in (scaler.reset, 1), (scaler.flush, 0):
        scaler.apply_gradients([(tf.ones(2), weight)])
        assert inner.pending == 1
        finish()
        assert inner.pending == 0
        np.testing.assert_allclose(weight, expected)


def test_adaptive_gradient_clipping_of_the_finished_gradient():
    """The re-created system clipped each micro-batch, which is something else."""

    class Clipped(tf.keras.Model):
        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            variables = self.trainable_variables
            gradients = adaptive_clip_grad(variables, tape.gradient(loss, variables))
            self.optimizer.apply_gradients(zip(gradients, variables))
            return {}

    plain = network()
    reference = Clipped(plain.input, plain.output)
    fit(compiled(reference, optimizers.SGD(1.0)))
    model = compiled(wrapped(use_agc=True), optimizers.SGD(1.0))
    assert_same(fit(model, EXAMPLES // K), reference)
    by_optimizer = GradientAccumulateOptimizer(optimizers.SGD(1.0), K, use_agc=True)
    assert_same(fit(compiled(network(), by_optimizer), EXAMPLES // K), reference)


def test_several_inputs_and_outputs():
    def build():
        tf.keras.utils.set_random_seed(0)
        a, b = tf.keras.Input((6,)), tf.keras.Input((6,))
        h = layers.Concatenate()([layers.Dense(4)(a), layers.Dense(4)(b)])
        return tf.keras.Model([a, b], [layers.Dense(3)(h), layers.Dense(1)(h)])

    x, y = data()
    targets = [y, y[:, :1]]
    reference = compiled(build(), optimizers.Adam(0.1), ["mse", "mae"])
    reference.fit([x, -x], targets, batch_size=EXAMPLES, epochs=3, verbose=0)
    model = build()
    model = compiled(
        GradientAccumulateModel(K, inputs=model.inputs, outputs=model.outputs),
        optimizers.Adam(0.1),
        ["mse", "mae"],
    )
    model.fit([x, -x], targets, batch_size=4, epochs=3, verbose=0, shuffle=False)
    for a, b in zip(values(model), values(reference)):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["model", "optimizer", "legacy"])
def test_sparse_embeddings(wrapper):
    def build():
        tf.keras.utils.set_random_seed(0)
        x = tf.keras.Input((4,), dtype="int32")
        h = layers.GlobalAveragePooling1D()(layers.Embedding(20, 5)(x))
        return tf.keras.Model(x, layers.Dense(3)(h))

    x = np.random.default_rng(0).integers(0, 20, (EXAMPLES, 4))
    _, y = data()
    kind = LEGACY if wrapper == "legacy" else optimizers
    reference = compiled(build(), kind.Adam(0.1))
    reference.fit(x, y, batch_size=EXAMPLES, epochs=3, verbose=0)
    if wrapper == "model":
        model = compiled(wrapped(build()), kind.Adam(0.1))
    else:
        model = compiled(build(), GradientAccumulateOptimizer(kind.Adam(0.1), K))
    model.fit(x, y, batch_size=4, epochs=3, verbose=0, shuffle=False)
    for a, b in zip(values(model), values(reference)):
        np.testing.assert_allclose(a, b, atol=1e-5)


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
    """The re-created system normalizes whatever the rank; Keras's own cannot."""
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


HDF5_IS_OLD = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")


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


@pytest.mark.parametrize("wrapper", ["model", "optimizer", "legacy"])
def test_mirrored_strategy(wrapper):
    reference = fit(compiled(network(), optimizers.Adam(0.1)))
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        if wrapper == "model":
            model = compiled(wrapped(), optimizers.Adam(0.1))
        else:
            kind = LEGACY if wrapper == "legacy" else optimizers
            optimizer = GradientAccumulateOptimizer(kind.Adam(0.1), K)
            model = compiled(network(), optimizer)
    assert_same(fit(model, EXAMPLES // K), reference)


@HDF5_IS_OLD
@pytest.mark.parametrize("suffix", [".keras", ".h5", ""])
def test_saving_a_model_that_accumulates(suffix, tmp_path):
    model = compiled(wrapped(), optimizers.Adam(0.1))
    fit(model, EXAMPLES // K)
    model.save(tmp_path / f"model{suffix}")
    loaded = tf.keras.models.load_model(tmp_path / f"model{suffix}", compile=True)
    assert_same(loaded, model, tolerance=0)
    np.testing.assert_array_equal(
        loaded.predict(data()[0], verbose=0), model.predict(data()[0], verbose=0)
    )
    assert isinstance(loaded, GradientAccumulateModel)
    if suffix:  # plain Keras 2 loses the optimizer's state in a SavedModel
        assert_same(fit(loaded, EXAMPLES // K), fit(model, EXAMPLES // K))


@HDF5_IS_OLD
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("legacy", [False, True])
def test_saving_in_the_middle_of_an_accumulation(suffix, legacy, tmp_path):
    adam = (LEGACY if legacy else optimizers).Adam(0.1)
    model = compiled(network(), GradientAccumulateOptimizer(adam, K))
    x, y = data(4)
    model.fit(x, y, verbose=0)
    assert model.optimizer.pending == 1
    model.save(tmp_path / f"model{suffix}")
    loaded = tf.keras.models.load_model(tmp_path / f"model{suffix}", compile=True)
    assert type(loaded.optimizer.inner_optimizer) is type(adam)
    assert loaded.optimizer.pending == 1
    for each in (loaded, model):
        each.fit(*data(8), batch_size=4, shuffle=False, verbose=0)
    assert_same(loaded, model, tolerance=0)


def test_the_last_microbatches_of_an_epoch():
    x, y = data(10)  # 4, 4 and 2
    reference = compiled(network(), optimizers.Adam(0.1))
    reference.fit(x, y, batch_size=10, epochs=2, verbose=0)
    model = compiled(wrapped(accum_steps=5, warn=False), optimizers.Adam(0.1))
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert_same(model, reference)
    optimizer = GradientAccumulateOptimizer(optimizers.Adam(0.1), 5)
    model = compiled(network(), optimizer)
    microbatches = cut((x[:8], y[:8]), 4)
    model.fit(Batches(microbatches), epochs=2, verbose=0, callbacks=[FlushGradients()])
    assert int(optimizer.iterations) == 2
    assert optimizer.pending == 0


def test_flush_gradients_of_optimizers_that_a_model_holds():
    class Both(tf.keras.Model):
        """A `train_step` of its own, with an optimizer for each layer."""

        def __init__(self, *optimizers):
            super().__init__()
            tf.keras.utils.set_random_seed(0)
            self.parts = [layers.Dense(3), layers.Dense(3)]
            self.own = optimizers

        def call(self, x):
            return sum(part(x) for part in self.parts)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = tf.reduce_mean(tf.square(self(x) - y))
            gradients = [tape.gradient(loss, p.trainable_variables) for p in self.parts]
            for optimizer, part, each in zip(self.own, self.parts, gradients):
                optimizer.apply_gradients(zip(each, part.trainable_variables))
            return {"loss": loss}

    def trained(size, wrap, flush):
        own = [wrap(optimizers.Adam(0.1)) for _ in range(2)]
        model = Both(*own)
        model(data()[0])
        for optimizer, part in zip(own, model.parts):
            optimizer.build(part.trainable_variables)
        model.compile()
        x, y = data(10)  # 6 and 4, in micro-batches of 2
        model.fit(
            x, y, batch_size=size, epochs=2, verbose=0, shuffle=False,
            callbacks=flush(own),
        )  # fmt: skip
        return values(model), own

    expected, _ = trained(6, lambda optimizer: optimizer, lambda own: [])
    got, own = trained(
        2,
        lambda optimizer: GradientAccumulateOptimizer(optimizer, 3),
        lambda own: [FlushGradients(*own)],
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert [int(o.iterations) for o in own] == [4, 4]
    with pytest.raises(ValueError, match=r"FlushGradients\(g_optimizer, .*Received: "):
        trained(2, lambda o: GradientAccumulateOptimizer(o, 3), lambda own: [
            FlushGradients()
        ])  # fmt: skip
    with pytest.raises(ValueError, match=r"takes optimizers.*Received: "):
        FlushGradients(optimizers.legacy.SGD(0.1))


@pytest.mark.parametrize(
    "name, advice",
    [
        ("clipnorm", r"Adam\(clipnorm=...\)"),
        ("clipvalue", r"Adam\(clipvalue=...\)"),
        ("lr", "`learning_rate`"),
        ("decay", "schedule"),
        ("step", "`iterations`"),
        ("gradients", "`pending`"),
    ],
)
def test_arguments_and_attributes_that_are_gone(name, advice):
    with pytest.raises(TypeError, match=f"`{name}`: .*{advice}.*Received: {name}=0.5"):
        GradientAccumulateOptimizer("SGD", K, **{name: 0.5})
    if name in ("step", "gradients"):
        with pytest.raises(AttributeError, match=advice):
            getattr(GradientAccumulateOptimizer("SGD", K), name)


def test_arguments_that_are_not_there():
    for call in (
        lambda **a: GradientAccumulateOptimizer("SGD", **a),
        lambda **a: GradientAccumulateModel(**a),
        lambda **a: wrapped(**a),
        lambda **a: accumulate(network(), **a),
    ):
        with pytest.raises(TypeError, match=r"use `accum_steps` .*Received: .*steps=4"):
            call(gradient_accumulation_steps=4)
    with pytest.raises(TypeError, match=r"`zzz`: it has `optimizer`.*Received: zzz=1"):
        GradientAccumulateOptimizer("SGD", K, zzz=1)
    with pytest.raises(TypeError, match=r"by position.*Received: 8 by position"):
        GradientAccumulateModel(1, False, False, 0.01, 1e-3, False, 8)


@pytest.mark.parametrize("legacy", [False, True])
def test_repr(legacy):
    inner = (optimizers.legacy if legacy else optimizers).SGD(0.1)
    optimizer = GradientAccumulateOptimizer(inner, K)
    expected = "<GradientAccumulateOptimizer optimizer=SGD, accum_steps=3>"
    assert repr(optimizer) == expected
    optimizer.build(network().trainable_variables)
    assert repr(optimizer) == expected
    scaled = tf.keras.mixed_precision.LossScaleOptimizer(optimizers.SGD(0.1))
    text = repr(GradientAccumulateOptimizer(scaled, K))
    assert re.search(r"optimizer=LossScaleOptimizer\w*\(SGD\), accum_steps=3", text)


def test_generators_of_variables():
    def trained(kind):
        model = network()
        optimizer = GradientAccumulateOptimizer(optimizers.SGD(0.1, use_ema=True), 1)
        optimizer.build(kind(model.trainable_variables))
        x, y = data()
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        pairs = optimizer.compute_gradients(loss, kind(model.trainable_variables), tape)
        assert len(pairs) == len(model.trainable_variables)
        optimizer.apply_gradients(kind(pairs))
        optimizer.finalize_variable_values(kind(model.trainable_variables))
        return values(model)

    for a, b in zip(trained(iter), trained(list), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parameters_of_pytorchs():
    torch = pytest.importorskip("torch")
    parameters = torch.nn.Linear(3, 2).parameters
    message = r"PyTorch's, and Keras runs on TensorFlow: use Keras 3.*KERAS_BACKEND=tor"
    for call in (
        lambda: GradientAccumulateOptimizer("SGD", K).build(parameters()),
        lambda: adaptive_clip_grad(parameters(), parameters()),
        lambda: accumulated_value_and_grad(lambda _: 0.0, microbatch_size=2)(
            parameters(), data()
        ),
    ):
        with pytest.raises(TypeError, match=f"{message}.*Received: "):
            call()


def test_the_learning_rate_is_found():
    """The re-created system failed: "Optimizer must have a lr attribute"."""
    optimizer = GradientAccumulateOptimizer(optimizers.SGD(0.5), K)
    scheduler = tf.keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    model = compiled(network(), optimizer)
    fit(model, EXAMPLES // K, callbacks=[scheduler])
    assert float(optimizer.lr) == float(optimizer.learning_rate) == 0.5 / 8
    plateau = tf.keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=9.0)
    fit(model, EXAMPLES // K, callbacks=[plateau])
    assert float(optimizer.learning_rate) < 0.5 / 8


def test_names_that_it_exported():
    from gradient_accumulator import accumulators, agc, layers, utils

    assert accumulators.GradientAccumulateModel is GradientAccumulateModel
    assert accumulators.GradientAccumulateOptimizer is GradientAccumulateOptimizer
    assert agc.adaptive_clip_grad is adaptive_clip_grad
    assert layers.AccumBatchNormalization is AccumBatchNormalization
    assert utils.replace_batchnorm_layers is replace_batchnorm_layers


@pytest.mark.parametrize("compiled_loop", [False, True])
def test_a_loop_of_ones_own(compiled_loop):
    def trained(microbatch_size):
        model, optimizer = network(), optimizers.Adam(0.1)
        loss = tf.keras.losses.MeanSquaredError()

        def value(microbatch):
            x, y = microbatch
            return loss(y, model(x, training=True)) + sum(model.losses)

        value_and_grad = accumulated_value_and_grad(
            value, microbatch_size=microbatch_size
        )

        def update(x, y):
            _, gradients = value_and_grad(model.trainable_variables, (x, y))
            optimizer.apply_gradients(zip(gradients, model.trainable_variables))

        update = tf.function(update) if compiled_loop else update
        for _ in range(3):
            update(*map(tf.constant, data()))
        return model

    assert_same(trained(5), trained(EXAMPLES))


def test_a_model_of_the_other_keras_raises():
    keras_3 = pytest.importorskip("keras")
    if not keras_3.__version__.startswith("3."):
        pytest.skip("Keras 3 is not installed")
    model = keras_3.Sequential([keras_3.layers.Input((2,)), keras_3.layers.Dense(1)])
    with pytest.raises(TypeError, match=r"Keras 3.*TF_USE_LEGACY_KERAS.*Received: mod"):
        accumulate(model, microbatch_size=2)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_mean_over_nothing_counts_for_nothing(steps, sparse):
    weight = tf.Variable(tf.ones((1, 2)))
    optimizer = GradientAccumulateOptimizer(optimizers.SGD(1.0), steps)
    for value, worth in [(1.0, 2.0), (np.nan, tf.constant(0.0))][-steps:]:
        gradient = tf.fill((1, 2), value)
        if sparse:
            gradient = tf.IndexedSlices(gradient, tf.constant([0]), (1, 2))
        optimizer.apply_gradients([(gradient, weight)], weight=worth)
    np.testing.assert_array_equal(weight, tf.ones((1, 2)) if steps == 1 else [[0, 0]])


@pytest.mark.parametrize("optimizer", [3, None, tf.keras.layers.Dense])
def test_what_is_no_optimizer(optimizer):
    with pytest.raises(TypeError, match=r"`optimizer`.* Received: optimizer="):
        GradientAccumulateOptimizer(optimizer, K)


def test_an_optimizer_that_accumulates_already():
    with pytest.raises(ValueError, match=r"accumulates already.* Received: "):
        GradientAccumulateOptimizer(GradientAccumulateOptimizer("SGD", 2), 2)
    model = compiled(network(), GradientAccumulateOptimizer("SGD", 2))
    accumulate(model, microbatch_size=2)
    with pytest.raises(ValueError, match=r"so does its optimizer.* Received: "):
        fit(model)


def test_an_update_that_fails_leaves_all_as_it_was():
    model = compiled(wrapped(), optimizers.Adam(0.1))
    fit(model, EXAMPLES // K)
    before = values(model)
    x, y = data()

    def microbatches():
        yield x[:4], y[:4]
        raise OSError("a bad example")

    with pytest.raises(tf.errors.UnknownError, match="a bad example"):
        model.fit(microbatches(), verbose=0)
    for a, b in zip(values(model), before):
        np.testing.assert_array_equal(a, b)


def test_train_on_batch():
    reference = compiled(network(), optimizers.Adam(0.1))
    model = accumulate(compiled(network(), optimizers.Adam(0.1)), microbatch_size=5)
    for each in (reference, model):
        each.train_on_batch(*data())
    assert_same(model, reference)
    accumulate(model, accum_steps=2)
    with pytest.raises(ValueError, match=r"microbatch_size.* Received: accum_steps=2"):
        model.train_on_batch(*data())
    accumulate(model, accum_steps=1)  # plain training again
    for each in (reference, model):
        each.train_on_batch(*data())
    assert_same(model, reference)


@pytest.mark.parametrize("steps_per_execution", [2, 3])
def test_steps_per_execution_validation_and_callbacks(steps_per_execution):
    def run(model, batch, **arguments):
        compiled(model, optimizers.Adam(0.1), metrics=["mae"], **arguments)
        x, y = data(32)
        history = model.fit(
            x,
            y,
            batch_size=batch,
            epochs=3,
            shuffle=False,
            verbose=0,
            validation_data=data(),
            callbacks=[tf.keras.callbacks.EarlyStopping("loss")],
        )
        return model, history.history

    reference, expected = run(network(), 8)
    model, history = run(
        wrapped(accum_steps=2), 4, steps_per_execution=steps_per_execution
    )
    assert_same(model, reference)
    assert history.keys() == expected.keys()
    for name, curve in expected.items():
        np.testing.assert_allclose(history[name], curve, rtol=1e-5)


def test_a_data_set_and_steps_per_epoch():
    x, y = data()
    microbatches = tf.data.Dataset.from_tensor_slices((x, y)).batch(4).repeat()
    model = compiled(wrapped(), optimizers.Adam(0.1))
    model.fit(microbatches, steps_per_epoch=3, epochs=3, verbose=0)
    assert_same(model, fit(compiled(network(), optimizers.Adam(0.1))))


def test_a_generator_of_unknown_length():
    x, y = data(10)

    def microbatches():
        for i in range(0, 10, 4):
            yield x[i : i + 4], y[i : i + 4]

    data_set = tf.data.Dataset.from_generator(
        microbatches,
        output_signature=(tf.TensorSpec((None, 6)), tf.TensorSpec((None, 3))),
    )
    model = compiled(wrapped(accum_steps=2), optimizers.Adam(0.1))
    model.fit(data_set, epochs=2, verbose=0)
    reference = compiled(network(), optimizers.Adam(0.1))
    reference.fit(Batches([(x[:8], y[:8]), (x[8:], y[8:])]), epochs=2, verbose=0)
    assert int(model.optimizer.iterations) == 4
    assert_same(model, reference)


def test_a_mask_of_a_lower_rank_than_the_loss():
    """Each step has two values of the loss, and one of the mask."""

    def build():
        tf.keras.utils.set_random_seed(0)
        x = tf.keras.Input((4,), dtype="int32")
        return tf.keras.Model(
            x, layers.Dense(2)(layers.Embedding(9, 3, mask_zero=True)(x))
        )

    def squares(y, y_pred):
        return tf.square(y - y_pred)

    r = np.random.default_rng(0)
    x = r.integers(0, 9, (EXAMPLES, 4))
    x[:5, 2:] = 0
    y = r.normal(size=(EXAMPLES, 4, 2))
    reference = compiled(build(), optimizers.SGD(0.5), squares)
    model = accumulate(
        compiled(build(), optimizers.SGD(0.5), squares), microbatch_size=5
    )
    histories = [
        each.fit(x, y, batch_size=EXAMPLES, epochs=2, verbose=0).history["loss"]
        for each in (reference, model)
    ]
    np.testing.assert_allclose(*histories, rtol=1e-5)
    for a, b in zip(values(model), values(reference)):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("by_name", [False, True])
def test_what_adaptive_clipping_leaves_out(by_name, tmp_path):
    def make(optimizer):
        plain = network(name="head")
        exclude = "head" if by_name else plain.get_layer("head")
        if optimizer:
            return compiled(
                plain,
                GradientAccumulateOptimizer(
                    optimizers.SGD(1.0), K, use_agc=True, agc_exclude=exclude
                ),
            )
        accumulate(plain, accum_steps=K, use_agc=True, agc_exclude=exclude)
        return compiled(plain, optimizers.SGD(1.0))

    model, other = fit(make(False), EXAMPLES // K), fit(make(True), EXAMPLES // K)
    assert_same(model, other)
    clipped = compiled(wrapped(use_agc=True), optimizers.SGD(1.0))
    assert (
        np.abs(values(fit(clipped, EXAMPLES // K))[2] - values(model)[2]).max() > 1e-3
    )
    other.save(tmp_path / "model.keras")
    loaded = tf.keras.models.load_model(tmp_path / "model.keras")
    assert_same(fit(loaded, EXAMPLES // K), fit(other, EXAMPLES // K))


def test_a_model_that_is_not_compiled():
    model = wrapped()
    with pytest.raises(RuntimeError, match="compile"):
        fit(model, EXAMPLES // K)
    reference = fit(compiled(network(), optimizers.Adam(0.1)))
    assert_same(fit(compiled(model, optimizers.Adam(0.1)), EXAMPLES // K), reference)


def test_a_backend_of_keras_3_is_no_matter(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    fit(compiled(wrapped(), "sgd"), EXAMPLES // K)


def test_where_layers_are_replaced():
    model = normalized(layers.BatchNormalization())
    replace_batchnorm_layers(model, K, position="replace")
    with pytest.raises(ValueError, match=r"`position`.* Received: position='after'"):
        replace_batchnorm_layers(model, K, position="after")


def test_a_config_without_layers():
    with pytest.raises(ValueError, match=r"version 0\.5.* Received: config"):
        GradientAccumulateModel.from_config({"name": "model"})


@pytest.mark.parametrize("sizes, steps, what", [
    ((2, 2, 2, 1), None, "same number of examples"),
    ((2, 2, 2), 9, "ended before `steps_per_epoch`"),
])  # fmt: skip
def test_microbatches_that_are_not_what_they_should_be(sizes, steps, what):
    x, y = data(2)

    def microbatches(sizes):
        specs = tf.TensorSpec((None, 6)), tf.TensorSpec((None, 3))
        return tf.data.Dataset.from_generator(
            lambda: ((x, y[:n]) for n in sizes), output_signature=specs
        )

    model = network()
    model.compile("adam", "mse")
    accumulate(model, accum_steps=4).fit(microbatches((2,) * 4), verbose=0)
    before = values(model)
    with pytest.raises(ValueError, match=rf"{what}.*Received: "):
        model.fit(microbatches(sizes), steps_per_epoch=steps, verbose=0)
    for got, expected in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert int(model.optimizer.iterations) == 1


@pytest.mark.parametrize("loss, couples", [
    (lambda y, p: tf.reduce_mean((y - p) ** 2), False),
    (lambda y, p: tf.reduce_sum((y - p) ** 2), True),
])  # fmt: skip
def test_a_loss_that_couples_examples_is_told_of_once(loss, couples, recwarn):
    model = compiled(wrapped(), optimizers.SGD(0.01), loss)
    for _ in range(2):
        fit(model, EXAMPLES // K)
    messages = [str(w.message) for w in recwarn if w.category is AccumulationWarning]
    assert len(messages) == couples
    assert all("couples the examples" in message for message in messages)
