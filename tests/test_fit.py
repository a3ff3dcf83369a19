"""`fit` in micro-batches, with all arguments of Keras's `fit`, and related methods."""

import keras
import numpy as np
import problems
import pytest
import quickly
from helpers import (
    BACKEND,
    COUNT,
    FULL,
    MICROBATCH,
    MICROBATCHES,
    SOURCES,
    UPDATES,
    WAYS,
    Batches,
    arrays,
    assert_close,
    both,
    collector,
    compiled,
    core_on,
    counting_activations,
    data,
    fit,
    has_values,
    of_arrays,
    of_py_dataset,
    size,
    ways,
)
from keras import layers, ops
from versions import JIT_COMPILE, unless_plain_fails

from gradient_accumulator import accumulate


@ways
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.core
def test_data_source(source, way):
    model, _ = both(way, SOURCES[source], epochs=2)
    assert int(model.optimizer.iterations) == 2 * UPDATES


@ways
def test_py_dataset_with_workers(way):
    """On JAX plain Keras loses the order here, so that only updates are counted."""
    model = compiled(way)
    dataset = Batches(problems.cut(data(), size(way)), workers=2)
    history = fit(model, dataset, epochs=2).history
    assert int(model.optimizer.iterations) == 2 * UPDATES
    assert history["loss"][1] < history["loss"][0]


@ways
@pytest.mark.core
def test_tf_data_of_unknown_length_and_rank(way):
    import tensorflow as tf

    def source(batch_size):
        batches = problems.cut(data(), batch_size)
        spec = tf.TensorSpec((None, None), tf.float32)
        return tf.data.Dataset.from_generator(
            lambda: iter(batches), output_signature=(spec, spec)
        )

    # Keras warns that it learnt the length of an epoch at its end. On TensorFlow plain
    # Keras then counts one update too many, so that it gets data of known length.
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
@pytest.mark.core
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
@pytest.mark.core
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
@pytest.mark.core
def test_fit_again_goes_on(way):
    results = []
    for each in (None, way):
        model = compiled(each)
        for _ in range(2):
            fit(model, **of_arrays(size(each)))
        results.append(arrays(model.weights) | arrays(model.optimizer.variables))
    assert_close(*reversed(results))


@ways
@pytest.mark.core
def test_run_eagerly(way):
    both(way, of_arrays, settings=lambda: {"run_eagerly": True}, epochs=2)


@ways
@pytest.mark.parametrize(
    "jit_compile",
    [pytest.param(True, marks=unless_plain_fails(JIT_COMPILE)), False],
)
@core_on("tensorflow", "jax")
def test_jit_compile(way, jit_compile):
    both(way, of_arrays, settings=lambda: {"jit_compile": jit_compile}, epochs=2)


@ways
@pytest.mark.skipif(
    BACKEND == "torch", reason="Keras has it on TensorFlow and JAX only"
)
@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.core
def test_steps_per_execution(way, steps):
    def settings():
        return {"steps_per_execution": steps}

    model, _ = both(way, of_arrays, settings=settings, epochs=2)
    assert int(model.optimizer.iterations) == 2 * UPDATES
    assert model.steps_per_execution == steps


def sizes_seen(way, count=10, traced=False, **settings):
    """The batch sizes of the model's calls while it trains, or is traced."""
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


def test_the_model_sees_microbatches_one_after_the_other():
    eager = {"run_eagerly": True}
    assert sizes_seen(None, **eager) == [8, 2]
    assert sizes_seen("microbatch_size", **eager) == [4, 4, 2]
    assert sizes_seen("accum_steps", **eager) == [4, 4, 2]


@pytest.mark.core
def test_the_model_never_sees_the_batch():
    for way in WAYS:
        assert FULL not in sizes_seen(way, traced=True)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # plain Keras too
@pytest.mark.parametrize("steps", [None, COUNT])
@pytest.mark.core
def test_microbatches_are_drawn_when_it_is_their_turn(steps):
    """This model's loss need not know all micro-batches before the first one."""
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


@pytest.mark.skipif(BACKEND != "torch", reason="others compile the micro-batch")
@ways
def test_a_microbatches_activations_are_gone_before_the_next(way):
    alive = []
    model = compiled(way, lambda: counting_activations(alive))
    x, y = data()
    with collector(young=10**6):
        fit(model, x, y, batch_size=size(way))
    assert alive == [0] * MICROBATCHES


@pytest.mark.skipif(BACKEND != "torch", reason="others compile the micro-batch")
def test_activations_are_gone_of_passes_that_tell_what_microbatches_are_worth():
    """A pass measures the user's loss first, because the model has another loss too."""
    alive = []

    class Squares(keras.losses.MeanSquaredError):
        pass

    class Written(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = counting_activations(alive, training_only=False)

        def call(self, x, training=False):
            self.add_loss(ops.mean(x))
            return self.inner(x, training=training)

    loss = Squares("mean_with_sample_weight")
    model = compiled("microbatch_size", Written, loss=loss)
    x, y = data(FULL)
    with collector(young=10**6):
        fit(model, x, y, sample_weight=np.arange(FULL), batch_size=FULL)
    assert alive == [0] * len(alive) and len(alive) >= 2 * FULL // MICROBATCH


class Held:
    """Holds arrays, and a reference to itself, which is a cycle."""

    def __init__(self, arrays):
        self.arrays, self.own = arrays, self

    def __del__(self):
        Held.alive -= 1


@pytest.mark.skipif(BACKEND != "torch", reason="others compile the micro-batch")
@ways
def test_the_users_cycles_are_collected_while_it_trains(way):
    """Python's collector still looks at objects that lived for longer than a
    micro-batch.
    """
    alive = []
    Held.alive = 0

    def batches():
        x, y = data(size(way))
        while True:
            held = Held((x.copy(), y.copy()))
            Held.alive += 1
            alive.append(Held.alive)
            yield held.arrays

    with collector(older=1):  # sooner than usual: a micro-batch makes few objects
        fit(compiled(way), batches(), steps_per_epoch=400)
    assert max(alive) < 200


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a TensorFlow graph")
@ways
@pytest.mark.core
def test_what_microbatches_are_worth_takes_no_forward_pass(way):
    """It takes none even though cross-entropy asserts the shape of the predictions."""
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
    assert len(passes) == MICROBATCHES


def test_a_microbatch_larger_than_the_batch_is_one_microbatch():
    results = []
    for microbatch_size in (None, 100):
        model = compiled()
        if microbatch_size:
            accumulate(model, microbatch_size=microbatch_size, warn=False)
        fit(model, **of_arrays(FULL), epochs=2)
        results.append(arrays(model.weights))
    assert_close(*results)


@pytest.mark.core
def test_more_accum_steps_than_microbatches_is_one_update_an_epoch():
    x, y = data()
    reference = compiled()
    fit(reference, x, y, batch_size=COUNT, epochs=2)
    model = accumulate(compiled(), accum_steps=100, warn=False)
    fit(model, x, y, batch_size=MICROBATCH, epochs=2)
    assert int(model.optimizer.iterations) == 2
    assert_close(arrays(model.weights), arrays(reference.weights))


@ways
@pytest.mark.core
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


@pytest.mark.core
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


@pytest.mark.core
def test_train_on_batch_by_accum_steps_raises():
    model = compiled("accum_steps")
    before = arrays(model.weights)
    with pytest.raises(ValueError, match=r"microbatch_size.*Received: accum_steps=2"):
        model.train_on_batch(*data(4))
    assert_close(arrays(model.weights), before)
