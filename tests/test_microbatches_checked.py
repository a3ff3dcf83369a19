"""Bad input raises in Keras's form, early, and leaves the model as it was."""

import re

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND, Batches, arrays, assert_close, core_on
from keras import layers, ops
from versions import DATA_THAT_FAILS, EXCEPTIONS, unless_plain_fails

from gradient_accumulator import GradientAccumulateModel, accumulate
from gradient_accumulator.received import described

pytestmark = core_on("torch")

BASE = problems.mlp()
WAYS = {
    "microbatch_size": ({"microbatch_size": 2}, 8),
    "accum_steps": ({"accum_steps": 4}, 2),
}
ways = pytest.mark.parametrize("way", WAYS)


def compiled(build=BASE, **arguments):
    model = build()
    model.compile(keras.optimizers.SGD(0.3, 0.9), "mse", **arguments)
    return model


def iterated(batches):
    yield from batches


def data(count=16):
    return tuple(a[:count] for a in problems.each_size(pair, (16,))[0])


def pair(r, n):
    return problems.normal(r, n, problems.FEATURES), problems.normal(r, n, 3)


def fit(model, *args, **arguments):
    return model.fit(*args, **{"shuffle": False, "verbose": 0, **arguments})


def state(model):
    return arrays(model.weights) | {
        f"optimizer {name}": value
        for name, value in arrays(model.optimizer.variables).items()
    }


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


# ------------------------------------------------------------------------- arguments


def make_with(**arguments):
    model = problems.mlp()()
    return GradientAccumulateModel(
        inputs=model.input, outputs=model.output, **arguments
    )


BAD_SIZES = [
    (0, ValueError),
    (-2, ValueError),
    (2.0, TypeError),
    (True, TypeError),
    (False, TypeError),
    (np.True_, TypeError),
    (ops.convert_to_tensor(True), TypeError),
    (np.float32(2), TypeError),
    (np.int64(0), ValueError),
    ("4", TypeError),
    ([4], TypeError),
]


@pytest.mark.parametrize("value, error", BAD_SIZES)
@pytest.mark.parametrize("name", ["accum_steps", "microbatch_size"])
@pytest.mark.parametrize("kind", ["accumulate", "GradientAccumulateModel"])
def test_a_size_that_is_no_positive_int(kind, name, value, error):
    received = described(value) if error is TypeError else str(value)
    message = f"`{name}`.*Received: {name}={re.escape(received)}"
    if kind == "accumulate":
        model = compiled()
        attributes = dict(vars(model))
        with pytest.raises(error, match=message):
            accumulate(model, **{name: value})
        assert vars(model) == attributes
    else:
        with pytest.raises(error, match=message):
            make_with(**{name: value})


@pytest.mark.parametrize("value", [True, 1.0])
def test_a_size_that_equals_one_and_is_no_int(value):
    with pytest.raises(TypeError, match=r"`accum_steps`.*Received: accum_steps="):
        make_with(accum_steps=value, microbatch_size=3)


@pytest.mark.parametrize("make", [
    lambda **arguments: accumulate(compiled(), **arguments),
    make_with,
])  # fmt: skip
def test_both_sizes(make):
    with pytest.raises(ValueError, match=r"one of.*Received: accum_steps=2, micro.*=3"):
        make(accum_steps=2, microbatch_size=3)


def test_no_size():
    with pytest.raises(ValueError, match=r"one of.*Received: accum_steps=None, micro"):
        accumulate(compiled())


@pytest.mark.parametrize("value, error", [
    ("float31", ValueError), ("int32", ValueError), (None, TypeError), (32, TypeError)
])  # fmt: skip
@pytest.mark.core
def test_accum_dtype(value, error):
    with pytest.raises(error, match=r"`accum_dtype`.*Received: accum_dtype="):
        accumulate(compiled(), accum_steps=2, accum_dtype=value)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="micro_batch_size"):
        accumulate(compiled(), micro_batch_size=2)
    with pytest.raises((TypeError, ValueError), match="micro_batch_size"):
        make_with(micro_batch_size=2)
    with pytest.raises((TypeError, ValueError), match="micro_batch_size"):
        GradientAccumulateModel(accum_steps=2, micro_batch_size=2)


