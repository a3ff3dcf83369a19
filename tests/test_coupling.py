"""Losses that couple the examples of a batch: there is one warning about each."""

import warnings

import keras
import numpy as np
import problems
import pytest
from helpers import arrays, compiled, core_on, data, fit, size, ways
from helpers.notices import told
from keras import layers, ops

from gradient_accumulator import (
    AccumulationWarning,
    GradientAccumulateModel,
    accumulate,
)
from gradient_accumulator.coupling import Shape, couples

pytestmark = core_on("torch")

IMAGE = (6, 6, 1)


def segmentation(loss, **arguments):
    """A model of images, with two classes for each pixel."""
    keras.utils.set_random_seed(0)
    x = layers.Input(IMAGE)
    h = layers.Conv2D(3, 3, padding="same", activation="tanh")(x)
    model = keras.Model(x, layers.Conv2D(2, 3, padding="same", activation="sigmoid")(h))
    model.compile(keras.optimizers.Adam(0.01), loss)
    return accumulate(model, **arguments) if arguments else model


def images(count=8):
    r = problems.random()
    x = problems.normal(r, count, *IMAGE)
    likely = r.uniform(0.1, 0.9, (count, 1, 1, 2))
    return x, (r.random((count, 6, 6, 2)) < likely).astype("float32")


@pytest.mark.parametrize("loss", ["Dice", "Tversky"])
def test_a_loss_that_couples_examples_and_what_mends_it(loss):
    """The `axis=` in the warning makes the loss exact."""
    make = getattr(keras.losses, loss)
    (message,) = told(
        lambda: fit(segmentation(make(), microbatch_size=2), *images(), batch_size=8)
    )
    assert f"`{loss.lower()}`" in message
    assert "axis=(1, 2, 3)" in message
    assert "warn=False" in message

    def trained(loss, **arguments):
        model = segmentation(loss, **arguments)
        assert not told(lambda: fit(model, *images(), batch_size=8, epochs=5))
        return arrays(model.weights)

    def furthest(a, b):
        return max(np.abs(a[name] - b[name]).max() for name in b)

    mended = make(axis=(1, 2, 3))
    before = arrays(segmentation(mended).weights)
    exact, reference = trained(mended, microbatch_size=2), trained(mended)
    moved = furthest(reference, before)
    assert furthest(exact, reference) < 1e-4 * moved
    coupled = trained(make(), microbatch_size=2, warn=False), trained(make())
    assert furthest(*coupled) > 0.05 * moved


@pytest.mark.parametrize(
    "axis, mending",
    [
        (0, (1, 2, 3)),
        ((0,), (1, 2, 3)),
        ([0, 1, 2], (1, 2)),
        ((-4, -3, -2), (1, 2)),
        (-4, (1, 2, 3)),
    ],
)
def test_the_axis_that_mends_a_loss_with_another(axis, mending):
    """The axis may have any form that Keras accepts, and training continues."""
    model = segmentation(keras.losses.Dice(axis=axis), microbatch_size=2)
    (message,) = told(lambda: fit(model, *images(), batch_size=8))
    assert f"`axis={mending}`" in message
    assert int(model.optimizer.iterations) == 1
    model.compile("sgd", keras.losses.Dice(axis=mending))
    assert not told(lambda: fit(model, *images(), batch_size=8))


@pytest.mark.parametrize("axis", [1, (1, 2, 3), (-3, -2, -1)])
def test_axes_of_a_loss_that_does_not_couple(axis):
    model = segmentation(keras.losses.Dice(axis=axis), microbatch_size=2)
    assert not told(lambda: fit(model, *images(), batch_size=8))


def masked_mean(y, p):
    mask = ops.cast(y != 0, p.dtype)
    return ops.sum(ops.square(y - p) * mask) / ops.sum(mask)


def contrastive(y, p):
    """A loss with a value for each example, which depends on the whole batch."""
    similar = ops.matmul(p, ops.transpose(p))
    return keras.losses.sparse_categorical_crossentropy(
        ops.arange(ops.shape(p)[0]), similar, from_logits=True
    )


def mean(y, p):
    return ops.mean(ops.square(y - p))


def of_each(y, p):
    return ops.mean(ops.square(y - p), axis=-1)


def total(y, p):
    return ops.sum(ops.square(y - p))


def random(y, p):
    return ops.mean(ops.square(y - p) * keras.random.uniform(ops.shape(p)))


def picky(y, p):
    if p.shape[0] == 2:
        raise ValueError("Two are too few.")
    return mean(y, p)


def of_eight(y, p):
    return ops.mean(ops.reshape(ops.square(y - p), (8, -1)))


