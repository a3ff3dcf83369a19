"""Data for training loops of a user's own, and comparisons of their weights."""

import keras
import numpy as np
import problems

PAD = 0


def data(count=24):
    r = np.random.default_rng(0)
    x = problems.normal(r, count, problems.FEATURES)
    return x, np.tanh(x[:, :3] + problems.normal(r, count, 3))


def assert_equal_weights(ours, reference, before, tolerance=1e-5):
    for a, b, start in zip(ours, reference, before):
        moved = np.abs(b - start).max()
        assert moved > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * moved + 1e-7)


def adam(**settings):
    return keras.optimizers.Adam(0.05, epsilon=1e-2, **settings)


def tokens_and_labels():
    """Sequences of different lengths, so that micro-batches differ in their weights."""
    r = np.random.default_rng(0)
    tokens = problems.tokens(r, 12)
    labels = r.normal(size=(12, problems.STEPS)).astype("float32")
    return tokens, labels, (tokens != PAD).astype("float32")
