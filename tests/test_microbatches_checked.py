"""Bad data raises in Keras's form, early, and leaves the model as it was."""

import keras
import numpy as np
import problems
import pytest
from helpers import (
    BACKEND,
    Batches,
    arrays,
    assert_close,
    core_on,
    data_loader,
    iterated,
)
from helpers.failures import (
    BASE,
    WAYS,
    assert_equal,
    compiled,
    data,
    failing,
    fit,
    momentum_model,
    state,
    ways,
)
from keras import layers, ops

from gradient_accumulator import accumulate

pytestmark = core_on("torch")


def moved(model):
    """The values that forward passes move: two seeds and two counters."""
    return [ops.convert_to_numpy(v) for v in model.non_trainable_variables]


@pytest.mark.parametrize("bad", ["first", "last"])
@pytest.mark.parametrize("examples", [1, 6])
@pytest.mark.parametrize("steps", [False, True])
@ways
def test_leaves_with_different_batch_sizes(way, steps, examples, bad):
    """Keras does not check the arrays of a generator."""
    settings, size = WAYS[way]
    x, y = data(8)
    model = accumulate(compiled(failing, metrics=["mae"]), **settings)
    fit(model, x, y, batch_size=size)
    before, moved_before = state(model), moved(model)
    # With `accum_steps` it could be broadcast, along the examples or the last axis.
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
    if len(batches) > 1 and bad == "last":  # their values at the start of an epoch
        assert not any(ops.any(v != 0) for v in model.metrics_variables)


def tf_data(batches):
    import tensorflow as tf

    specs = tf.TensorSpec((None, problems.FEATURES)), tf.TensorSpec((None, 3))
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=specs)


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
    fit(model, source([(x, y)] * 4), steps_per_epoch=4)  # it can still be trained
    assert int(model.optimizer.iterations) == 4 // WAYS[way][0].get("accum_steps", 1)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bad", [0, 3])
def test_leaves_with_different_batch_sizes_in_tf_data(bad, known):
    """TensorFlow may know the sizes before the graph runs, or not."""
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
    """A graph of TensorFlow raises when it draws it. Other backends leave it out."""
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
        # Keras itself warns about it, and continues.
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
    # Without `steps_per_epoch` the update takes the remaining micro-batches.
    fit(model, (batch for batch in batches))
    assert int(model.optimizer.iterations) == 2


@ways
def test_arrays_that_end_before_steps_per_epoch(way):
    """Keras knows their length. It warns, and the last, shorter update counts."""
    settings, size = WAYS[way]
    model = accumulate(compiled(), **settings)
    steps = 16 // size
    with pytest.warns(UserWarning, match="ran out of data"):
        fit(model, *data(), batch_size=size, steps_per_epoch=steps + 1)
    assert int(model.optimizer.iterations) == 2
