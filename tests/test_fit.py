"""`fit` in pieces, with all that Keras's `fit` takes."""

import copy
import csv
import gc
import weakref

import keras
import numpy as np
import problems
import pytest
import quickly
from helpers import Batches, arrays, assert_close
from keras import layers, ops
from versions import VERSION, unless_plain_fails

from gradient_accumulator import accumulate

BACKEND = keras.backend.backend()
BASE = problems.mlp()
FULL, PIECE, COUNT = 8, 4, 24  # examples of a full batch, of a piece, in all
UPDATES, PIECES = COUNT // FULL, COUNT // PIECE
WAYS = {
    # what `accumulate` gets, and the batch size that `fit` then gets
    "microbatch_size": ({"microbatch_size": PIECE}, FULL),
    "accum_steps": ({"accum_steps": FULL // PIECE}, PIECE),
}
ways = pytest.mark.parametrize("way", WAYS)


def data(count=COUNT, seed=0):
    r = problems.random(seed)
    x = problems.normal(r, count, problems.FEATURES)
    return x, np.tanh(x[:, : problems.CLASSES]).astype("float32")


def compiled(way=None, build=BASE, **arguments):
    """A compiled model; plain, or one that trains in pieces in this way."""
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
    """Trains by plain Keras and in pieces from `source(batch size)`, and compares."""
    results = []
    for each in (None, way):
        model = compiled(each, build, **(settings() if settings else {}))
        given = ((plain_source if each is None else None) or source)(size(each))
        given = given if isinstance(given, dict) else {"x": given}
        if each is None and "callbacks" in arguments:
            # Not all callbacks forget what they have seen when training begins again.
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


# ------------------------------------------------------------------------ data sources


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


@ways
@pytest.mark.parametrize("source", SOURCES)
def test_data_source(source, way):
    model, _ = both(way, SOURCES[source], epochs=2)
    assert int(model.optimizer.iterations) == 2 * UPDATES


@ways
def test_py_dataset_with_workers(way):
    """Plain Keras loses the order there on JAX, so only the updates are counted."""
    model = compiled(way)
    dataset = Batches(problems.cut(data(), size(way)), workers=2)
    history = fit(model, dataset, epochs=2).history
    assert int(model.optimizer.iterations) == 2 * UPDATES
    assert history["loss"][1] < history["loss"][0]


@ways
def test_tf_data_of_unknown_length_and_rank(way):
    import tensorflow as tf

    def source(batch_size):
        batches = problems.cut(data(), batch_size)
        spec = tf.TensorSpec((None, None), tf.float32)
        return tf.data.Dataset.from_generator(
            lambda: iter(batches), output_signature=(spec, spec)
        )

    # Keras warns that it learnt the length of an epoch by reaching its end. There plain
    # Keras on TensorFlow counts one update too many, so it gets data of known length.
    with pytest.warns(UserWarning, match="ran out of data"):
        model, _ = both(way, source, plain_source=of_py_dataset, epochs=2)
    assert int(model.optimizer.iterations) == 2 * UPDATES


@ways
def test_generator_without_steps_is_one_epoch(way):
    def source(batch_size):
        return (batch for batch in problems.cut(data(), batch_size))

    with pytest.warns(UserWarning, match="ran out of data"):
        model, _ = both(way, source, plain_source=of_py_dataset)
    assert int(model.optimizer.iterations) == UPDATES


WEIGHTS = np.linspace(0, 1, 21)


def trained_on_arrays(way, count, **arguments):
    """Trains on arrays, which Keras may shuffle by its seed."""
    x, y = data(count)
    loss = keras.losses.MeanSquaredError(arguments.pop("reduction", "mean"))
    eagerly = arguments.pop("run_eagerly", False)
    model = compiled(
        way,
        optimizer=keras.optimizers.SGD(0.02, 0.9),
        loss=loss,
        weighted_metrics=["mae"],
        run_eagerly=eagerly,
    )
    keras.utils.set_random_seed(7)
    history = fit(model, x, y, batch_size=size(way), epochs=3, **arguments)
    return {
        **arrays([*model.weights, *model.optimizer.variables]),
        **{name: np.array(values) for name, values in history.history.items()},
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"sample_weight": WEIGHTS},
        {"steps_per_epoch": 2},  # the next epoch takes what is left
        {"validation_split": 0.2},
        {"run_eagerly": True},
        {"reduction": "sum"},
        {
            "reduction": "mean_with_sample_weight",
            "sample_weight": WEIGHTS,
        },
    ],
    ids=lambda arguments: ", ".join(arguments) or "x, y",
)
@pytest.mark.parametrize("shuffle", [False, True, "batch"])
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # plain Keras too
def test_arrays_are_in_the_order_of_plain_training(shuffle, arguments):
    """Also where pieces are drawn from them, and no full batch is."""
    trained, plain = [
        trained_on_arrays(way, 21, shuffle=shuffle, **arguments)
        for way in ("microbatch_size", None)
    ]
    assert_close(trained, plain)


