"""The models that are timed, with made-up data of the right shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np


@dataclass(frozen=True)
class Problem:
    """A model, data for it, and how many updates make an epoch worth timing."""

    build: Callable
    data: Callable[[int], tuple[np.ndarray, np.ndarray]]
    updates: int


def _images(count: int):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count, 48, 48, 3), dtype="float32")
    return images, rng.integers(0, 10, count, dtype="int32")


def _tokens(count: int):
    tokens = np.random.default_rng(0).integers(1, 1000, (count, 65), dtype="int32")
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def _features(width: int):
    def data(count: int):
        rng = np.random.default_rng(0)
        features = rng.standard_normal((count, width), dtype="float32")
        return features, rng.integers(0, 10, count, dtype="int32")

    return data


def _convolutions(normalized: bool = False):
    """Residual blocks at 48, 24 and 12 pixels."""
    import keras
    from keras import layers

    def convolve(x, filters, strides=1):
        if normalized:
            x = layers.BatchNormalization()(x)
        return layers.Conv2D(
            filters,
            3,
            strides=strides,
            padding="same",
            activation="relu",
            kernel_initializer="he_normal",
        )(x)

    inputs = x = keras.Input((48, 48, 3))
    for filters, strides in (16, 1), (32, 2), (64, 2):
        x = convolve(x, filters, strides)
        x = layers.add([x, convolve(convolve(x, filters), filters)])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def _transformer():
    """Four pre-norm blocks over 64 tokens that predict the next one."""
    import keras
    from keras import layers

    inputs = keras.Input((64,), dtype="int32")
    x = layers.Embedding(1000, 128)(inputs)
    for _ in range(4):
        y = layers.LayerNormalization()(x)
        x = layers.add(
            [x, layers.MultiHeadAttention(4, 32)(y, y, use_causal_mask=True)]
        )
        y = layers.LayerNormalization()(x)
        y = layers.Dense(512, activation="gelu")(y)
        x = layers.add([x, layers.Dense(128)(y)])
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(1000)(x))


def _perceptron(features: int, *widths: int):
    def build():
        import keras
        from keras import layers

        inputs = x = keras.Input((features,))
        for width in widths:
            x = layers.Dense(width, activation="relu", kernel_initializer="he_normal")(
                x
            )
        return keras.Model(inputs, layers.Dense(10)(x))

    return build


MODELS = {
    "convolutions": Problem(_convolutions, _images, updates=8),
    "transformer": Problem(_transformer, _tokens, updates=4),
    "3 x Dense(2048)": Problem(
        _perceptron(2048, 2048, 2048, 2048), _features(2048), updates=8
    ),
    "60-layer MLP": Problem(_perceptron(64, *[64] * 60), _features(64), updates=16),
    "tiny MLP": Problem(_perceptron(16, 32), _features(16), updates=128),
    "normalized convolutions": Problem(
        partial(_convolutions, normalized=True), _images, updates=8
    ),
}
# What ways to train are compared on.
FIVE = [*MODELS][:5]