def test_sizes_are_keywords():
    with pytest.raises(TypeError):
        accumulate(compiled(), 2)


@pytest.mark.parametrize(
    "value", [None, "model", 3, layers.Dense(3), keras.Model, lambda x: x]
)
def test_not_a_model(value):
    with pytest.raises(TypeError, match=r"`model`.*Keras 3.*Received: model="):
        accumulate(value, accum_steps=2)


def test_a_keras_2_model_gets_a_sentence_of_its_own():
    keras_2 = type("Sequential", (), {"__module__": "tf_keras.src.engine.sequential"})
    with pytest.raises(TypeError, match=r"Keras 2.*Received: model="):
        accumulate(keras_2(), accum_steps=2)


def test_a_module_of_tensorflow_is_not_taken_for_a_keras_2_model():
    module = type("Module", (), {"__module__": "tensorflow.python.module.module"})
    with pytest.raises(TypeError, match=r"`keras.Model`. Received: model="):
        accumulate(module(), accum_steps=2)


def test_an_optimizer_that_accumulates_too():
    model = problems.mlp()()
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=2), "mse")
    accumulate(model, microbatch_size=2)
    with pytest.raises(ValueError, match="Received: gradient_accumulation_steps=2"):
        fit(model, *data(), batch_size=8)


def test_not_compiled():
    model = accumulate(problems.mlp()(), microbatch_size=2)
    with pytest.raises(ValueError, match="compile"):
        fit(model, *data())


@ways
def test_a_changed_backend(way, monkeypatch):
    model = compiled()
    before = state(model)
    monkeypatch.setenv("KERAS_BACKEND", "torch" if BACKEND != "torch" else "jax")
    with pytest.raises(ValueError, match=r"KERAS_BACKEND.*Received: KERAS_BACKEND="):
        accumulate(model, **WAYS[way][0])
    monkeypatch.setenv("KERAS_BACKEND", BACKEND)
    accumulate(model, **WAYS[way][0])
    monkeypatch.setenv("KERAS_BACKEND", "torch" if BACKEND != "torch" else "jax")
    with pytest.raises(ValueError, match=r"KERAS_BACKEND.*Received: KERAS_BACKEND="):
        fit(model, *data())
    assert_equal(state(model), before)


# ------------------------------------------------------------------------------- data


def moved(model):
    """What forward passes move: there are two seeds and two counters."""
    return [ops.convert_to_numpy(v) for v in model.non_trainable_variables]


@pytest.mark.parametrize("bad", ["first", "last"])
@pytest.mark.parametrize("examples", [1, 6])
@pytest.mark.parametrize("steps", [False, True])
@ways
def test_leaves_with_different_batch_sizes(way, steps, examples, bad):
    """A generator yields what Keras does not check."""
    settings, size = WAYS[way]
    x, y = data(8)
    model = accumulate(compiled(failing, metrics=["mae"]), **settings)
    fit(model, x, y, batch_size=size)
    before, moved_before = state(model), moved(model)
    # With `accum_steps` it would be broadcast: of one example, or of its last axis.
    good, misfit = (x, y), (x, y[:examples])
    update = [good] * (settings.get("accum_steps", 1) - 1)
    batches = [misfit, *update] if bad == "first" else [*update, misfit]
    with pytest.raises(
        ValueError, match=rf"same number of examples.*Received: .*\({examples}, 3\)"
    ):
        asked = len(batches) if steps else None
        fit(model, (batch for batch in batches), steps_per_epoch=asked)
    assert_equal(state(model), before)
    for a, b in zip(moved(model), moved_before, strict=True):
        np.testing.assert_array_equal(a, b)
    if len(batches) > 1 and bad == "last":  # as they are when an epoch begins
        assert not any(ops.any(v != 0) for v in model.metrics_variables)


def tf_data(batches):
    import tensorflow as tf

    specs = tf.TensorSpec((None, problems.FEATURES)), tf.TensorSpec((None, 3))
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=specs)