@pytest.mark.small_arrays
@pytest.mark.parametrize("shuffle", [False, True])
def test_small_arrays_are_in_the_order_of_plain_training(shuffle):
    trained, plain = [
        trained_on_arrays(way, 21, shuffle=shuffle) for way in ("microbatch_size", None)
    ]
    assert_close(trained, plain)


@pytest.mark.parametrize("shuffle", [True, "batch"])
def test_shuffled_rows_are_those_of_plain_training(shuffle):
    """Also within a batch, and so is what is drawn afterwards from the same seeds."""
    results = []
    for way in (None, "microbatch_size"):
        seen = []

        class Watch(layers.Layer):
            def call(self, x, training=False, seen=seen):
                if training and has_values(x):
                    seen.append(ops.convert_to_numpy(x))
                return x

        def build(watch=Watch):
            keras.utils.set_random_seed(7)
            return keras.Sequential([watch(), layers.Dense(problems.CLASSES)])

        model = compiled(way, build, run_eagerly=True)
        x, y = data(21)
        for _ in range(2):
            fit(model, x, y, batch_size=FULL, shuffle=shuffle, epochs=2)
        drawn = keras.random.normal((2,), seed=keras.random.SeedGenerator())
        results.append((np.concatenate(seen), np.random.random(2), np.array(drawn)))
    for trained, plain in zip(*results):
        np.testing.assert_array_equal(trained, plain)


def test_arrays_that_a_callback_changes():
    """In float64, which is cast: in each epoch on JAX and PyTorch."""
    results = []
    for way in (None, "microbatch_size"):
        x, y = data(21)
        x = x.astype("float64")

        def turn(epoch, logs, x=x):
            x *= -0.5

        model = compiled(way)
        callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=turn)]
        fit(model, x, y, batch_size=FULL, epochs=3, callbacks=callbacks)
        results.append(arrays(model.weights))
    assert_close(*reversed(results))


def test_arrays_are_not_held_after_training():
    held = []
    for way in (None, "microbatch_size"):
        model = compiled(way)
        x, y = data(21)
        x = x.view(type("Array", (np.ndarray,), {}))  # which can be referred to weakly
        gc.collect()
        gc.disable()
        try:
            fit(model, x, y, batch_size=FULL)
            reference = weakref.ref(x)
            del x
            held.append(reference() is not None)
        finally:
            gc.enable()
    assert held[1] <= held[0]  # Keras's loop on PyTorch holds them in a cycle


def test_shuffled_arrays_in_pieces():
    """The order is that of all examples, however many `fit` gets at a time."""
    trained, plain = [
        trained_on_arrays(way, COUNT, shuffle=True) for way in ("accum_steps", None)
    ]
    assert_close(trained, plain)


@pytest.mark.parametrize("kind", ["float64", "pandas", "tensor", "sparse"])
def test_kinds_of_arrays(kind):
    x, y = data(21)
    given = {
        "float64": lambda: x.astype("float64"),
        "pandas": lambda: pytest.importorskip("pandas").DataFrame(x),
        "tensor": lambda: ops.convert_to_tensor(x),
        "sparse": lambda: pytest.importorskip("scipy.sparse").coo_matrix(x),
    }[kind]()

    def source(batch_size):
        return {"x": given, "y": y, "batch_size": batch_size}

    if kind == "sparse" and BACKEND == "tensorflow":
        with pytest.raises(ValueError, match=r"does not cut sparse .* Received:"):
            both("microbatch_size", source)
    else:
        both("microbatch_size", source)


