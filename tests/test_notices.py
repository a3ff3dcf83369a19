"""What users are told: warnings that come once, a line at `fit`, and an attribute."""

import inspect
import subprocess
import sys
import textwrap
import warnings

import keras
import numpy as np
import problems
import pytest
from helpers import (
    COUNT,
    FULL,
    MICROBATCH,
    SOURCES,
    WAYS,
    arrays,
    assert_close,
    compiled,
    core_on,
    data,
    fit,
    size,
    ways,
)
from keras import layers, ops

from gradient_accumulator import (
    AccumBatchNormalization,
    AccumulationWarning,
    GradientAccumulateModel,
    accumulate,
    replace_batchnorm_layers,
    restore_batchnorm_layers,
)
from gradient_accumulator.coupling import Shape, couples

pytestmark = core_on("torch")

IMAGE = (6, 6, 1)


def told(function):
    """The messages of our warnings while a function is called."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AccumulationWarning)
        function()
    return [
        str(each.message)
        for each in caught
        if issubclass(each.category, AccumulationWarning)
    ]


def segmentation(loss, **arguments):
    """Of images: two classes for each pixel."""
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


# ------------------------------------------------------------- losses that couple


@pytest.mark.parametrize("loss", ["Dice", "Tversky"])
def test_a_loss_that_couples_examples_and_what_mends_it(loss):
    """`axis=` as the warning gives it makes the loss exact."""
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
    """However Keras takes it, and training goes on."""
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
    """A value for each example, which is one of a batch."""
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
    """Keeps how it is reduced to itself."""

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


# ------------------------------------------------------------- batch normalization


def normalized(layer, shape=(4,)):
    x = layers.Input(shape)
    h = layers.Conv2D(3, 3)(x) if len(shape) == 3 else layers.Dense(3)(x)
    model = keras.Model(x, layers.Dense(1)(layers.Flatten()(layer(h))), name="mine")
    model.compile("sgd", "mse")
    return model


class Inferring(keras.Model):
    """Normalizes by moving statistics, as networks do that are fine-tuned."""

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
        # The convolution leaves one pixel.
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
        # One batch of the epoch is cut, the last one is not.
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


# ------------------------------------------------------------------ model.accumulation


def test_the_attribute_of_a_model_that_accumulates():
    model = accumulate(compiled(), microbatch_size=8)
    assert (model.accumulation.mode, model.accumulation.size) == ("microbatch_size", 8)
    assert model.accumulation.accum_dtype == "float32"
    assert model.accumulation.clipping is None
    assert repr(model.accumulation) == (
        "Accumulation(microbatch_size=8, accum_dtype='float32', clipping=None)"
    )
    accumulate(model, accum_steps=4, accum_dtype="bfloat16", use_agc=True)
    assert (model.accumulation.mode, model.accumulation.size) == ("accum_steps", 4)
    assert model.accumulation.clipping.clip_factor == 0.01
    assert repr(model.accumulation) == (
        "Accumulation(accum_steps=4, accum_dtype='bfloat16', "
        "clipping=AdaptiveClipping(clip_factor=0.01, eps=0.001, agc_exclude=()))"
    )
    accumulate(model, accum_steps=1)
    assert not hasattr(model, "accumulation")


class WithCall(GradientAccumulateModel):
    def call(self, x):
        return x


def test_the_attribute_of_a_gradient_accumulate_model():
    plain = compiled()
    for made in (
        GradientAccumulateModel(2, inputs=plain.input, outputs=plain.output),
        WithCall(accum_steps=2),
    ):
        assert made.accumulation.accum_steps == 2
        accumulate(made, accum_steps=1)
        assert made.accumulation is None
        accumulate(made, microbatch_size=3)
        assert made.accumulation.size == 3


@pytest.mark.core
def test_an_attribute_of_ones_own_stays():
    class WithLayer(keras.Model):
        def __init__(self):
            super().__init__()
            self.accumulation = layers.Dense(3)

        def call(self, x):
            return self.accumulation(x)

    model = WithLayer()
    model.compile("sgd", "mse")
    accumulate(model, accum_steps=2)
    fit(model, *data(), batch_size=4)
    assert int(model.optimizer.iterations) == 3
    accumulate(model, accum_steps=1)
    assert isinstance(model.accumulation, layers.Dense)


# ---------------------------------------------------------------------- files, copies


def updates(model, way):
    """How many updates one more epoch has."""
    before = int(model.optimizer.iterations)
    fit(model, *data(), batch_size=size(way))
    return int(model.optimizer.iterations) - before


def made(way, kind):
    if kind == "accumulate":
        return compiled(way)
    plain = compiled()
    model = GradientAccumulateModel(
        **WAYS[way][0], inputs=plain.input, outputs=plain.output
    )
    model.compile(keras.optimizers.SGD(0.3, 0.9), "mse")
    return model


def reload(model, tmp_path):
    model.save(tmp_path / "m.keras")
    return keras.saving.load_model(tmp_path / "m.keras")


def checkpoint(model, tmp_path):
    path = tmp_path / "checkpoint.keras"
    callback = keras.callbacks.ModelCheckpoint(path)
    fit(model, *data(), batch_size=FULL, callbacks=[callback])
    return keras.saving.load_model(path)


def clone(model, tmp_path):
    copy = keras.models.clone_model(model)
    copy.compile("sgd", "mse")
    return copy


@pytest.mark.parametrize("copy", [reload, checkpoint, clone])
@pytest.mark.parametrize("kind", ["accumulate", "GradientAccumulateModel"])
@ways
def test_what_a_copy_of_a_model_does(copy, kind, way, tmp_path):
    """Of an accumulated model it is plain; a `GradientAccumulateModel` stays one."""
    model = made(way, kind)
    updates(model, way)
    copied = copy(model, tmp_path)
    in_microbatches, plain = COUNT // FULL, COUNT // size(way)
    if kind == "accumulate":
        assert not hasattr(copied, "accumulation")
        assert updates(copied, way) == plain
        accumulate(copied, **WAYS[way][0])
    assert copied.accumulation == model.accumulation
    assert updates(copied, way) == in_microbatches


@ways
def test_a_reloaded_model_goes_on_once_it_accumulates_again(way, tmp_path):
    model = compiled(way)
    updates(model, way)
    loaded = accumulate(reload(model, tmp_path), **WAYS[way][0])
    for each in (model, loaded):
        updates(each, way)
    assert_close(arrays(loaded.weights), arrays(model.weights))


@ways
def test_weights_and_backups_leave_a_model_accumulating(way, tmp_path):
    model = compiled(way)
    path = tmp_path / "m.weights.h5"
    callbacks = [
        keras.callbacks.ModelCheckpoint(path, save_weights_only=True),
        keras.callbacks.BackupAndRestore(str(tmp_path / "backup")),
    ]
    fit(model, *data(), batch_size=size(way), callbacks=callbacks)
    other = compiled(way)
    updates(other, way)
    other.load_weights(path)
    assert_close(arrays(other.weights), arrays(model.weights))
    assert updates(other, way) == COUNT // FULL


LOADS = """
import sys

