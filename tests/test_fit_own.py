"""Models with their own `fit`, and callbacks that train the model itself."""

import types

import keras
import numpy as np
import problems
import pytest
from helpers import (
    BACKEND,
    COUNT,
    FULL,
    MICROBATCH,
    SOURCES,
    UPDATES,
    Batches,
    arrays,
    assert_close,
    both,
    compiled,
    core_on,
    data,
    fit,
    of_arrays,
    ways,
)

from gradient_accumulator import accumulate

pytestmark = core_on("torch")


def with_fit(fit):
    """Builds a model whose class has this `fit`."""

    class Fits(problems.Written):
        pass

    Fits.fit = fit
    return problems.written(Fits)


def fit_of_keywords(self, x=None, y=None, **kwargs):
    return super(problems.Written, self).fit(x, y, **kwargs)


def fit_of_anything(self, *args, **kwargs):
    return super(problems.Written, self).fit(*args, **kwargs)


def fit_of_data_and_anything(self, data, *args, epochs=2, **kwargs):
    return super(problems.Written, self).fit(data, *args, epochs=epochs, **kwargs)


OWN_FITS = (fit_of_keywords, fit_of_anything, fit_of_data_and_anything)


@pytest.mark.parametrize("own", OWN_FITS)
@pytest.mark.parametrize("source", ["of_arrays", "of_infinite_generator"])
@ways
def test_own_fit_hands_on_what_it_is_given(way, source, own):
    model, _ = both(way, SOURCES[source], with_fit(own), epochs=2)
    assert int(model.optimizer.iterations) == 2 * UPDATES


@pytest.mark.parametrize("own", OWN_FITS)
def test_no_update_crosses_an_epochs_end_in_a_fit_of_its_own(own):
    taken = 0

    def forever():
        nonlocal taken
        while True:
            for batch in problems.cut(data(), MICROBATCH):
                taken += 1
                yield batch

    model = accumulate(compiled(build=with_fit(own)), accum_steps=3)
    fit(model, forever(), epochs=2, steps_per_epoch=5)
    assert int(model.optimizer.iterations) == 4
    # Keras on TensorFlow draws ahead.
    assert taken == 10 or BACKEND == "tensorflow"


@ways
@pytest.mark.core
def test_own_fit_that_evaluates_first(way):
    if BACKEND == "torch" and way == "accum_steps":
        pytest.skip("Keras's `evaluate` has one step an execution there")

    def evaluates_first(self, x, y, **kwargs):
        self.evaluate(x, y, batch_size=FULL, verbose=0)
        return super(problems.Written, self).fit(x, y, **kwargs)

    both(way, of_arrays, with_fit(evaluates_first), epochs=2)


@ways
def test_own_fit_that_trains_another_model_first(way):
    def trains_another(self, x, y, **kwargs):
        fit(compiled(), x[:12], y[:12], batch_size=6)
        return super(problems.Written, self).fit(x, y, **kwargs)

    both(way, of_arrays, with_fit(trains_another), epochs=2)


WORDS = ["", "a", "ab", "abc", "ba", "cab", "c", ""] * 3


class Reads(problems.Written):
    """Its `fit` gets strings and makes numbers of them, as KerasHub's tasks do."""

    def fit(self, x=None, y=None, **kwargs):
        if isinstance(x, str):
            x, y = read(x)
        elif isinstance(x, types.GeneratorType):
            x = ((read(words), y) for words, y in x)
        elif isinstance(x, Batches):
            x = Batches([(read(words), y) for words, y in x.batches])
        else:
            x = read(x)
        return super().fit(x, y, **kwargs)


def read(words):
    if isinstance(words, str):  # a file name
        return read(WORDS), data()[1]
    if isinstance(words, dict):
        words = words["words"]
    if hasattr(words, "numpy"):
        words = words.numpy()
    words = [w if isinstance(w, str) else w.decode() for w in words]
    letters = [[word.count(letter) for letter in "abc de"] for word in words]
    return np.array(letters, "float32")