@pytest.mark.parametrize(
    "eagerly", [False] if BACKEND == "tensorflow" else [False, True]
)
def test_no_full_batch_is_made_of_arrays(monkeypatch, eagerly):
    taken = []

    def note(rows):
        if rows.ndim > 1:  # of the data, not of the examples' numbers
            taken.append(len(rows))
        return rows

    if BACKEND == "tensorflow":
        import tensorflow as tf

        gather = tf.gather

        def watched(array, numbers, **arguments):
            rows = gather(array, numbers, **arguments)
            noted = tf.numpy_function(note, [rows], rows.dtype)
            return tf.ensure_shape(noted, rows.shape)

        monkeypatch.setattr(tf, "gather", watched)
    else:
        from keras.src.trainers.data_adapters.array_slicing import NumpySliceable

        monkeypatch.setattr(
            NumpySliceable,
            "__getitem__",
            lambda self, numbers: note(self.array[numbers]),
        )
    x, y = data(21)
    fit(compiled("microbatch_size", run_eagerly=eagerly), x, y, batch_size=FULL)
    # Of one example the shapes may be known from.
    assert sum(n for n in taken if n > 1) == 2 * 20 and max(taken) == PIECE


@ways
def test_nested_inputs_and_outputs(way):
    batch = problems.nested_batches()[0]

    def source(batch_size):
        return Batches(problems.cut(batch, batch_size))

    def settings():
        return {"loss": {"y": "mse", "double": "mae"}, "metrics": {"y": ["mae"]}}

    both(way, source, problems.of_named_inputs, settings, epochs=2)


@ways
def test_inputs_in_a_list(way):
    def source(batch_size):
        r = problems.random()
        x = [problems.normal(r, COUNT, problems.FEATURES) for _ in range(2)]
        return {"x": x, "y": problems.normal(r, COUNT, 1), "batch_size": batch_size}

    both(way, source, problems.shared_layer, epochs=2)


@ways
def test_no_targets(way):
    def source(batch_size):
        return {"x": data()[0], "batch_size": batch_size}

    build = problems.written(problems.MeanOverExamples)
    both(way, source, build, lambda: {"loss": None}, epochs=2)


@ways
def test_sample_weight(way):
    def source(batch_size):
        weights = problems.uneven(problems.random(3), COUNT)
        return {**of_arrays(batch_size), "sample_weight": weights}

    both(way, source, settings=lambda: {"weighted_metrics": ["mae"]}, epochs=2)


@ways
def test_class_weight(way):
    def source(batch_size):
        r = problems.random()
        return {
            "x": problems.normal(r, COUNT, problems.FEATURES),
            "y": r.integers(0, problems.CLASSES, COUNT),
            "batch_size": batch_size,
            "class_weight": problems.CLASS_WEIGHT,
        }

    def settings():
        return {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}

    both(way, source, problems.classifier, settings, epochs=2)


@ways
def test_validation_data(way):
    _, history = both(
        way,
        of_arrays,
        settings=lambda: {"metrics": ["mae"]},
        epochs=2,
        validation_data=data(10, seed=4),
        validation_batch_size=3,
    )
    assert history.keys() == {"loss", "mae", "val_loss", "val_mae"}


@ways
def test_validation_split_and_frequency(way):
    x, y = data(32)

    def source(batch_size):
        return {"x": x, "y": y, "batch_size": batch_size}

    _, history = both(way, source, epochs=4, validation_split=0.25, validation_freq=2)
    assert len(history["val_loss"]) == 2


@ways
def test_initial_epoch(way):
    model, history = both(way, of_arrays, epochs=3, initial_epoch=1)
    assert len(history["loss"]) == 2
    assert int(model.optimizer.iterations) == 2 * UPDATES


@ways
def test_fit_again_goes_on(way):
    results = []
    for each in (None, way):
        model = compiled(each)
        for _ in range(2):
            fit(model, **of_arrays(size(each)))
        results.append(arrays(model.weights) | arrays(model.optimizer.variables))
    assert_close(*reversed(results))


