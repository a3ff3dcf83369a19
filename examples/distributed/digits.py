"""scikit-learn's digits and a classifier of them, for the examples beside this file."""

import keras
import numpy as np
from sklearn.datasets import load_digits

BATCH = 64  # the number of examples of an update


def data():
    """Returns training and validation data, in the same order in every process."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype("float32"), y[order].astype("int32")
    train = 1600 // BATCH * BATCH
    return (x[:train], y[:train]), (x[train:], y[train:])


def share(array, count, index):
    """Returns the part of every batch that process `index` of `count` trains on."""
    parts = array.reshape(-1, count, BATCH // count, *array.shape[1:])
    return parts[:, index].reshape(-1, *array.shape[1:])


def classifier():
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def report(model, validation):
    accuracy = model.evaluate(*validation, verbose=0, return_dict=True)["accuracy"]
    checksum = sum(float(np.abs(w).sum()) for w in model.get_weights())
    print(f"validation accuracy {accuracy:.3f}, weights {checksum:.3f}", flush=True)