def strings_in_tensorflow(words):
    return pytest.importorskip("tensorflow").constant(words)


@pytest.mark.parametrize(
    "raw",
    [
        list,
        tuple,
        np.array,
        lambda words: np.array(words, object),
        lambda words: [word.encode() for word in words],
        lambda words: [np.str_(word) for word in words],
        lambda words: {"words": words},
        lambda words: {"words": np.array(words)},
        strings_in_tensorflow,
        lambda words: "",
        lambda words: "a file",
    ],
)
@ways
def test_own_fit_of_strings(way, raw):
    def source(batch_size):
        y = None if isinstance(raw(WORDS), str) else data()[1]
        return {"x": raw(WORDS), "y": y, "batch_size": batch_size}

    both(way, source, problems.written(Reads), epochs=2)


@pytest.mark.parametrize("kind", ["generator", "py_dataset"])
@ways
def test_own_fit_of_batches_of_strings(way, kind):
    """Keras builds a model from the data that the model's own `fit` makes."""

    def source(batch_size):
        y = data()[1]
        batches = [
            (WORDS[i : i + batch_size], y[i : i + batch_size])
            for i in range(0, COUNT, batch_size)
        ]
        if kind == "py_dataset":
            return Batches(batches)
        return {"x": (batch for batch in batches), "steps_per_epoch": len(batches)}

    both(way, source, problems.seeded(Reads))


class TrainsToo(keras.callbacks.Callback):
    """A callback that trains the model on other data, once, in one of its methods."""

    def __init__(self, method, train):
        super().__init__()
        self.train = train
        setattr(self, method, self.once)

    def once(self, *args, **kwargs):
        train, self.train = self.train, lambda model: None
        train(self.model)


@pytest.mark.parametrize("call", ["fit", "train_on_batch"])
@pytest.mark.parametrize(
    "method",
    ["on_train_begin", "on_epoch_begin", "on_train_batch_end", "on_epoch_end"],
)
def test_a_callback_that_trains_the_same_model(call, method):
    x, y = data(14, seed=1)

    def train(model):
        if call == "fit":
            fit(model, x, y, batch_size=6)
        else:
            model.train_on_batch(x, y)

    both("microbatch_size", of_arrays, epochs=2, callbacks=[TrainsToo(method, train)])


@pytest.mark.core
def test_own_fit_is_given_callbacks_where_it_wants_them():
    """Callbacks may be given by position, as to Keras's `fit`, or by name."""
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(epoch)
    )
    x, y = data()
    for own in OWN_FITS:
        model = compiled("accum_steps", with_fit(own))
        model.fit(x, y, batch_size=MICROBATCH, callbacks=callback, verbose=0, epochs=1)
        model = compiled("accum_steps", with_fit(own))
        if own is not fit_of_keywords:
            model.fit(x, y, MICROBATCH, verbose=0, epochs=1, callbacks=[callback])
    model = compiled("accum_steps", with_fit(fit_of_anything))
    model.fit(x, y, MICROBATCH, 1, 0, [callback])
    assert seen == [0] * 6


@pytest.mark.core
def test_own_fit_that_hands_on_no_callbacks():
    """An update knows the end of an epoch without the callbacks of the user."""

    def takes_none(self, x, y, batch_size=None):
        return super(problems.Written, self).fit(x, y, batch_size)

    def drops_them(self, x, y, callbacks=None, **kwargs):
        return super(problems.Written, self).fit(x, y, **kwargs)

    x, y = data()
    for own in takes_none, drops_them:
        plain, model = compiled(None), compiled("accum_steps", with_fit(own))
        for each, batch_size in (plain, FULL), (model, MICROBATCH):
            keras.utils.set_random_seed(0)  # for the order
            each.fit(x, y, batch_size=batch_size)
        assert_close(arrays(model.weights), arrays(plain.weights))