class Opaque(keras.losses.Loss):
    """A loss that does not show how it is reduced."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def __call__(self, y_true, y_pred, sample_weight=None):
        return self.function(ops.cast(y_true, y_pred.dtype), y_pred)


class Mine(keras.losses.Loss):
    def __init__(self, function, **arguments):
        super().__init__(**arguments)
        self.function = function

    def call(self, y_true, y_pred):
        return self.function(y_true, y_pred)


ROWS = Shape((8, 5), "float32"), Shape((8, 5), "float32")

LABELS = Shape((8,), "int32"), Shape((8, 5), "float32")

PIXELS = Shape((None, 64, 64, 3), "uint8"), Shape((None, 64, 64, 3), "float32")

STEPS = Shape((8, 50), "int32"), Shape((8, 50, 50), "float32")

JUDGED = {
    "dice": (keras.losses.Dice(), PIXELS, True),
    "dice of each example": (keras.losses.Dice(axis=(1, 2, 3)), PIXELS, False),
    "dice of each class": (keras.losses.Dice(axis=(0, 1, 2)), PIXELS, True),
    "tversky": (keras.losses.Tversky(), PIXELS, True),
    "circle": (keras.losses.Circle(), LABELS, True),
    "a mean": (Mine(mean), ROWS, False),
    "a mean, summed": (Mine(mean, reduction="sum"), ROWS, True),
    "a sum": (Mine(total), ROWS, True),
    "a sum, summed": (Mine(total, reduction="sum"), ROWS, False),
    "a value for each example": (Mine(of_each), ROWS, False),
    "contrastive": (Mine(contrastive), ROWS, True),
    "a mean by a mask": (Mine(masked_mean), ROWS, True),
    "of labels": (
        Mine(lambda y, p: ops.mean(keras.losses.sparse_categorical_crossentropy(y, p))),
        STEPS,
        False,
    ),
    "an opaque mean": (Opaque(mean), ROWS, False),
    "an opaque sum": (Opaque(total), ROWS, True),
    "random": (Mine(random), ROWS, None),
    "of one size only": (Mine(of_eight), ROWS, None),
    "of more than two": (Mine(picky), ROWS, None),
    "of what is not known": (Mine(mean), (None, ROWS[1]), None),
}


@pytest.mark.parametrize("name", JUDGED)
def test_whether_a_loss_couples_examples(name):
    loss, shapes, expected = JUDGED[name]
    before = np.random.get_state()[1].copy()
    assert couples(loss, *shapes, keras.StatelessScope) is expected
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@ways
@pytest.mark.parametrize(
    "loss, words",
    [
        ("mse", None),
        (mean, None),
        (of_each, None),
        (contrastive, ["`contrastive`, which couples", "value for each example"]),
        (picky, ["`picky`, which gives one number", "unless that is a mean"]),
    ],
)
def test_losses_of_ones_own(loss, words, way):
    model = compiled(way, loss=loss)
    messages = told(lambda: fit(model, *data(), batch_size=size(way)))
    assert len(messages) == (words is not None)
    for word in words or []:
        assert word in messages[0]


def test_it_is_said_once_a_model_until_the_loss_changes():
    model = segmentation(keras.losses.Dice(), microbatch_size=2)

    def train():
        fit(model, *images(), batch_size=8)
        model.train_on_batch(*images())

    assert len(told(train)) == 1
    assert not told(train)
    model.compile("sgd", keras.losses.Dice())
    assert not told(train)
    model.compile("sgd", keras.losses.Tversky())
    assert len(told(train)) == 1
    accumulate(model, microbatch_size=4)
    assert len(told(train)) == 1


def test_train_on_batch_says_it_too():
    model = segmentation(keras.losses.Dice(), microbatch_size=2)
    assert len(told(lambda: model.train_on_batch(*images()))) == 1


def test_a_filter_and_an_argument_silence_it():
    model = segmentation(keras.losses.Dice(), microbatch_size=2, warn=False)
    assert not told(lambda: fit(model, *images(), batch_size=8))
    model = segmentation(keras.losses.Dice(), microbatch_size=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=AccumulationWarning)
        fit(model, *images(), batch_size=8)
    plain = segmentation(keras.losses.Dice())
    model = GradientAccumulateModel(
        2, warn=False, inputs=plain.input, outputs=plain.output
    )
    model.compile("sgd", keras.losses.Dice())
    assert not told(lambda: fit(model, *images(), batch_size=2))
    assert keras.models.clone_model(model).accumulation.warn is False


def test_it_shows_the_line_of_the_user():
    model = segmentation(keras.losses.Dice(), microbatch_size=2)
    with pytest.warns(AccumulationWarning) as caught:
        model.fit(*images(), batch_size=8, verbose=0)
    (ours,) = [x for x in caught if x.category is AccumulationWarning]
    assert ours.filename == __file__


@pytest.mark.parametrize("value", [None, 1, "no"])
@pytest.mark.core
def test_warn_is_a_bool(value):
    with pytest.raises(TypeError, match=r"`warn`.*Received: warn="):
        accumulate(compiled(), accum_steps=2, warn=value)
