"""Models and data for the tests of `fit`, and comparisons of their results."""

import copy

import numpy as np
import problems
import pytest
from api import keras, ops

from gradient_accumulator import accumulate

from .exactness import Batches, arrays, assert_close

BASE = problems.mlp()
FULL, MICROBATCH, COUNT = 8, 4, 24  # examples of a batch, of a micro-batch, in all
UPDATES, MICROBATCHES = COUNT // FULL, COUNT // MICROBATCH
WAYS = {
    # the arguments of `accumulate`, and the batch size that `fit` then gets
    "microbatch_size": ({"microbatch_size": MICROBATCH}, FULL),
    "accum_steps": ({"accum_steps": FULL // MICROBATCH}, MICROBATCH),
}
ways = pytest.mark.parametrize("way", WAYS)


def data(count=COUNT, seed=0):
    r = problems.random(seed)
    x = problems.normal(r, count, problems.FEATURES)
    return x, np.tanh(x[:, : problems.CLASSES]).astype("float32")


def compiled(way=None, build=BASE, **arguments):
    """A compiled model: a plain one, or one that accumulates in a way of `WAYS`."""
    model = build()
    model.compile(
        **{"optimizer": keras.optimizers.SGD(0.3, 0.9), "loss": "mse", **arguments}
    )
    return model if way is None else accumulate(model, **WAYS[way][0])


def fit(model, x, y=None, **arguments):
    return model.fit(x, y, **{"shuffle": False, "verbose": 0, **arguments})


def size(way):
    return FULL if way is None else WAYS[way][1]


def both(way, source, build=BASE, settings=None, plain_source=None, **arguments):
    """Trains on `source(batch size)` by plain Keras and in micro-batches; compares."""
    results = []
    for each in (None, way):
        model = compiled(each, build, **(settings() if settings else {}))
        given = ((plain_source if each is None else None) or source)(size(each))
        given = given if isinstance(given, dict) else {"x": given}
        if each is None and "callbacks" in arguments:
            # Some callbacks keep their state when another training begins.
            given["callbacks"] = copy.deepcopy(arguments["callbacks"])
        history = fit(model, **{**arguments, **given})
        results.append((model, history.history))
    (reference, expected), (model, got) = results
    assert_close(arrays(model.weights), arrays(reference.weights))
    assert_close(
        arrays(model.optimizer.variables), arrays(reference.optimizer.variables)
    )
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-5, err_msg=name)
    return model, got


def of_arrays(batch_size):
    x, y = data()
    return {"x": x, "y": y, "batch_size": batch_size}


def of_backend_tensors(batch_size):
    x, y = data()
    return {
        "x": ops.convert_to_tensor(x),
        "y": ops.convert_to_tensor(y),
        "batch_size": batch_size,
    }


def of_tf_data(batch_size):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(data()).batch(batch_size)


def of_py_dataset(batch_size):
    return Batches(problems.cut(data(), batch_size))


def iterated(batches):
    """A generator of these batches."""
    yield from batches


def data_loader(batches):
    """A PyTorch loader of these batches, which may have different sizes."""
    import torch

    tensors = [tuple(map(torch.as_tensor, batch)) for batch in batches]
    return torch.utils.data.DataLoader(tensors, batch_size=None)


def of_data_loader(batch_size):
    import torch

    dataset = torch.utils.data.TensorDataset(*map(torch.as_tensor, data()))
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size)


def of_generator(batch_size):
    batches = problems.cut(data(), batch_size)
    return {
        "x": (batch for _ in range(2) for batch in batches),
        "steps_per_epoch": len(batches),
    }


def of_infinite_generator(batch_size):
    batches = problems.cut(data(), batch_size)

    def forever():
        while True:
            yield from batches

    return {"x": forever(), "steps_per_epoch": len(batches)}


SOURCES = {
    source.__name__: source
    for source in (
        of_arrays,
        of_backend_tensors,
        of_tf_data,
        of_py_dataset,
        of_data_loader,
        of_generator,
        of_infinite_generator,
    )
}


def has_values(x):
    """Whether a layer is called with data, and not traced."""
    try:
        ops.convert_to_numpy(x)
    except Exception:  # each backend raises another class
        return False
    return True


class Record(keras.callbacks.Callback):
    """Records the steps and logs with which batch-level callbacks are called."""

    def __init__(self):
        super().__init__()
        self.begins, self.ends, self.iterations, self.logs = [], [], [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.begins.append(batch)

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(batch)
        self.iterations.append(int(self.model.optimizer.iterations))
        self.logs.append({name: float(value) for name, value in logs.items()})
