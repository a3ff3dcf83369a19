"""A small transformer that predicts the next word, compiled for training."""

from __future__ import annotations

import keras
from keras import layers

from gradient_accumulator_cli.demo.sentences import WORDS


def build_language_model(width: int = 32) -> keras.Model:
    """Returns a model with one causal attention layer. Its embedding masks padding."""
    inputs = layers.Input((None,), dtype="int32")
    x = layers.Embedding(WORDS, width, mask_zero=True)(inputs)
    attention = layers.MultiHeadAttention(num_heads=2, key_dim=width // 2)
    x = layers.Add()([x, attention(x, x, use_causal_mask=True)])
    x = layers.LayerNormalization()(x)
    x = layers.Dense(2 * width, activation="swish")(x)
    return keras.Model(inputs, layers.Dense(WORDS)(x), name="language_model")


def compiled_language_model(steps: int | None, updates: int) -> keras.Model:
    """Returns the model, compiled for training.

    Args:
        steps: Keras's `gradient_accumulation_steps`.
        updates: The number of updates of the learning-rate schedule: it warms up in the
            first quarter, and falls to a tenth in the rest.
    """
    model = build_language_model()
    warmup = updates // 4
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=1e-3,
        warmup_target=1e-2,
        warmup_steps=warmup,
        decay_steps=updates - warmup,
        alpha=0.1,
    )
    model.compile(
        keras.optimizers.Adam(
            schedule, epsilon=1e-4, gradient_accumulation_steps=steps
        ),
        # The mean over words: the mask leaves padding out.
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model
