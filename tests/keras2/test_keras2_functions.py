"""On Keras 2: names of version 0.5.2, functions, and arguments that were removed."""

import numpy as np
import pytest
import tensorflow as tf
from api import KERAS_2

if not KERAS_2:
    pytest.skip("of Keras 2 only", allow_module_level=True)

from helpers.keras2 import (
    EXAMPLES,
    K,
    assert_same,
    compiled,
    data,
    fit,
    network,
    values,
    wrapped,
)

from gradient_accumulator import (
    AccumBatchNormalization,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    accumulate,
    accumulated_value_and_grad,
    adaptive_clip_grad,
)
from gradient_accumulator.utils import replace_batchnorm_layers

optimizers = tf.keras.optimizers


def test_adaptive_gradient_clipping_of_the_finished_gradient():
    """Version 0.5.2 clipped each micro-batch, which gives another result."""

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


def test_a_backend_of_keras_3_is_no_matter(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    fit(compiled(wrapped(), "sgd"), EXAMPLES // K)


def test_a_config_without_layers():
    with pytest.raises(ValueError, match=r"version 0\.5.* Received: config"):
        GradientAccumulateModel.from_config({"name": "model"})
