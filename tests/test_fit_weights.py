"""Sample weights that are one number: the weight of each example of a batch."""

import keras
import numpy as np
import problems
import pytest
from helpers import (
    BACKEND,
    BASE,
    Batches,
    arrays,
    assert_close,
    compiled,
    data,
    data_loader,
    fit,
    iterated,
)
from keras import layers

from gradient_accumulator import accumulate

NUMBERS = (0.5, 2.0, 0.0, 1.5)
SIZES = (5, 3, 4, 4)  # of micro-batches; two make an update
STEPS = 3


def tf_data(batches):
    import tensorflow as tf

    x, y, *weights = batches[0]
    specs = tuple(
        tf.TensorSpec((None, *np.shape(a)[1:]) if np.shape(a) else (), tf.float32)
        for a in (x, y, *weights)
    )
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=specs)


def of_sequences():
    """A model whose loss has a value for each step, and so needs a weight for each."""
    x = layers.Input((STEPS, problems.FEATURES))
    return keras.Model(x, layers.Dense(problems.CLASSES)(x))


def of_masked_sequences():
    x = layers.Input((STEPS, problems.FEATURES))
    return keras.Model(x, layers.Dense(problems.CLASSES)(layers.Masking()(x)))


def numbers_of_batches(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred))


def micro_batches(build):
    x, y = data(sum(SIZES))
    if build is not BASE:
        shift = np.arange(STEPS, dtype="float32")[None, :, None]
        x, y = x[:, None] * (shift + x[:, None, :1] > 0), y[:, None] + shift
    stops = np.cumsum(SIZES)[:-1]
    return list(zip(np.split(x, stops), np.split(y, stops), strict=True))


def of_values(y, number):
    """Weights with an entry for each value of a loss."""
    return np.full(y.shape[:-1], number, "float32")


def trained(build, reduction, batches, way=None, **arguments):
    keras.utils.set_random_seed(0)
    model = build()
    model.compile(
        keras.optimizers.SGD(0.3, 0.9),
        keras.losses.MeanSquaredError(reduction=reduction),
        **arguments,
    )
    if way is not None:
        accumulate(model, **way)
    steps = None if isinstance(batches, Batches) else len(SIZES)
    history = fit(model, batches, steps_per_epoch=steps).history
    return arrays(model.weights) | {k: np.array(v) for k, v in history.items()}


SOURCES = (
    [tf_data] if BACKEND == "tensorflow" else [iterated, Batches, tf_data, data_loader]
)
BUILDS = [BASE, of_sequences]
if BACKEND != "torch":  # there plain Keras multiplies the number in place
    BUILDS.append(of_masked_sequences)


def cases():
    """The cases. On TensorFlow, Keras requires axes of all data but `tf.data`."""
    first, *others = SOURCES
    for build in BUILDS:
        yield first, np.float32, build, False
    for source in others:
        yield source, np.float32, BASE, False
    yield first, np.float32, BASE, True
    yield first, float, BASE, False


@pytest.mark.parametrize(
    "reduction",
    [
        "sum_over_batch_size",
        pytest.param("mean_with_sample_weight", marks=pytest.mark.core),
        "sum",
    ],
)
@pytest.mark.parametrize("source, kind, build, run_eagerly", [*cases()])
def test_each_micro_batch_has_a_number(source, kind, build, reduction, run_eagerly):
    given = list(zip(micro_batches(build), NUMBERS, strict=True))
    joined = [
        tuple(
            np.concatenate(each)
            for each in zip(
                *((x, y, of_values(y, w)) for (x, y), w in given[i : i + 2])
            )
        )
        for i in (0, 2)
    ]
    arguments = {"weighted_metrics": ["mae"], "run_eagerly": run_eagerly}
    ours = trained(
        build,
        reduction,
        source([(x, y, kind(w)) for (x, y), w in given]),
        {"accum_steps": 2},
        **arguments,
    )
    assert_close(ours, trained(build, reduction, Batches(joined), **arguments))


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_batch_that_is_cut_has_a_number(build, reduction):
    batches = [
        (*batch, np.float32(w)) for batch, w in zip(micro_batches(build), NUMBERS)
    ]
    ours = trained(build, reduction, SOURCES[0](batches), {"microbatch_size": 2})
    assert_close(ours, trained(build, reduction, SOURCES[0](batches)))


@pytest.mark.core
def test_a_number_that_is_divided_by_is_not_cut():
    """With this reduction Keras sums the loss, and does not divide by the weights."""
    model = compiled(loss=keras.losses.MeanSquaredError("mean_with_sample_weight"))
    accumulate(model, microbatch_size=2)
    before = arrays(model.weights)
    batches = [(*batch, np.float32(2)) for batch in micro_batches(BASE)]
    with pytest.raises(ValueError, match=r"weight for each example.*Received: "):
        fit(model, SOURCES[0](batches))
    assert_close(arrays(model.weights), before)


@pytest.mark.parametrize("way", [{"accum_steps": 2}, {"microbatch_size": 2}])
def test_a_metric_of_a_batch_weighs_by_examples_and_the_number(way):
    """All examples of the update have one weight here."""
    x, y = data(8)
    number = np.float32(0.5)
    cut = [(x[:5], y[:5], number), (x[5:], y[5:], number)]
    whole = [(x, y, number)]
    results = []
    for each, batches in ((way, cut if "accum_steps" in way else whole), (None, whole)):
        model = compiled(
            optimizer=keras.optimizers.SGD(0.0), weighted_metrics=[numbers_of_batches]
        )
        if each is not None:
            accumulate(model, **each)
        history = fit(model, SOURCES[0](batches), steps_per_epoch=len(batches)).history
        results.append({name: np.array(values) for name, values in history.items()})
    assert_close(*results)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("way", [{"accum_steps": 2}, {"microbatch_size": 2}])
@pytest.mark.core
def test_inputs_and_targets_are_no_numbers(way, place):
    model = compiled()
    accumulate(model, **way)
    before = arrays(model.weights)
    x, y = data(8)
    batch = [x, y]
    batch[place] = np.float32(1)
    with pytest.raises(ValueError, match=r"same number of examples.*Received: "):
        fit(model, SOURCES[0]([tuple(batch)] * 2))
    assert_close(arrays(model.weights), before)