def data_loader(batches):
    import torch

    tensors = [tuple(map(torch.as_tensor, batch)) for batch in batches]
    return torch.utils.data.DataLoader(tensors, batch_size=None)


def not_built():
    return keras.Sequential([layers.Dense(3)])


@pytest.mark.parametrize("build", [BASE, not_built])
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("source", [Batches, iterated, tf_data, data_loader])
@ways
def test_leaves_with_different_batch_sizes_before_anything_is_built(
    way, source, run_eagerly, build
):
    x, y = data(8)
    model = accumulate(
        compiled(build, run_eagerly=run_eagerly, metrics=["mae"]), **WAYS[way][0]
    )
    before = arrays(model.weights)
    for examples in (6, 1):
        with pytest.raises(ValueError, match=r"same number of examples.*Received: "):
            fit(model, source([(x, y[:examples])] * 4))
        if build is BASE:
            assert_equal(arrays(model.weights), before)
    fit(model, source([(x, y)] * 4), steps_per_epoch=4)  # and it trains on
    assert int(model.optimizer.iterations) == 4 // WAYS[way][0].get("accum_steps", 1)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bad", [0, 3])
def test_leaves_with_different_batch_sizes_in_tf_data(bad, known):
    """Whether TensorFlow knows the sizes before it runs, or not."""
    tf = pytest.importorskip("tensorflow")
    x, y = data(2)
    model = accumulate(compiled(), accum_steps=4)
    fit(model, *data(8), batch_size=2)
    before = state(model)
    sizes = [1 if k == bad or known else 2 for k in range(4)]
    specs = (
        tf.TensorSpec((2 if known else None, problems.FEATURES)),
        tf.TensorSpec((1 if known else None, 3)),
    )
    batches = tf.data.Dataset.from_generator(
        lambda: ((x, y[:n]) for n in sizes), output_signature=specs
    )
    with pytest.raises(ValueError, match=r"same number of examples.*Received: shape"):
        fit(model, batches)
    assert_equal(state(model), before)


def test_train_on_batch_with_different_batch_sizes():
    model = accumulate(momentum_model(), microbatch_size=2)
    before = state(model)
    x, y = data(8)
    with pytest.raises(ValueError, match=r"same number of examples.*Received: "):
        model.train_on_batch(x, y[:6])
    assert_equal(state(model), before)


def empty_tf_data():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(data()).batch(2).take(0)


def empty_data_loader():
    import torch

    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.as_tensor, data(0))), batch_size=2
    )


EMPTY = {
    "arrays": lambda: data(0),
    "dict_of_arrays": lambda: ({"x": data(0)[0]}, data(0)[1]),
    "backend_tensors": lambda: tuple(map(ops.convert_to_tensor, data(0))),
    "data_loader": empty_data_loader,
    "generator": lambda: (batch for batch in ()),
    "list": lambda: ([],),
    "py_dataset": lambda: Batches([]),
    "tf_data": empty_tf_data,
}


@ways
@pytest.mark.parametrize("source", EMPTY)
@pytest.mark.core
def test_no_data_at_all(source, way):
    model = accumulate(compiled(), **WAYS[way][0])
    before = state(model)
    source = EMPTY[source]()
    source = source if isinstance(source, tuple) else (source,)
    with pytest.raises(ValueError, match=r"given to `fit` is empty.*Received: "):
        fit(model, *source)
    assert_equal(state(model), before)


@ways
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.core
def test_an_update_without_any_example(way, run_eagerly):
    settings, size = WAYS[way]
    count = settings.get("accum_steps", 1)
    model = accumulate(compiled(run_eagerly=run_eagerly), **settings)
    fit(model, *data(8), batch_size=size)
    before = state(model)
    with pytest.raises(ValueError, match=r"at least one example.*Received: "):
        fit(model, iterated([data(0)] * count))
    assert_equal(state(model), before)


