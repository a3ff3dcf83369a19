"""Keras's callbacks, in micro-batches."""

import csv

import keras
import pytest
from helpers import (
    FULL,
    UPDATES,
    Record,
    arrays,
    assert_close,
    both,
    compiled,
    core_on,
    fit,
    of_arrays,
    size,
    ways,
)

pytestmark = core_on("torch")


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
@core_on("jax", "torch")
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
        assert type(loaded) is type(compiled(None))
        if frequency == "epoch":
            assert_close(arrays(loaded.weights), arrays(model.weights))
            assert int(loaded.optimizer.iterations) == 2 * UPDATES


class Interrupt(keras.callbacks.Callback):
    """Interrupts the training in the middle of the second epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 1 and batch >= 1:
            raise InterruptedError

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch


@ways
@core_on("jax", "torch")
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
    # Keras's callback writes with TensorFlow on every backend.
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
@pytest.mark.core
def test_a_callback_list_of_keras(way):
    model = compiled(way)
    record = Record()
    callbacks = keras.callbacks.CallbackList([record], add_history=True, model=model)
    fit(model, **of_arrays(size(way)), callbacks=callbacks)
    assert len(record.ends) == UPDATES