# ------------------------------------------------------------------ ways of executing


@ways
def test_run_eagerly(way):
    both(way, of_arrays, settings=lambda: {"run_eagerly": True}, epochs=2)


@ways
@pytest.mark.parametrize(
    "jit_compile",
    [pytest.param(True, marks=unless_plain_fails("jit_compile")), False],
)
def test_jit_compile(way, jit_compile):
    both(way, of_arrays, settings=lambda: {"jit_compile": jit_compile}, epochs=2)


@ways
@pytest.mark.skipif(
    BACKEND == "torch", reason="Keras has it on TensorFlow and JAX only"
)
@pytest.mark.parametrize("steps", [2, 5])
def test_steps_per_execution(way, steps):
    def settings():
        return {"steps_per_execution": steps}

    model, _ = both(way, of_arrays, settings=settings, epochs=2)
    assert int(model.optimizer.iterations) == 2 * UPDATES
    assert model.steps_per_execution == steps


def has_values(x):
    """Whether a layer is called with data, not traced."""
    try:
        keras.ops.convert_to_numpy(x)
    except Exception:  # each backend has its own
        return False
    return True


def sizes_seen(way, count=10, traced=False, **settings):
    """The batch sizes that the model is called with while it trains, or is traced."""
    seen = []

    class Watch(layers.Layer):
        def call(self, x, training=False):
            if training and x.shape[0] is not None and (traced or has_values(x)):
                seen.append(x.shape[0])
            return x

    @problems.seeded
    def build():
        x = layers.Input((problems.FEATURES,))
        return keras.Model(x, layers.Dense(problems.CLASSES)(Watch()(x)))

    model = compiled(way, build, **settings)
    x, y = data(count)
    fit(model, x, y, batch_size=size(way))
    return seen


def test_the_model_sees_pieces_one_after_the_other():
    eager = {"run_eagerly": True}
    assert sizes_seen(None, **eager) == [8, 2]
    assert sizes_seen("microbatch_size", **eager) == [4, 4, 2]
    assert sizes_seen("accum_steps", **eager) == [4, 4, 2]


def test_the_model_never_sees_the_full_batch():
    for way in WAYS:
        assert FULL not in sizes_seen(way, traced=True)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # plain Keras too
@pytest.mark.parametrize("steps", [None, COUNT])
def test_pieces_are_drawn_when_it_is_their_turn(steps):
    """Nothing has to know all of this model's pieces before the first one."""
    drawn, ahead = [], []

    def note():
        ahead.append(len(drawn) - len(ahead) - 1)

    class Watch(layers.Layer):
        def call(self, x, training=False):
            if training and BACKEND == "tensorflow":
                import tensorflow as tf

                tf.py_function(note, [], [])
            elif training and has_values(x):
                note()
            return x

    def batches():
        for batch in problems.cut(data(), 1):
            drawn.append(batch)
            yield batch

    def of_batches():
        if BACKEND != "tensorflow":
            return batches()
        import tensorflow as tf

        x, y = data()
        specs = tuple(tf.TensorSpec((None, *array.shape[1:])) for array in (x, y))
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False
        return tf.data.Dataset.from_generator(
            batches, output_signature=specs
        ).with_options(options)

    @problems.seeded
    def build():
        x = layers.Input((problems.FEATURES,))
        return keras.Model(x, layers.Dense(problems.CLASSES)(Watch()(x)))

    model = compiled(
        None, build, jit_compile=False, run_eagerly=BACKEND != "tensorflow"
    )
    fit(accumulate(model, accum_steps=COUNT), of_batches(), steps_per_epoch=steps)
    assert len(ahead) == COUNT
    assert max(ahead) <= 3  # Keras and its backends draw a little ahead


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a TensorFlow graph")
@ways
def test_what_pieces_are_worth_takes_no_forward_pass(way):
    """Cross-entropy asserts that the predictions' shape is right, which needs them."""
    import tensorflow as tf

    passes = []

    class Watch(layers.Layer):
        def call(self, x):
            with tf.control_dependencies(
                [tf.py_function(lambda: passes.append(1), [], [])]
            ):
                return tf.identity(x)

    @problems.seeded
    def build():
        x = layers.Input((problems.FEATURES,))
        return keras.Model(x, layers.Dense(problems.CLASSES)(Watch()(x)))

    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=-1, reduction="mean_with_sample_weight"
    )
    model = compiled(way, build, loss=loss, jit_compile=False)
    x, _ = data()
    y = np.arange(COUNT) % (problems.CLASSES + 1) - 1
    with quickly.optimized_graphs():
        fit(model, x, y, batch_size=size(way))
    assert len(passes) == PIECES