sys.modules["gradient_accumulator"] = None  # not installed
import keras
import numpy as np

checkpoint, restored, x, out = sys.argv[1:]
try:
    keras.saving.load_model(checkpoint)
    sys.exit("it loads")
except Exception as error:
    if "AccumBatchNormalization" not in str(error):
        raise
model = keras.saving.load_model(restored)
np.save(out, model.predict(np.load(x), verbose=0))
"""


@pytest.mark.slow
def test_checkpoints_of_a_model_with_our_normalization(tmp_path):
    """They need the package; what README says to do loads in plain Keras."""
    model = replace_batchnorm_layers(normalized(layers.BatchNormalization()))
    model.compile("sgd", "mse")
    accumulate(model, microbatch_size=2)
    x = problems.normal(problems.random(), 8, 4)
    names = "checkpoint.keras", "restored.keras", "x.npy", "out.npy"
    checkpoint, restored, given, out = [str(tmp_path / name) for name in names]
    weights = str(tmp_path / "w.weights.h5")
    callbacks = [
        keras.callbacks.ModelCheckpoint(checkpoint),
        keras.callbacks.ModelCheckpoint(weights, save_weights_only=True),
    ]
    fit(model, x, np.zeros((8, 1), "float32"), batch_size=4, callbacks=callbacks)
    loaded = keras.saving.load_model(checkpoint)
    restore_batchnorm_layers(loaded).save(restored)
    # Weights go to a model with the same layers.
    plain = normalized(layers.BatchNormalization())
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match="batch_normalization"),
    ):
        warnings.simplefilter("ignore")
        plain.load_weights(weights)
    copy = replace_batchnorm_layers(plain)
    copy.load_weights(weights)
    assert_close(arrays(copy.weights), arrays(model.weights))

    np.save(given, x)
    run = subprocess.run(
        [sys.executable, "-c", LOADS, checkpoint, restored, given, out],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(np.load(out), expected, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------- the examples


@pytest.mark.parametrize("thing", [accumulate, GradientAccumulateModel])
def test_the_example_of_the_documentation_runs_without_a_warning(thing):
    _, _, example = inspect.getdoc(thing).partition("Example:")
    code = textwrap.dedent(example.split("```")[1].removeprefix("python"))
    r = problems.random()
    names = {
        "keras": keras,
        "accumulate": accumulate,
        "GradientAccumulateModel": GradientAccumulateModel,
        "x": problems.normal(r, 128, 32, 32, 3),
        "y": r.integers(0, 10, 128),
    }
    exec(code, names)
    assert int(names["model"].optimizer.iterations) == (2 if thing is accumulate else 4)