@pytest.mark.parametrize("empty", [0, 3])
def test_a_microbatch_without_any_example(empty):
    """No graph of TensorFlow draws it; the others go on without."""
    microbatches = problems.cut(data(6), 2)
    microbatches.insert(empty, data(0))
    model = accumulate(momentum_model(), accum_steps=4)
    if BACKEND == "tensorflow":
        before = state(model)
        with pytest.raises(ValueError, match=r"at least one example.*Received: "):
            fit(model, iterated(microbatches))
        assert_equal(state(model), before)
        return
    fit(model, iterated(microbatches), steps_per_epoch=4)
    expected = momentum_model()
    fit(expected, *data(6), batch_size=6)
    assert_close(state(model), state(expected))


@ways
@pytest.mark.core
def test_a_generator_that_ends_before_steps_per_epoch(way):
    settings, size = WAYS[way]
    model = accumulate(compiled(), **settings)
    batches = problems.cut(data(), size)
    asked = len(batches) + 3
    with (
        pytest.raises(ValueError, match=f"Received: steps_per_epoch={asked}"),
        # Keras warns of it, and goes on.
        pytest.warns(UserWarning, match="ran out of data"),
    ):
        fit(model, (batch for batch in batches), steps_per_epoch=asked)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # plain Keras too
def test_data_that_ends_in_an_update_of_steps_per_epoch():
    model = accumulate(compiled(failing, metrics=["mae"]), accum_steps=4)
    fit(model, *data(8), batch_size=2)
    before, moved_before = state(model), moved(model)
    batches = problems.cut(data(6), 2)
    with pytest.raises(ValueError, match=r"ended.*steps_per_epoch=9, 3 batches$"):
        fit(model, (batch for batch in batches), steps_per_epoch=9)
    assert_equal(state(model), before)
    for a, b in zip(moved(model), moved_before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(ops.any(v != 0) for v in model.metrics_variables)
    # In an epoch without `steps_per_epoch` it takes the micro-batches that are left.
    fit(model, (batch for batch in batches))
    assert int(model.optimizer.iterations) == 2


@ways
def test_arrays_that_end_before_steps_per_epoch(way):
    """Keras knows their length: it warns, and the update of what is there counts."""
    settings, size = WAYS[way]
    model = accumulate(compiled(), **settings)
    steps = 16 // size
    with pytest.warns(UserWarning, match="ran out of data"):
        fit(model, *data(), batch_size=size, steps_per_epoch=steps + 1)
    assert int(model.optimizer.iterations) == 2


# ------------------------------------------------------------- exceptions in a
# micro-batch


class BadExample(Exception):
    pass


def momentum_model():
    """A model that has trained, so that its optimizer has something to lose."""
    model = compiled()
    fit(model, *data(), batch_size=8)
    return model


@ways
@unless_plain_fails(DATA_THAT_FAILS)
@pytest.mark.core
def test_data_that_fails_in_the_middle_of_an_update(way):
    settings, size = WAYS[way]
    model = accumulate(momentum_model(), **settings)
    after_two_updates = momentum_model()
    fit(after_two_updates, *data(), batch_size=8)
    batches = problems.cut(data(), size)

    def generator():
        # Two updates are whole; of the third one, half of its micro-batches are drawn.
        yield from batches
        yield from batches[: {"microbatch_size": 0, "accum_steps": 2}[way]]
        raise BadExample

    with pytest.raises(Exception, match=r"BadExample|^$"):
        fit(model, generator(), steps_per_epoch=2 * len(batches))
    assert_close(state(model), state(after_two_updates))


class Fails(layers.Layer):
    """Fails on an example that holds a value above 100, in whichever way can be."""

    def call(self, x, training=False):
        if not training:
            return x
        if BACKEND == "tensorflow":
            import tensorflow as tf

            limit = tf.debugging.assert_less(x, 100.0)
            with tf.control_dependencies([limit] if limit is not None else []):
                return tf.identity(x)
        if BACKEND == "jax":
            import jax

            def check(x):
                if np.max(x) > 100:
                    raise BadExample
                return x

            jax.debug.callback(check, jax.lax.stop_gradient(x))
            return x
        if bool(ops.any(x > 100)):
            raise BadExample
        return x


@problems.seeded
def failing():
    x = layers.Input((problems.FEATURES,))
    h = layers.Dense(8, activation="tanh")(Fails()(x))
    counted = problems.CountsExamples()(layers.Dropout(0.5)(h))
    return keras.Model(x, layers.Dense(3)(counted))


FAILURES = {
    "tensorflow": "assertion failed|Condition x < y|assert_less",
    "jax": r"BadExample|callback|Fails\.call",
    "torch": r"^$|Fails\.call",
}


@ways
@pytest.mark.parametrize(
    "run_eagerly",
    [pytest.param(False, marks=unless_plain_fails(EXCEPTIONS)), True],
)
@pytest.mark.parametrize("bad", [8, 15], ids=["first_microbatch", "last_microbatch"])
@pytest.mark.core
def test_an_exception_in_a_microbatch_leaves_the_model_as_it_was(way, run_eagerly, bad):
    """The first update is whole; the second one has an example that fails."""
    settings, size = WAYS[way]
    model = accumulate(compiled(failing, run_eagerly=run_eagerly), **settings)
    fit(model, *data(8), batch_size=size)
    before = state(model)
    seeds = [ops.convert_to_numpy(v) for v in model.non_trainable_variables]
    x, y = data()
    x = x.copy()
    x[bad] = 1000
    with pytest.raises(Exception, match=FAILURES[BACKEND]):
        fit(model, x[8:], y[8:], batch_size=size)
    assert_equal(state(model), before)
    for a, b in zip(model.non_trainable_variables, seeds, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), b)
    # And it trains on.
    fit(model, *data(8), batch_size=size)
    assert int(model.optimizer.iterations) == 2