def test_a_piece_larger_than_the_batch_is_one_piece():
    results = []
    for microbatch_size in (None, 100):
        model = compiled()
        if microbatch_size:
            accumulate(model, microbatch_size=microbatch_size)
        fit(model, **of_arrays(FULL), epochs=2)
        results.append(arrays(model.weights))
    assert_close(*results)


def test_more_accum_steps_than_pieces_is_one_update_an_epoch():
    x, y = data()
    reference = compiled()
    fit(reference, x, y, batch_size=COUNT, epochs=2)
    model = accumulate(compiled(), accum_steps=100)
    fit(model, x, y, batch_size=PIECE, epochs=2)
    assert int(model.optimizer.iterations) == 2
    assert_close(arrays(model.weights), arrays(reference.weights))


# ------------------------------------------------------------------- a `fit` of its own


def with_fit(fit):
    """Builds the model with this `fit` in its class."""

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
            for batch in problems.cut(data(), PIECE):
                taken += 1
                yield batch

    model = accumulate(compiled(build=with_fit(own)), accum_steps=3)
    fit(model, forever(), epochs=2, steps_per_epoch=5)
    assert int(model.optimizer.iterations) == 4
    # Keras on TensorFlow draws ahead.
    assert taken == 10 or BACKEND == "tensorflow"


@ways
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


class TrainsToo(keras.callbacks.Callback):
    """Trains the model on other data, once, where `fit` calls a method."""

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


def test_own_fit_is_given_callbacks_where_it_wants_them():
    """By their place, as Keras's has it, or by name."""
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(epoch)
    )
    x, y = data()
    for own in OWN_FITS:
        model = compiled("accum_steps", with_fit(own))
        model.fit(x, y, batch_size=PIECE, callbacks=callback, verbose=0, epochs=1)
        model = compiled("accum_steps", with_fit(own))
        if own is not fit_of_keywords:
            model.fit(x, y, PIECE, verbose=0, epochs=1, callbacks=[callback])
    model = compiled("accum_steps", with_fit(fit_of_anything))
    model.fit(x, y, PIECE, 1, 0, [callback])
    assert seen == [0] * 6


def test_own_fit_without_callbacks_raises():
    def takes_none(self, x, y, batch_size=None):
        return super(problems.Written, self).fit(x, y, batch_size)

    def drops_them(self, x, y, callbacks=None, **kwargs):
        return super(problems.Written, self).fit(x, y, **kwargs)

    x, y = data()
    for own, what in ((takes_none, "does not take"), (drops_them, "must hand on")):
        model = compiled("accum_steps", with_fit(own))
        before = arrays(model.weights)
        with pytest.raises(ValueError, match=f"{what}.*callbacks.*Received: "):
            model.fit(x, y, batch_size=PIECE)
        assert_close(arrays(model.weights), before)


# ---------------------------------------------------------------- updates and epochs


def test_an_epochs_last_update_takes_the_pieces_that_are_left():
    """Five pieces, three an update: the second one of each epoch has two."""
    x, y = data(5 * PIECE)
    reference = compiled()
    fit(reference, x, y, batch_size=3 * PIECE, epochs=2)
    model = accumulate(compiled(), accum_steps=3)
    fit(model, x, y, batch_size=PIECE, epochs=2)
    assert int(model.optimizer.iterations) == 4
    assert_close(arrays(model.weights), arrays(reference.weights))


def joined(batches, numbers):
    return tuple(np.concatenate([batches[i][k] for i in numbers]) for k in (0, 1))


def forever(batches):
    while True:
        yield from batches


