"""Warnings that users get once, and the line that `fit` prints."""

import sys

import keras
import numpy as np
import problems
import pytest
from helpers import COUNT, FULL, MICROBATCH, SOURCES, compiled, core_on, data, fit, ways
from helpers.notices import normalized, told
from keras import layers, ops

from gradient_accumulator import (
    AccumBatchNormalization,
    accumulate,
    replace_batchnorm_layers,
)

pytestmark = core_on("torch")


# ------------------------------------------------------------- batch normalization


class Inferring(keras.Model):
    """A model that normalizes by moving statistics, as in fine-tuning."""

    def __init__(self):
        super().__init__()
        self.normalization = layers.BatchNormalization()
        self.head = layers.Dense(1)

    def call(self, x):
        return self.head(self.normalization(x, training=False))


def inferring():
    model = Inferring()
    model.compile("sgd", "mse")
    return model


def train_normalized(model, microbatch=2, way="microbatch_size", shape=(4,)):
    x = problems.normal(problems.random(), 8, *shape)
    given = 4 if way == "microbatch_size" else microbatch
    sizes = {"microbatch_size": microbatch, "accum_steps": 2}
    accumulate(model, **{way: sizes[way]})
    return told(lambda: fit(model, x, np.zeros((8, 1), "float32"), batch_size=given))


@ways
def test_batch_normalization(way):
    layer = layers.BatchNormalization(name="of_mine")
    (message,) = train_normalized(normalized(layer), way=way)
    assert "'mine'" in message
    assert "`of_mine`" in message
    assert "replace_batchnorm_layers" in message
    model = replace_batchnorm_layers(normalized(layers.BatchNormalization()))
    model.compile("sgd", "mse")
    assert not train_normalized(model, way=way)


@pytest.mark.parametrize(
    "make",
    [
        lambda: normalized(layers.BatchNormalization(trainable=False)),
        inferring,
        lambda: normalized(layers.LayerNormalization()),
        lambda: normalized(AccumBatchNormalization()),
    ],
)
def test_normalization_that_does_not_couple(make):
    assert not train_normalized(make())


@ways
@pytest.mark.parametrize("cls", [layers.BatchNormalization, AccumBatchNormalization])
def test_one_value_a_channel_is_normalized_to_a_constant(cls, way):
    layer = cls(name="of_mine")
    (message,) = train_normalized(normalized(layer), 1, way)
    assert "returns a constant: `of_mine`" in message
    assert "renorm=True" in message
    x = np.array([[3.0, -2.0, 7.0]], "float32")  # as it is
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(x, training=True)),
        [ops.convert_to_numpy(layer.beta)],
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (lambda: AccumBatchNormalization(renorm=True), (4,), []),
        (lambda: AccumBatchNormalization(), (4, 4, 1), []),
        (lambda: layers.BatchNormalization(), (4, 4, 1), ["by its own statistics"]),
        # The output of the convolution is one pixel.
        (lambda: AccumBatchNormalization(), (3, 3, 1), ["returns a constant"]),
        (
            lambda: layers.TimeDistributed(AccumBatchNormalization()),
            (5, 2),
            ["returns a constant"],
        ),
        (lambda: layers.BatchNormalization(axis=1), (4, 4, 1), ["by its own"]),
    ],
)
def test_one_example_of_several_values_a_channel(layer, shape, expected):
    messages = train_normalized(normalized(layer(), shape), 1, shape=shape)
    assert len(messages) == len(expected)
    for message, words in zip(messages, expected):
        assert words in message


# --------------------------------------------------------- nothing is accumulated


@pytest.mark.parametrize("source", SOURCES)
def test_a_microbatch_as_large_as_every_batch(source):
    model = accumulate(compiled(), microbatch_size=FULL)
    given = SOURCES[source](FULL)
    given = given if isinstance(given, dict) else {"x": given}
    (message,) = told(lambda: fit(model, **given, epochs=2))
    assert f"`microbatch_size={FULL}`" in message
    assert f"had {FULL} examples" in message
    assert not told(lambda: fit(model, *data(), batch_size=FULL))


@pytest.mark.small_arrays
def test_a_microbatch_as_large_as_every_batch_of_small_arrays():
    model = accumulate(compiled(), microbatch_size=100)
    (message,) = told(lambda: fit(model, *data(20), batch_size=FULL, epochs=2))
    assert "`microbatch_size=100`" in message
    assert f"had {FULL} examples" in message


