"""Validation accuracy on real digits, normalized by the statistics of 2 examples.

`python -m benchmarks.digits WAY SEED` prints it (`normalization` does this).
"""

from __future__ import annotations

import sys

WAYS = {
    "full": "full batch, `BatchNormalization`",
    "plain": "in pieces, `BatchNormalization`",
    "pooled": "in pieces, `AccumBatchNormalization`",
    "renorm": "in pieces, `renorm=True`",
    "wide": "in pieces, `renorm=True, rmax=10, dmax=10`",
}
BATCH, PIECE, EPOCHS, LEARNING_RATE, MOMENTUM = 64, 2, 25, 3e-3, 0.9


def accuracy(way: str, seed: int) -> float:
    """Of 517 digits that were not trained on; 1280 are."""
    import keras
    import numpy as np
    from keras import layers
    from sklearn.datasets import load_digits

    from gradient_accumulator import AccumBatchNormalization, accumulate

    def normalization():
        if way in ("full", "plain"):
            return layers.BatchNormalization(momentum=MOMENTUM)
        bounds = {"rmax": 10.0, "dmax": 10.0} if way == "wide" else {}
        renorm = way in ("renorm", "wide")
        return AccumBatchNormalization(momentum=MOMENTUM, renorm=renorm, **bounds)

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = (digits.data[order] / 16).astype("float32")
    y = digits.target[order].astype("int32")
    keras.utils.set_random_seed(seed)
    body = [
        layer
        for _ in range(2)
        for layer in (
            layers.Dense(64, use_bias=False),
            normalization(),
            layers.ReLU(),
        )
    ]
    model = keras.Sequential([layers.Input((64,)), *body, layers.Dense(10)])
    if way != "full":
        accumulate(model, microbatch_size=PIECE)
    model.compile(
        keras.optimizers.Adam(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x[:1280], y[:1280], batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return model.evaluate(x[1280:], y[1280:], verbose=0)[1]


if __name__ == "__main__":
    print(accuracy(sys.argv[1], int(sys.argv[2])))