EXECUTIONS = [1] if BACKEND == "torch" else [1, 3]  # Keras has no others there


@pytest.mark.parametrize("executions", EXECUTIONS)
@pytest.mark.parametrize("source", ["arrays", "py_dataset", "infinite_generator"])
def test_steps_per_epoch_that_are_no_whole_updates(source, executions):
    """Epochs of seven pieces, two an update: the fourth has one, and none is lost."""
    x, y = data(14 * PIECE)
    batches = problems.cut((x, y), PIECE)
    several = {} if executions == 1 else {"steps_per_execution": executions}
    model = accumulate(compiled(**several), accum_steps=2)
    given = {
        "arrays": lambda: {"x": x, "y": y, "batch_size": PIECE},
        "py_dataset": lambda: {"x": Batches(batches)},
        "infinite_generator": lambda: {"x": forever(batches)},
    }[source]()
    fit(model, **given, steps_per_epoch=7, epochs=2)
    reference = compiled()
    updates = [[k, k + 1] for k in (0, 2, 4)] + [[6]]
    updates += [[7 + k for k in update] for update in updates]
    fit(reference, Batches([joined(batches, update) for update in updates]))
    assert int(model.optimizer.iterations) == 8
    assert_close(arrays(model.weights), arrays(reference.weights))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step an execution there")
def test_full_batches_that_are_no_whole_executions():
    x, y = data(8 * FULL)
    model = compiled("microbatch_size", steps_per_execution=3)
    fit(model, x, y, batch_size=FULL, steps_per_epoch=4, epochs=2)
    reference = compiled()
    fit(reference, x, y, batch_size=FULL)
    assert int(model.optimizer.iterations) == 8
    assert_close(arrays(model.weights), arrays(reference.weights))


def test_data_of_known_length_that_ends_in_an_update_of_steps_per_epoch():
    """As in an epoch without `steps_per_epoch`: it takes the pieces that are left."""
    x, y = data(7 * PIECE)
    model = accumulate(compiled(), accum_steps=3)
    with pytest.warns(UserWarning, match="asks for 8 batches, and 7 were left"):
        fit(model, x, y, batch_size=PIECE, steps_per_epoch=8)
    reference = compiled()
    fit(reference, x, y, batch_size=3 * PIECE)
    assert int(model.optimizer.iterations) == 3
    assert_close(arrays(model.weights), arrays(reference.weights))


