"""The micro-batches of an update, the end of an epoch, and the counts."""

import keras
import numpy as np
import problems
import pytest
from helpers import (
    BACKEND,
    FULL,
    MICROBATCH,
    MICROBATCHES,
    UPDATES,
    Batches,
    Record,
    arrays,
    assert_close,
    both,
    compiled,
    core_on,
    data,
    fit,
    of_arrays,
    size,
    ways,
)

from gradient_accumulator import accumulate


@pytest.mark.core
def test_an_epochs_last_update_takes_the_microbatches_that_are_left():
    """There are five micro-batches, three an update: the second update has two."""
    x, y = data(5 * MICROBATCH)
    reference = compiled()
    fit(reference, x, y, batch_size=3 * MICROBATCH, epochs=2)
    model = accumulate(compiled(), accum_steps=3)
    fit(model, x, y, batch_size=MICROBATCH, epochs=2)
    assert int(model.optimizer.iterations) == 4
    assert_close(arrays(model.weights), arrays(reference.weights))


def joined(batches, numbers):
    return tuple(np.concatenate([batches[i][k] for i in numbers]) for k in (0, 1))


def forever(batches):
    while True:
        yield from batches


EXECUTIONS = [1] if BACKEND == "torch" else [1, 3]  # on PyTorch Keras allows only 1


@pytest.mark.parametrize("executions", EXECUTIONS)
@pytest.mark.parametrize("source", ["arrays", "py_dataset", "infinite_generator"])
@core_on("jax", "torch")
def test_steps_per_epoch_that_are_no_whole_updates(source, executions):
    """Epochs of seven micro-batches, two an update: the fourth has one, and none is
    lost.
    """
    x, y = data(14 * MICROBATCH)
    batches = problems.cut((x, y), MICROBATCH)
    several = {} if executions == 1 else {"steps_per_execution": executions}
    model = accumulate(compiled(**several), accum_steps=2)
    given = {
        "arrays": lambda: {"x": x, "y": y, "batch_size": MICROBATCH},
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
def test_batches_that_are_no_whole_executions():
    x, y = data(8 * FULL)
    model = compiled("microbatch_size", steps_per_execution=3)
    fit(model, x, y, batch_size=FULL, steps_per_epoch=4, epochs=2)
    reference = compiled()
    fit(reference, x, y, batch_size=FULL)
    assert int(model.optimizer.iterations) == 8
    assert_close(arrays(model.weights), arrays(reference.weights))


@pytest.mark.core
def test_data_of_known_length_that_ends_in_an_update_of_steps_per_epoch():
    """As in an epoch without `steps_per_epoch`: it takes the micro-batches that are
    left.
    """
    x, y = data(7 * MICROBATCH)
    model = accumulate(compiled(), accum_steps=3)
    with pytest.warns(UserWarning, match="asks for 8 batches, and the data has 7"):
        fit(model, x, y, batch_size=MICROBATCH, steps_per_epoch=8)
    reference = compiled()
    fit(reference, x, y, batch_size=3 * MICROBATCH)
    assert int(model.optimizer.iterations) == 3
    assert_close(arrays(model.weights), arrays(reference.weights))


@ways
@pytest.mark.core
def test_batch_callbacks_run_once_an_update(way):
    record = Record()
    model = compiled(way, metrics=["mae"])
    fit(model, **of_arrays(size(way)), callbacks=[record])
    stride = {"microbatch_size": 1, "accum_steps": FULL // MICROBATCH}[way]
    assert record.begins == [stride * i for i in range(UPDATES)]
    assert record.ends == [stride * i + stride - 1 for i in range(UPDATES)]
    assert record.params["steps"] == stride * UPDATES
    # On JAX variables have their values only after the epoch, in plain Keras too.
    if BACKEND != "jax":
        assert record.iterations == [1, 2, 3]


@ways
@pytest.mark.core
def test_logs_of_every_update_equal_plain_keras(way):
    records = []
    for each in (None, way):
        records.append(Record())
        model = compiled(each, metrics=["mae"])
        fit(model, **of_arrays(size(each)), callbacks=[records[-1]])
    reference, record = records
    for got, expected in zip(record.logs, reference.logs, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.core
def test_progress_bar_counts_microbatches(capsys):
    model = compiled("accum_steps")
    fit(model, **of_arrays(MICROBATCH), verbose=2)
    fit(model, **of_arrays(MICROBATCH), verbose=1)
    shown = capsys.readouterr().out
    assert f"{MICROBATCHES}/{MICROBATCHES}" in shown
    assert f"/{UPDATES} " not in shown


@ways
@pytest.mark.core
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
@pytest.mark.core
def test_stop_training_in_an_epoch(way):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    model = compiled(way)
    fit(model, **of_arrays(size(way)), epochs=4, callbacks=[Stop()])
    assert int(model.optimizer.iterations) == 1
