"""`fit` of this package is below a model's own class, and replaces nothing in Keras."""

import copy
import pickle
import sys
import threading
import warnings

import keras
import numpy as np
import problems
import pytest
from helpers import (
    COUNT,
    FULL,
    MICROBATCH,
    Batches,
    Record,
    arrays,
    assert_close,
    compiled,
    data,
    fit,
    of_arrays,
    of_py_dataset,
    size,
    ways,
)

from gradient_accumulator import GradientAccumulateModel, accumulate

pytestmark = pytest.mark.core


def sequential():
    return keras.Sequential(
        [keras.Input((problems.FEATURES,)), keras.layers.Dense(problems.CLASSES)]
    )


class EvaluatesFirst(problems.Written):
    def fit(self, x, *args, **kwargs):
        self.evaluate(x, verbose=0)
        return super().fit(x, *args, **kwargs)


def functional():
    x = keras.Input((problems.FEATURES,))
    y = keras.layers.Dense(problems.CLASSES)(x)
    return GradientAccumulateModel(inputs=x, outputs=y, accum_steps=FULL // MICROBATCH)


# For each model: how it is made, and how it accumulates.
KINDS = {
    "functional": (problems.mlp(), "microbatch_size"),
    "functional_accum_steps": (problems.mlp(), "accum_steps"),
    "sequential": (problems.seeded(sequential), "accum_steps"),
    "subclassed": (problems.written(problems.Written), "microbatch_size"),
    "own_fit": (problems.written(EvaluatesFirst), "accum_steps"),
    "own_fit_microbatch_size": (problems.written(EvaluatesFirst), "microbatch_size"),
    "GradientAccumulateModel": (problems.seeded(functional), None),
    "plain": (problems.mlp(), None),
}


def test_threads_whose_set_up_overlaps():
    """Each model trains as if no other thread trained."""
    together = threading.Barrier(len(KINDS))

    class Waiting(Batches):
        """Waits for the data of all other threads when `fit` asks for its length."""

        waited = False

        @property
        def num_batches(self):
            if not self.waited:
                self.waited = True
                together.wait(60)
            return super().num_batches

    def given(kind):
        batch_size = {"accum_steps": MICROBATCH}.get(KINDS[kind][1], FULL)
        if kind == "GradientAccumulateModel":
            batch_size = MICROBATCH
        return problems.cut(data(), batch_size)

    def model_of(kind):
        build, way = KINDS[kind]
        return compiled(way, build)

    alone, models = [{kind: model_of(kind) for kind in KINDS} for _ in range(2)]
    for kind, model in alone.items():
        fit(model, Batches(given(kind)), epochs=2)

    failed = []

    def train(kind):
        try:
            fit(models[kind], Waiting(given(kind)), epochs=2)
        except BaseException as error:
            failed.append((kind, error))
            together.abort()

    threads = [threading.Thread(target=train, args=(kind,)) for kind in KINDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for kind, model in models.items():
        assert_close(arrays(model.weights), arrays(alone[kind].weights))


def of_keras():
    """All attributes of Keras's modules, and of their classes."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("keras", "tf_keras") or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__.startswith("keras"):
                for of_class, held in list(vars(value).items()):
                    found[name, attribute, of_class] = held
    return found


class Watching(keras.callbacks.Callback):
    """Records which attributes of Keras differ from those before `fit`."""

    def __init__(self):
        super().__init__()
        self.before, self.changed = of_keras(), set()

    def look(self, *_, **__):
        now = of_keras()
        self.changed |= {
            key for key in self.before if now.get(key) is not self.before[key]
        }

    on_train_begin = on_epoch_begin = on_train_batch_begin = look
    on_train_batch_end = on_epoch_end = on_train_end = on_test_begin = look


@ways
def test_nothing_of_keras_is_replaced(way):
    fit(compiled(None), **of_arrays(FULL))  # Keras sets some attributes the first time
    seen = []
    for each in None, way:
        watching = Watching()
        given = of_arrays(size(each))
        validation = of_py_dataset(FULL)
        fit(
            compiled(each),
            **given,
            epochs=2,
            validation_data=validation,
            callbacks=[watching],
        )
        watching.look()
        seen.append(watching.changed)
    plain, ours = seen
    assert not ours - plain


def test_what_is_left_at_an_epochs_end_is_counted(capsys):
    """Keras does not know the number of batches, and counts those that were there."""
    batches = problems.cut(data(19 * MICROBATCH), MICROBATCH)
    model = accumulate(compiled(), accum_steps=8)
    record = Record()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        fit(model, (batch for batch in batches), verbose=1, callbacks=[record])
    assert record.begins[:3] == [0, 8, 16]  # Keras may begin one more call
    assert record.ends == [7, 15, 18]
    assert int(model.optimizer.iterations) == 3
    shown = capsys.readouterr().out
    assert "19/19" in shown
    assert "/24" not in shown


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
@ways
def test_a_copy_goes_on_accumulating(way, again):
    model = compiled(way)
    fit(model, **of_arrays(size(way)))
    copied = again(model)
    assert copied.accumulation == model.accumulation
    for each in model, copied:
        fit(each, **of_arrays(size(way)))
    assert int(copied.optimizer.iterations) == 2 * COUNT // FULL
    assert_close(arrays(copied.weights), arrays(model.weights))


@ways
def test_a_clone_and_a_saved_model_are_plain(way, tmp_path):
    model = compiled(way)
    fit(model, **of_arrays(size(way)))
    model.save(tmp_path / "m.keras")
    for plain in (
        keras.models.clone_model(model),
        type(model)(model.inputs, model.outputs),
        type(model).from_config(model.get_config()),
        keras.saving.load_model(tmp_path / "m.keras"),
    ):
        assert type(plain) is type(compiled())
        assert getattr(plain, "accumulation", None) is None


def test_the_arguments_of_fit_by_their_places():
    x, y = data()
    model, plain = compiled("microbatch_size"), compiled()
    for each in model, plain:
        history = each.fit(x, y, FULL, 3, 0, None, 0.25, None, False)
    assert len(history.history["val_loss"]) == 3
    assert_close(arrays(model.weights), arrays(plain.weights))
    with pytest.raises(TypeError, match="unexpected"):
        model.fit(x, y, batches=2)
    np.testing.assert_allclose(
        model.evaluate(x, y, verbose=0), plain.evaluate(x, y, verbose=0), rtol=1e-5
    )
