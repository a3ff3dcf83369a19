"""`AccumBatchNormalization`: the end of an update, and the state after a failed one."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import Batches, array, core_on
from helpers.normalization import (
    MICROBATCH,
    assert_same,
    cut,
    data,
    fit,
    in_microbatches,
    model_of,
    statistics,
)
from keras import layers
from problems import WAYS_OF_FIT

from gradient_accumulator import (
    AccumBatchNormalization,
    FlushGradients,
    GradientAccumulateOptimizer,
    accumulate,
)

pytestmark = core_on("torch")


def test_with_the_optimizer_wrapper_it_counts_calls():
    (batch, _) = data((6,))
    batch = tuple(a[:10] for a in batch)
    reference = fit(model_of(layers.BatchNormalization(), (6,)), [batch])
    model = model_of(AccumBatchNormalization(accum_steps=2), (6,))
    model.compile(GradientAccumulateOptimizer(keras.optimizers.SGD(0.01), 2), "mse")
    model.fit(Batches(cut([batch])), epochs=2, shuffle=False, verbose=0)
    assert_same(model, reference)


@pytest.mark.core
def test_a_flush_ends_an_update():
    batches = data((6,))
    reference = fit(model_of(layers.BatchNormalization(), (6,)), batches)
    model = model_of(AccumBatchNormalization(accum_steps=3), (6,))
    model.compile(GradientAccumulateOptimizer(keras.optimizers.SGD(0.01), 3), "mse")
    model.fit(
        Batches(cut(batches)),
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[FlushGradients()],
    )
    assert_same(model, reference)


def waiting(microbatches):
    """A model in the middle of an update: it has summed so many of 4 micro-batches."""
    layer = AccumBatchNormalization(momentum=0.5, accum_steps=4)
    model = model_of(layer, (3,))
    model.compile(GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 4), "mse")
    go_on(model, 0, 2 * microbatches)
    assert (model.optimizer.pending, layer.pending) == (microbatches, microbatches)
    return model, layer


def go_on(model, start, stop):
    x, y = data((3,))[0]
    model.fit(x[start:stop], y[start:stop], batch_size=2, shuffle=False, verbose=0)


@pytest.mark.parametrize("kind", ["flush", "reset"])
@pytest.mark.core
def test_flush_and_reset_of_the_optimizer_wrapper(kind):
    model, layer = waiting(2)
    (x, _), _ = data((3,))
    getattr(model.optimizer, kind)()
    assert (model.optimizer.pending, layer.pending) == (0, 0)
    moved = x[:4].mean(axis=0) / 2 if kind == "flush" else np.zeros(3)
    np.testing.assert_allclose(statistics(model)[0], moved, rtol=1e-5)
    go_on(model, 4, 12)
    assert (model.optimizer.pending, layer.pending) == (0, 0)
    moved = (moved + x[4:12].mean(axis=0)) / 2
    np.testing.assert_allclose(statistics(model)[0], moved, rtol=1e-5)


@pytest.mark.core
def test_loaded_it_ends_its_update_where_the_optimizer_wrapper_does(tmp_path):
    model, _ = waiting(2)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    layer = loaded.layers[1]
    assert (loaded.optimizer.pending, layer.pending) == (2, 2)
    go_on(loaded, 4, 8)
    assert (loaded.optimizer.pending, layer.pending) == (0, 0)
    (x, _), _ = data((3,))  # the micro-batches after it was loaded count
    np.testing.assert_allclose(
        statistics(loaded)[0], x[4:8].mean(axis=0) / 2, rtol=1e-5
    )


def test_in_a_loop_of_ones_own():
    ((x, _), _) = data((6,))
    layer = AccumBatchNormalization(accum_steps=4, momentum=0.0)
    for i in range(0, len(x), MICROBATCH):
        layer(x[i : i + MICROBATCH], training=True)
    assert not array(layer.moving_mean).any()  # after three of four micro-batches
    layer(x[:0], training=False)
    layer.finish_update()
    np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), x.var(0), rtol=1e-5)
    layer.finish_update()  # nothing is pooled
    np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), rtol=1e-6)
    layer(x[:5] + 1, training=True)
    layer.reset()
    layer.finish_update()
    np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), rtol=1e-6)


@pytest.mark.core
def test_calls_before_training_do_not_count():
    model = model_of(AccumBatchNormalization(accum_steps=4), (6,))
    reference = fit(model_of(layers.BatchNormalization(), (6,)), data((6,)))
    model(np.full((4, 6), 100.0, "float32"), training=True)
    assert_same(in_microbatches(model, data((6,)), "microbatch_size"), reference)


def test_what_is_not_finite_does_not_stay():
    layer = AccumBatchNormalization(accum_steps=1)
    x = np.ones((4, 6), "float32")
    x[0, 0] = np.inf
    layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), [0, *[0.01] * 5], rtol=1e-5)


@pytest.mark.core
def test_a_failed_update_leaves_the_statistics():
    model = model_of(AccumBatchNormalization(), (6,))
    accumulate(model, accum_steps=3)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    microbatches = cut(data((6,)))
    model.fit(Batches(microbatches[:3]), verbose=0)
    before = [array(v) for v in model.variables]

    class Failing(Batches):
        def __getitem__(self, index):
            if index == 2:
                raise RuntimeError("a micro-batch that cannot be read")
            return super().__getitem__(index)

    with pytest.raises(Exception, match="cannot be read"):
        model.fit(Failing(microbatches[:3]), verbose=0)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value, err_msg=variable.path)


@pytest.mark.parametrize("way", WAYS_OF_FIT)
@pytest.mark.parametrize("cls", [AccumBatchNormalization, layers.BatchNormalization])
@pytest.mark.core
def test_a_skipped_update_leaves_the_statistics(cls, way):
    """The loss of one example is not finite. Another update of the data succeeds."""
    model = model_of(cls(), (6,))
    first, second = data((6,))
    second[1][-1] = np.inf
    size = (
        {"microbatch_size": MICROBATCH}
        if way == "microbatch_size"
        else {"accum_steps": 3}
    )
    accumulate(model, **size, warn=cls is AccumBatchNormalization)
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.01, momentum=0.9), initial_scale=64.0
    )
    model.compile(optimizer, "mse")
    given = (lambda b: [b]) if way == "microbatch_size" else (lambda b: cut([b]))
    model.fit(Batches(given(first)), shuffle=False, verbose=0)
    before = {v.path: array(v) for v in [*model.variables, *optimizer.variables]}
    assert statistics(model)[0].all()
    model.fit(Batches(given(second)), shuffle=False, verbose=0)
    for variable in [*model.variables, *optimizer.inner_optimizer.variables]:
        if "loss" not in variable.path:
            np.testing.assert_array_equal(
                array(variable), before[variable.path], err_msg=variable.path
            )
    assert float(array(optimizer.dynamic_scale)) == 32.0
    model.fit(Batches(given(first)), shuffle=False, verbose=0)
    assert (statistics(model)[0] != before[statistics_path(model)]).all()


def statistics_path(model):
    return next(v.path for v in model.variables if "moving_mean" in v.path)


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="processes of torch.distributed"
)
@pytest.mark.slow
def test_synchronized_over_two_processes(tmp_path):
    """On TensorFlow, `test_devices.py` tests this for two replicas."""
    script = Path(__file__).parent / "distributed" / "torch_normalization.py"
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
