"""Batches: vectors, tokens, images, weights."""

import numpy as np

SIZES = (12, 7)  # examples of the batches of one epoch
FEATURES, CLASSES, STEPS, TOKENS = 6, 3, 6, 20


def random(seed=0):
    return np.random.default_rng(seed)


def normal(r, *shape):
    return r.normal(size=shape).astype("float32")


def each_size(make, sizes=SIZES, seed=0):
    """The batches, each made by `make(generator, examples)`."""
    r = random(seed)
    return [make(r, count) for count in sizes]


def vectors(outputs=CLASSES):
    return each_size(lambda r, n: (normal(r, n, FEATURES), normal(r, n, outputs)))


def labelled(classes=CLASSES):
    return each_size(
        lambda r, n: (normal(r, n, FEATURES), r.integers(0, classes, n).astype("int32"))
    )


def one_hot():
    return [(x, np.eye(CLASSES, dtype="float32")[y]) for x, y in labelled()]


def uneven(r, *shape):
    """Sample weights between 0.1 and 5, a third of them zero."""
    weights = r.uniform(0.1, 5.0, shape) * (r.uniform(size=shape) > 0.33)
    return weights.astype("float32")


def weighted(batches, weights=lambda r, x, y: uneven(r, len(y))):
    r = random(1)
    return [(x, y, weights(r, x, y)) for x, y in batches]


def zero_from(start, stop, batches=None):
    """Batches whose weights are zero from example `start` to `stop`."""
    batches = weighted(vectors(), lambda r, x, y: r.uniform(0.5, 2, len(y)))
    for _, _, weights in batches:
        weights[start:stop] = 0
    return [(x, y, w.astype("float32")) for x, y, w in batches]


def tokens(r, count, shortest=1):
    """Token numbers from 1. Each row ends in zeros, which `mask_zero` masks."""
    x = r.integers(1, TOKENS, (count, STEPS))
    lengths = r.integers(shortest, STEPS + 1, count)
    lengths[0] = STEPS
    return (x * (np.arange(STEPS) < lengths[:, None])).astype("int32")


def token_sequences(outputs=2):
    return each_size(lambda r, n: (tokens(r, n), normal(r, n, STEPS, outputs)))


def uneven_rows(r, count):
    """The weights of examples, for each step, as Keras requires with a mask.

    They have float64, which Keras copies. On PyTorch plain Keras too multiplies weights
    in float32 by the mask in place, before the metrics see them.
    """
    return np.repeat(uneven(r, count, 1), STEPS, axis=1).astype("float64")


def weighted_rows(batches):
    return weighted(batches, lambda r, x, y: uneven_rows(r, len(x)))


def empty_rows(batches, start, stop):
    """Masks all steps of the rows `start` to `stop` of every batch."""
    for x, *_ in batches:
        x[start:stop] = 0
    return batches


def float_sequences(outputs=2):
    def make(r, n):
        x = normal(r, n, STEPS, 4) * (tokens(r, n) > 0)[..., None]
        return x, normal(r, n, STEPS, outputs)

    return each_size(make)


def images():
    return each_size(
        lambda r, n: (
            normal(r, n, 8, 8, 2),
            r.integers(0, CLASSES, n).astype("int32"),
        )
    )


def classified_tokens():
    return each_size(
        lambda r, n: (tokens(r, n), r.integers(0, CLASSES, n).astype("int32"))
    )