@pytest.mark.parametrize("source", SOURCES)
def test_more_accum_steps_than_an_epoch_has(source):
    model = accumulate(compiled(), accum_steps=COUNT // MICROBATCH + 1)
    given = SOURCES[source](MICROBATCH)
    given = given if isinstance(given, dict) else {"x": given}
    (message,) = told(lambda: fit(model, **given, epochs=2))
    assert f"`accum_steps={COUNT // MICROBATCH + 1}`" in message
    assert f"had {COUNT // MICROBATCH}," in message


@pytest.mark.parametrize(
    "settings, arguments, expected",
    [
        # One batch of the epoch is cut, and the last one is not.
        ({"microbatch_size": 8}, {"batch_size": 16}, 0),
        ({"accum_steps": 6}, {"batch_size": 4}, 0),
        ({"accum_steps": 4}, {"batch_size": 4}, 0),
        ({"accum_steps": 4}, {"batch_size": 4, "steps_per_epoch": 3}, 1),
        ({"microbatch_size": 8, "warn": False}, {"batch_size": 8}, 0),
    ],
)
def test_when_something_is_accumulated(settings, arguments, expected):
    model = accumulate(compiled(), **settings)
    assert len(told(lambda: fit(model, *data(), **arguments))) == expected


# ------------------------------------------------------------------------- one line


def printed(capsys, model, *args, **arguments):
    fit(model, *args, **{"verbose": 1, **arguments})
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("updates from")]


def dataset(batch_size, **arguments):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(data()).batch(batch_size, **arguments)


def test_a_line_at_the_first_fit(capsys):
    model = accumulate(compiled(), microbatch_size=2)
    assert printed(capsys, model, *data(), batch_size=8) == [
        "updates from 8 examples: 4 micro-batches of 2"
    ]
    assert not printed(capsys, model, *data(), batch_size=8)
    accumulate(model, microbatch_size=4)
    assert not printed(capsys, model, *data(), batch_size=8, verbose=0)
    assert not printed(capsys, model, *data(), batch_size=8, verbose=2)
    assert printed(capsys, model, *data(), batch_size=8) == [
        "updates from 8 examples: 2 micro-batches of 4"
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_auto_shows_the_line_in_a_terminal(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    model = accumulate(compiled(), microbatch_size=2)
    assert len(printed(capsys, model, *data(), verbose="auto")) == terminal


@pytest.mark.parametrize(
    "settings, arguments, line",
    [
        ({"microbatch_size": 8}, {}, "24 examples: 3 micro-batches of 8"),
        (
            {"microbatch_size": 5},
            {"batch_size": 16},
            "16 examples: 4 micro-batches of at most 5",
        ),
        (
            {"accum_steps": 3},
            {"batch_size": 4},
            "12 examples: 3 micro-batches of 4",
        ),
        (
            {"accum_steps": 3},
            {"batch_size": 10},
            "24 examples: 3 micro-batches of at most 10",
        ),
        (
            {"accum_steps": 4},
            {"batch_size": 4, "steps_per_epoch": 4},
            "16 examples: 4 micro-batches of 4",
        ),
        (
            {"microbatch_size": 4},
            {"validation_split": 0.5},
            "12 examples: 3 micro-batches of 4",
        ),
        (
            {"microbatch_size": 4},
            {"validation_split": 0.5, "validation_data": data(2)},
            "24 examples: 6 micro-batches of 4",
        ),
        (
            {"accum_steps": 3},
            {"batch_size": 8, "validation_split": 0.3},
            "16 examples: 2 micro-batches of 8",
        ),
        (
            {"accum_steps": 3},
            lambda: {"x": dataset(4)},
            "3 micro-batches",
        ),
        (
            {"accum_steps": 3},
            lambda: {"x": dataset(4, drop_remainder=True)},
            "12 examples: 3 micro-batches of 4",
        ),
        (
            {"microbatch_size": 2},
            lambda: SOURCES["of_generator"](8),
            "one batch each: micro-batches of 2",
        ),
        (
            {"microbatch_size": 2},
            lambda: {"x": SOURCES["of_py_dataset"](8)},
            "one batch each: micro-batches of 2",
        ),
        (
            {"microbatch_size": 2},
            lambda: {"x": SOURCES["of_data_loader"](8)},
            "8 examples: 4 micro-batches of 2",
        ),
    ],
)
def test_what_the_line_says(settings, arguments, line, capsys):
    model = accumulate(compiled(), **settings, warn=False)
    if callable(arguments):
        arguments = arguments()
    else:
        x, y = data()
        arguments = {"x": x, "y": y, **arguments}
    assert printed(capsys, model, **arguments) == [f"updates from {line}"]
