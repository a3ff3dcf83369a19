"""None in data: no weights, or an optional input."""

import dataclasses
from collections.abc import Callable

import keras
import problems
import pytest
from helpers import BACKEND, BASE, Batches, both, data, ways
from keras import layers
from versions import is_before

X, Y = data()
WEIGHTS = problems.uneven(problems.random(3), len(X))


class AddIfGiven(layers.Layer):
    def call(self, inputs, other=None):
        return inputs if other is None else inputs + other


@problems.seeded
def of_a_dict():
    x = layers.Input((problems.FEATURES,), name="x")
    other = layers.Input((problems.CLASSES,), name="other", optional=True)
    y = AddIfGiven()(layers.Dense(problems.CLASSES)(x), other)
    return keras.Model({"x": x, "other": other}, y)


def of_a_list():
    model = of_a_dict()
    return keras.Model([model.input["x"], model.input["other"]], model.output)


def batches(batch, size):
    return [
        keras.tree.map_structure(
            lambda a, i=i: None if a is None else a[i : i + size], batch
        )
        for i in range(0, len(X), size)
    ]


def of_arrays(batch, size):
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    return {"x": x, "y": y, "sample_weight": sample_weight, "batch_size": size}


def of_generator(batch, size):
    made = batches(batch, size)
    return {"x": (each for each in made), "steps_per_epoch": len(made)}


def of_py_dataset(batch, size):
    return Batches(batches(batch, size))


def of_tf_data(batch, size):
    import tensorflow as tf

    first, *others = map(tf.data.Dataset.from_tensors, batches(batch, size))
    for other in others:
        first = first.concatenate(other)
    return first


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its data, and the sources of data with which plain Keras fails.

    Args:
        build: A function that makes the model.
        batch: The data, which is cut into batches.
        fails: The sources with which plain Keras fails on every backend.
        fails_on_tensorflow: The further sources with which it fails on TensorFlow.
    """

    build: Callable
    batch: tuple
    fails: tuple[str, ...] = ()
    fails_on_tensorflow: tuple[str, ...] = ("of_py_dataset",)

    def sources(self):
        fail = self.fails
        if BACKEND == "tensorflow":
            fail += self.fails_on_tensorflow
        return [name for name in SOURCES if name not in fail]


AS_A_LIST = {
    "fails": ("of_tf_data",),
    "fails_on_tensorflow": ("of_py_dataset", "of_generator"),
}
DATA = {
    "no_weights": Case(BASE, (X, Y, None)),
    "dict": Case(of_a_dict, ({"x": X, "other": None}, Y)),
    "dict_no_weights": Case(of_a_dict, ({"x": X, "other": None}, Y, None)),
    "dict_weights": Case(of_a_dict, ({"x": X, "other": None}, Y, WEIGHTS)),
    "list": Case(of_a_list, ([X, None], Y), **AS_A_LIST),
    "given": Case(of_a_list, ([X, 2 * Y], Y), **AS_A_LIST),
}
SOURCES = {
    source.__name__: source
    for source in (of_arrays, of_generator, of_py_dataset, of_tf_data)
}


def cases():
    """The cases. With one of the reductions, TensorFlow holds all micro-batches."""
    for name, case in DATA.items():
        weighted = len(case.batch) == 3
        holds = "mean_with_sample_weight" if weighted else "sum_over_batch_size"
        for source in case.sources():
            yield name, source, holds, False
    yield "dict_weights", "of_arrays", "sum_over_batch_size", False
    yield "dict_weights", "of_generator", "mean_with_sample_weight", True


@pytest.mark.skipif(is_before("3.12"), reason="plain Keras cannot")
@pytest.mark.parametrize("name, source, reduction, run_eagerly", [*cases()])
@ways
def test_none(way, name, source, reduction, run_eagerly):
    case = DATA[name]
    both(
        way,
        lambda size: SOURCES[source](case.batch, size),
        case.build,
        lambda: {
            "loss": keras.losses.MeanSquaredError(reduction=reduction),
            "run_eagerly": run_eagerly,
        },
    )