@unless_plain_fails(EXCEPTIONS)
@pytest.mark.core
def test_an_exception_in_train_on_batch_leaves_the_model_as_it_was():
    model = accumulate(compiled(failing), microbatch_size=2)
    x, y = data(8)
    model.train_on_batch(x, y)
    before = state(model)
    x = x.copy()
    x[5] = 1000
    with pytest.raises(Exception, match=FAILURES[BACKEND]):
        model.train_on_batch(x, y)
    assert_equal(state(model), before)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch changes variables in place")
@ways
def test_a_frozen_layer_is_not_copied(way, monkeypatch):
    """To put back after a failure, there are copies of what micro-batches move."""
    import torch

    settings, size = WAYS[way]
    x = layers.Input((problems.FEATURES,))
    frozen = layers.Dense(1000, trainable=False)
    h = layers.BatchNormalization()(layers.Dropout(0.5)(frozen(x)))
    model = keras.Model(x, layers.Dense(3)(h))
    model.compile("sgd", "mse")
    accumulate(model, **settings, warn=False)
    copied = []
    clone = torch.Tensor.clone

    def spied(tensor, **arguments):
        copied.append(tensor.data_ptr())
        return clone(tensor, **arguments)

    monkeypatch.setattr(torch.Tensor, "clone", spied)
    fit(model, *data(), batch_size=size)
    places = {v.path: v.value.data_ptr() for v in model.non_trainable_variables}
    assert {path for path, place in places.items() if place not in copied} == {
        variable.path for variable in frozen.variables
    }


class FailsAtBuild(layers.Layer):
    def call(self, x, training=False):
        if training:
            raise BadExample("no such operation")
        return x


@ways
@pytest.mark.core
def test_a_layer_that_fails_while_it_is_traced(way):
    settings, size = WAYS[way]
    x = layers.Input((problems.FEATURES,))
    model = keras.Model(x, layers.Dense(3)(FailsAtBuild()(x)))
    model.compile("sgd", "mse")
    accumulate(model, **settings)
    before = arrays(model.weights)
    with pytest.raises(BadExample):
        fit(model, *data(), batch_size=size)
    assert_equal(arrays(model.weights), before)


@ways
def test_a_model_is_usable_after_an_error(way):
    """A `fit` that failed leaves nothing behind that the next one would meet."""
    settings, size = WAYS[way]
    model = accumulate(compiled(), **settings)
    with pytest.raises(ValueError):
        fit(model, (batch for batch in ()))
    fit(model, *data(), batch_size=size, epochs=2)
    reference = compiled()
    fit(reference, *data(), batch_size=8, epochs=2)
    assert model.steps_per_execution == 1
    assert_close(state(model), state(reference))
