"""Made-up sentences of many lengths, in which few words can follow each word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradient_accumulator_cli.demo.data import Arrays

WORDS = 64  # the number of words, with 0, which pads
LONGEST = 40
FOLLOWERS = 4  # the number of words that can follow a word


@dataclass(frozen=True)
class Size:
    """The size of the demonstration on sentences."""

    sentences: int  # the number of sentences in an epoch
    validation_sentences: int
    batch_size: int  # the number of sentences of one update
    microbatch_size: int  # the number of sentences on the device at one time
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
    """Returns the named arrays that a training run reads."""
    rng = np.random.default_rng(seed)
    followers = rng.integers(1, WORDS, (WORDS, FOLLOWERS))
    training = _write(size.sentences, followers, rng)
    validation = _write(size.validation_sentences, followers, rng)
    return {
        **{f"train_{name}": array for name, array in training.items()},
        **{f"val_{name}": array for name, array in validation.items()},
    }


def _write(count: int, followers: np.ndarray, rng: np.random.Generator) -> Arrays:
    """Returns sentences, mostly short ones, and the next word for each word."""
    text: np.ndarray = np.zeros((count, LONGEST + 1), "int32")
    text[:, 0] = rng.integers(1, WORDS, count)
    for i in range(LONGEST):
        text[:, i + 1] = followers[text[:, i], rng.integers(0, FOLLOWERS, count)]
    lengths = np.minimum(1 + rng.geometric(0.1, count), LONGEST)
    inside = np.arange(LONGEST) < lengths[:, None]
    return {"x": text[:, :-1] * inside, "y": text[:, 1:] * inside}
