"""Sentences of many lengths, made up: a language in which few words follow a word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradient_accumulator_cli.demo.data import Arrays

WORDS = 64  # with 0, which pads
LONGEST = 40
FOLLOWERS = 4  # words that may come after a word


@dataclass(frozen=True)
class Size:
    """How much the demonstration does with sentences."""

    sentences: int  # in an epoch
    validation_sentences: int
    batch_size: int  # sentences that one update is computed from
    microbatch_size: int  # sentences on the device at one time
    epochs: int


SIZES = {
    "full": Size(
        sentences=256,
        validation_sentences=64,
        batch_size=32,
        microbatch_size=4,
        epochs=6,
    ),
    "small": Size(
        sentences=256,
        validation_sentences=64,
        batch_size=32,
        microbatch_size=4,
        epochs=2,
    ),
}


def prepare(size: Size, seed: int = 0) -> Arrays:
    """Everything that a training run reads, as named arrays."""
    rng = np.random.default_rng(seed)
    followers = rng.integers(1, WORDS, (WORDS, FOLLOWERS))
    training = _write(size.sentences, followers, rng)
    validation = _write(size.validation_sentences, followers, rng)
    return {
        **{f"train_{name}": array for name, array in training.items()},
        **{f"val_{name}": array for name, array in validation.items()},
    }


def _write(count: int, followers: np.ndarray, rng: np.random.Generator) -> Arrays:
    """Sentences, most of them short and some long, and the next word of each word."""
    text: np.ndarray = np.zeros((count, LONGEST + 1), "int32")
    text[:, 0] = rng.integers(1, WORDS, count)
    for i in range(LONGEST):
        text[:, i + 1] = followers[text[:, i], rng.integers(0, FOLLOWERS, count)]
    lengths = np.minimum(1 + rng.geometric(0.1, count), LONGEST)
    inside = np.arange(LONGEST) < lengths[:, None]
    return {"x": text[:, :-1] * inside, "y": text[:, 1:] * inside}