class Record(keras.callbacks.Callback):
    """The steps that batch-level callbacks are called with."""

    def __init__(self):
        super().__init__()
        self.begins, self.ends, self.iterations, self.logs = [], [], [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.begins.append(batch)

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(batch)
        self.iterations.append(int(self.model.optimizer.iterations))
        self.logs.append({name: float(value) for name, value in logs.items()})


@ways
def test_batch_callbacks_run_once_an_update(way):
    record = Record()
    model = compiled(way, metrics=["mae"])
    fit(model, **of_arrays(size(way)), callbacks=[record])
    stride = {"microbatch_size": 1, "accum_steps": FULL // PIECE}[way]
    assert record.begins == [stride * i for i in range(UPDATES)]
    # Before Keras 3.11 the first of several steps is named, from then on the last.
    last = stride - 1 if VERSION >= (3, 11) else 0
    assert record.ends == [stride * i + last for i in range(UPDATES)]
    assert record.params["steps"] == stride * UPDATES
    # JAX has its state in the variables only after the epoch, with plain Keras too.
    if BACKEND != "jax":
        assert record.iterations == [1, 2, 3]


@ways
def test_logs_of_every_update_equal_plain_keras(way):
    records = []
    for each in (None, way):
        records.append(Record())
        model = compiled(each, metrics=["mae"])
        fit(model, **of_arrays(size(each)), callbacks=[records[-1]])
    reference, record = records
    for got, expected in zip(record.logs, reference.logs, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


def test_progress_bar_counts_pieces(capsys):
    model = compiled("accum_steps")
    fit(model, **of_arrays(PIECE), verbose=2)
    fit(model, **of_arrays(PIECE), verbose=1)
    shown = capsys.readouterr().out
    assert f"{PIECES}/{PIECES}" in shown
    assert f"/{UPDATES} " not in shown


@ways
def test_schedules_count_updates(way):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [UPDATES - 1], [0.3, 0.0]
    )

    def settings():
        return {"optimizer": keras.optimizers.SGD(schedule)}

    model, _ = both(way, of_arrays, settings=settings)
    stopped = arrays(model.weights)
    fit(model, **of_arrays(size(way)))
    assert_close(arrays(model.weights), stopped)


@ways
def test_stop_training_in_an_epoch(way):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    model = compiled(way)
    fit(model, **of_arrays(size(way)), epochs=4, callbacks=[Stop()])
    assert int(model.optimizer.iterations) == 1


# -------------------------------------------------------------------------- callbacks


@ways
def test_learning_rate_scheduler(way):
    both(
        way,
        of_arrays,
        epochs=3,
        callbacks=[keras.callbacks.LearningRateScheduler(lambda e, lr: 0.3 / (e + 1))],
    )


@ways
def test_reduce_lr_on_plateau(way):
    model, history = both(
        way,
        of_arrays,
        epochs=3,
        callbacks=[
            keras.callbacks.ReduceLROnPlateau(
                monitor="loss", factor=0.5, patience=1, min_delta=100.0
            )
        ],
    )
    assert history["learning_rate"] == pytest.approx([0.3, 0.3, 0.15])
    assert float(model.optimizer.learning_rate) == pytest.approx(0.075)


@ways
def test_early_stopping_restores_the_best_weights(way):
    _, history = both(
        way,
        of_arrays,
        epochs=6,
        callbacks=[
            keras.callbacks.EarlyStopping(
                monitor="loss", patience=2, min_delta=100.0, restore_best_weights=True
            )
        ],
    )
    assert len(history["loss"]) == 3


@ways
def test_model_checkpoint(way, tmp_path):
    for frequency in ("epoch", 2):
        path = tmp_path / f"{way}-{frequency}.keras"
        checkpoint = keras.callbacks.ModelCheckpoint(path, save_freq=frequency)
        model = compiled(way)
        fit(model, **of_arrays(size(way)), epochs=2, callbacks=[checkpoint])
        loaded = keras.saving.load_model(path)
        assert type(loaded) is type(model)
        if frequency == "epoch":
            assert_close(arrays(loaded.weights), arrays(model.weights))
            assert int(loaded.optimizer.iterations) == 2 * UPDATES


class Interrupt(keras.callbacks.Callback):
    """Ends the process's training in the middle of the second epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 1 and batch >= 1:
            raise InterruptedError

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch


@ways
def test_backup_and_restore(way, tmp_path):
    reference = compiled()
    fit(reference, **of_arrays(FULL), epochs=3)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    model = compiled(way)
    with pytest.raises(InterruptedError):
        fit(
            model,
            **of_arrays(size(way)),
            epochs=3,
            callbacks=[backup(), Interrupt()],
        )
    resumed = compiled(way)
    fit(resumed, **of_arrays(size(way)), epochs=3, callbacks=[backup()])
    assert int(resumed.optimizer.iterations) == 3 * UPDATES
    assert_close(arrays(resumed.weights), arrays(reference.weights))
    assert_close(
        arrays(resumed.optimizer.variables), arrays(reference.optimizer.variables)
    )


@ways
def test_tensorboard(way, tmp_path):
    # Keras's callback writes by TensorFlow on every backend.
    callback = keras.callbacks.TensorBoard(tmp_path, update_freq=2, write_graph=False)
    fit(compiled(way), **of_arrays(size(way)), epochs=2, callbacks=[callback])
    (events,) = (tmp_path / "train").iterdir()
    assert events.stat().st_size > 100


@ways
def test_csv_logger(way, tmp_path):
    path = tmp_path / "log.csv"
    model = compiled(way, metrics=["mae"])
    history = fit(
        model,
        **of_arrays(size(way)),
        epochs=2,
        callbacks=[keras.callbacks.CSVLogger(path)],
    )
    with open(path) as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["loss"]) for row in rows]
    assert logged == pytest.approx(history.history["loss"])
    assert [*rows[0]][:3] == ["epoch", "loss", "mae"]


@ways
def test_a_callback_list_of_keras(way):
    model = compiled(way)
    record = Record()
    callbacks = keras.callbacks.CallbackList([record], add_history=True, model=model)
    fit(model, **of_arrays(size(way)), callbacks=callbacks)
    assert len(record.ends) == UPDATES


# ----------------------------------------------------- the methods beside `fit`


@ways
def test_evaluate_and_predict_are_untouched(way):
    x, y = data(10)
    reference = compiled(metrics=["mae"])
    model = compiled(way, metrics=["mae"])
    for method in ("evaluate", "predict", "test_on_batch", "predict_on_batch"):
        assert method not in vars(model)
    for _ in range(2):
        assert model.evaluate(x, y, verbose=0) == pytest.approx(
            reference.evaluate(x, y, verbose=0), rel=1e-5
        )
        np.testing.assert_allclose(
            model.predict(x, verbose=0), reference.predict(x, verbose=0), atol=1e-6
        )
        fit(model, x, y, batch_size=10 if way == "microbatch_size" else 5)
        fit(reference, x, y, batch_size=10)


def test_train_on_batch_by_microbatch_size():
    reference = compiled(metrics=["mae"])
    model = compiled("microbatch_size", metrics=["mae"])
    x, y = data(10)
    weights = problems.uneven(problems.random(2), 10)
    for _ in range(3):
        expected = reference.train_on_batch(x, y, weights, return_dict=True)
        got = model.train_on_batch(x, y, weights, return_dict=True)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5)
    assert int(model.optimizer.iterations) == 3
    assert_close(arrays(model.weights), arrays(reference.weights))


def test_train_on_batch_by_accum_steps_raises():
    model = compiled("accum_steps")
    before = arrays(model.weights)
    with pytest.raises(ValueError, match=r"microbatch_size.*Received: accum_steps=2"):
        model.train_on_batch(*data(4))
    assert_close(arrays(model.weights), before)


# ---------------------------------------------------------------------------- dropout


class Masks(layers.Layer):
    """Adds up, for each column, the inputs that dropout let through."""

    def build(self, shape):
        self.total = self.add_weight(
            shape=(shape[-1],), initializer="zeros", trainable=False
        )

    def call(self, x, training=False):
        if training:
            self.total.assign_add(ops.sum(x, axis=0))
        return x


@problems.seeded
def with_dropout():
    x = layers.Input((256,))
    h = Masks(name="masks")(layers.Dropout(0.5, seed=3)(x))
    return keras.Model(x, layers.Dense(1)(h))


@ways
def test_pieces_draw_different_dropout_masks(way):
    model = compiled(way, with_dropout)
    pieces = 4
    if way == "accum_steps":
        accumulate(model, accum_steps=pieces)
        batch_size = 1
    else:
        accumulate(model, microbatch_size=1)
        batch_size = pieces
    # One example of ones a piece: a column's total counts the pieces that kept it.
    fit(model, np.ones((pieces, 256)), np.ones((pieces, 1)), batch_size=batch_size)
    total = ops.convert_to_numpy(model.get_layer("masks").total)
    kept = set(np.round(total / 2).astype(int))
    assert kept == set(range(pieces + 1))


@ways
def test_two_runs_from_one_seed_are_equal(way):
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(11)
        model = compiled(way, with_dropout)
        x = problems.normal(problems.random(), COUNT, 256)
        fit(model, x, x[:, :1], batch_size=size(way), epochs=2, shuffle=True)
        runs.append(arrays(model.weights))
    for name, value in runs[0].items():
        np.testing.assert_array_equal(runs[1][name], value)


@ways
def test_seeds_go_on_between_updates(way):
    """Two updates draw different masks too, as those of plain Keras do."""
    model = compiled(way, with_dropout)
    fit(model, np.ones((FULL, 256)), np.ones((FULL, 1)), batch_size=size(way))
    first = ops.convert_to_numpy(model.get_layer("masks").total)
    fit(model, np.ones((FULL, 256)), np.ones((FULL, 1)), batch_size=size(way))
    second = ops.convert_to_numpy(model.get_layer("masks").total) - first
    assert not np.array_equal(first, second)
