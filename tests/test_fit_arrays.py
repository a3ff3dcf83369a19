"""Arrays in `fit`: micro-batches of large arrays are drawn without the batch."""

import gc
import weakref

import keras
import numpy as np
import problems
import pytest
from helpers import (
    BACKEND,
    COUNT,
    FULL,
    MICROBATCH,
    arrays,
    assert_close,
    both,
    compiled,
    data,
    fit,
    has_values,
    of_arrays,
    of_data_loader,
    of_py_dataset,
    size,
)
from keras import layers, ops

from gradient_accumulator import accumulate

WEIGHTS = np.linspace(0, 1, 21)


def trained_on_arrays(way, count, **arguments):
    """Trains on arrays, which Keras may shuffle with its seed."""
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
        {"steps_per_epoch": 2},  # the next epoch takes the remaining batches
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
    """They are, even if micro-batches are drawn from them without the batch."""
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
@pytest.mark.core
def test_shuffled_rows_are_those_of_plain_training(shuffle):
    """They are within a batch too, and later draws from the seeds are equal as well."""
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


@pytest.mark.core
def test_arrays_that_a_callback_changes():
    """The arrays have float64, which is cast; on JAX and PyTorch in each epoch."""
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
        x = x.view(type("Array", (np.ndarray,), {}))  # it allows weak references
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


@pytest.mark.core
def test_shuffled_arrays_in_microbatches():
    """The order of all examples is independent of the size of the batches."""
    trained, plain = [
        trained_on_arrays(way, COUNT, shuffle=True) for way in ("accum_steps", None)
    ]
    assert_close(trained, plain)


@pytest.mark.parametrize("kind", ["float64", "pandas", "tensor", "sparse"])
@pytest.mark.core
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
@pytest.mark.core
def test_no_batch_is_made_of_arrays(monkeypatch, eagerly):
    taken = []

    def note(rows):
        if rows.ndim > 1:  # this is data, and not the numbers of examples
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
    # The model may be built from one example, or on JAX from a micro-batch. Older Keras
    # then draws the next micro-batch too.
    built_from = sum(n for n in taken if n > 1) - 2 * 20
    assert built_from in (
        (2 * MICROBATCH, 4 * MICROBATCH) if BACKEND == "jax" else (0,)
    )
    assert max(taken) == MICROBATCH


@pytest.mark.skipif(BACKEND != "torch", reason="the others know all shapes")
@pytest.mark.parametrize("source", [of_arrays, of_py_dataset, of_data_loader])
@pytest.mark.core
def test_no_more_than_a_micro_batch_goes_through_the_model(source):
    """This holds even if Keras runs the model to find its shapes, as on PyTorch."""
    sizes = []

    class OfValues(layers.Layer):
        def call(self, x):
            if has_values(x):
                sizes.append(x.shape[0])
            return x + float(ops.convert_to_numpy(x).mean())

        def compute_output_shape(self, shape):
            return shape

    def build():
        return keras.Sequential([OfValues(), layers.Dense(problems.CLASSES)])

    given = source(FULL)
    given = given if isinstance(given, dict) else {"x": given}
    fit(
        accumulate(compiled(None, build), microbatch_size=MICROBATCH, warn=False),
        **given,
    )
    assert max(sizes) == MICROBATCH
