"""Layers from which users build models."""

import numpy as np
from api import keras, layers

from .data import (
    CLASSES,
    FEATURES,
    STEPS,
    TOKENS,
    classified_tokens,
    images,
    token_sequences,
    vectors,
    weighted,
    weighted_rows,
)
from .losses import logits
from .models import dense_steps, mlp, of_tokens, seeded
from .optimizers import of_class
from .problem import add


def sequential(shape, *body):
    @seeded
    def build():
        model = keras.Sequential([layers.Input(shape)])
        for make in body:
            model.add(make())
        return model

    return build


add(
    "layer_conv2d",
    sequential(
        (8, 8, 2),
        lambda: layers.Conv2D(4, 3, activation="tanh"),
        lambda: layers.AveragePooling2D(2),
        lambda: layers.Flatten(),
        lambda: layers.Dense(CLASSES),
    ),
    images,
    arguments=logits(),
    agc=True,
)
add(
    "layer_depthwise_and_transposed_conv",
    sequential(
        (8, 8, 2),
        lambda: layers.SeparableConv2D(4, 3, strides=2, activation="tanh"),
        lambda: layers.Conv2DTranspose(3, 3, strides=2, activation="tanh"),
        lambda: layers.GlobalAveragePooling2D(),
        lambda: layers.Dense(CLASSES),
    ),
    images,
    arguments=logits(),
)
add(
    "layer_lstm_masked",
    of_tokens(lambda: layers.LSTM(4), lambda: layers.Dense(CLASSES)),
    lambda: weighted(classified_tokens()),
    arguments=logits(),
    core=("accum_steps",),
)
add(
    "layer_gru_bidirectional_masked",
    of_tokens(
        lambda: layers.Bidirectional(layers.GRU(3, return_sequences=True)),
        dense_steps(),
    ),
    token_sequences,
    optimizer_reduction=None,
)


@seeded
def attention():
    """A transformer block without biases, because the key's bias has no gradient."""
    x = layers.Input((STEPS,), dtype="int32")
    h = layers.Embedding(TOKENS, 8, mask_zero=True)(x)
    a = layers.MultiHeadAttention(2, 4, use_bias=False)(h, h)
    h = layers.LayerNormalization()(h + a)
    h = layers.LayerNormalization()(h + layers.Dense(8, activation="gelu")(h))
    return keras.Model(x, layers.Dense(2)(h))


add(
    "layer_attention_masked",
    attention,
    lambda: weighted_rows(token_sequences()),
    optimizer=of_class("SGD", learning_rate=0.02),
)


@seeded
def frozen_normalization():
    x = layers.Input((FEATURES,))
    h = layers.Dense(8)(x)
    normalization = layers.BatchNormalization()
    h = normalization(h)
    normalization.moving_mean.assign(np.linspace(-1, 1, 8))
    normalization.moving_variance.assign(np.linspace(0.5, 2, 8))
    normalization.trainable = False
    return keras.Model(x, layers.Dense(CLASSES)(layers.Activation("tanh")(h)))


add("layer_batch_normalization_frozen", frozen_normalization, vectors)
add(
    "layer_group_and_unit_normalization",
    sequential(
        (FEATURES,),
        lambda: layers.Dense(8),
        lambda: layers.GroupNormalization(groups=2),
        lambda: layers.Activation("tanh"),
        lambda: layers.UnitNormalization(),
        lambda: layers.Dense(CLASSES),
    ),
    vectors,
)
add(
    "layers_inside_a_model_inside_a_model",
    sequential((FEATURES,), mlp(5), lambda: layers.Dense(CLASSES)),
    vectors,
)


def spectral(inner):
    # The layer is made with the model, so that Keras puts equal numbers in names.
    return lambda: layers.SpectralNormalization(inner(), power_iterations=2)


add(
    "layer_spectral_normalization",
    sequential(
        (8, 8, 2),
        spectral(lambda: layers.Conv2D(4, 3, activation="tanh")),
        lambda: layers.Flatten(),
        spectral(lambda: layers.Dense(6, activation="tanh")),
        lambda: layers.Dense(CLASSES),
    ),
    images,
    arguments=logits(),
    keras2=None,  # in Keras 2 the layer branches on a tensor in a graph
    optimizer_reduction=None,  # an optimizer cannot say where an update begins
)
