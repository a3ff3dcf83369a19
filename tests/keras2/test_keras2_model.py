"""On Keras 2: the model wrapper as the documentation of version 0.5.2 shows it.

Users of that version need to change nothing but the version.
"""

import numpy as np
import pytest
import tensorflow as tf
from api import KERAS_2

if not KERAS_2:
    pytest.skip("of Keras 2 only", allow_module_level=True)

from helpers import Batches
from helpers.keras2 import (
    EXAMPLES,
    HDF5_IS_OLD,
    LEGACY,
    K,
    assert_same,
    compiled,
    data,
    fit,
    network,
    values,
    wrapped,
)

from gradient_accumulator import (
    AccumulationWarning,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    accumulate,
)

layers, optimizers = tf.keras.layers, tf.keras.optimizers


@pytest.mark.parametrize("jit_compile", [None, True])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_the_model_wrapper(run_eagerly, jit_compile):
    if run_eagerly and jit_compile:
        pytest.skip("Keras 2 compiles nothing where it runs eagerly")
    settings = {"run_eagerly": run_eagerly, "jit_compile": jit_compile}
    reference = fit(compiled(network(), optimizers.Adam(0.1), metrics=["mae"]))
    model = compiled(wrapped(), optimizers.Adam(0.1), metrics=["mae"], **settings)
    assert_same(fit(model, EXAMPLES // K), reference)
    np.testing.assert_allclose(
        model.evaluate(*data(), verbose=0),
        reference.evaluate(*data(), verbose=0),
        rtol=1e-5,
    )


def test_the_wrappers_settings_by_position():
    model = network()
    made = GradientAccumulateModel(
        K, True, False, 0.01, 1e-3, True, inputs=model.input, outputs=model.output
    )
    reference = fit(compiled(network(), optimizers.Adam(0.1)))
    assert_same(fit(compiled(made, optimizers.Adam(0.1)), EXAMPLES // K), reference)


def test_several_inputs_and_outputs():
    def build():
        tf.keras.utils.set_random_seed(0)
        a, b = tf.keras.Input((6,)), tf.keras.Input((6,))
        h = layers.Concatenate()([layers.Dense(4)(a), layers.Dense(4)(b)])
        return tf.keras.Model([a, b], [layers.Dense(3)(h), layers.Dense(1)(h)])

    x, y = data()
    targets = [y, y[:, :1]]
    reference = compiled(build(), optimizers.Adam(0.1), ["mse", "mae"])
    reference.fit([x, -x], targets, batch_size=EXAMPLES, epochs=3, verbose=0)
    model = build()
    model = compiled(
        GradientAccumulateModel(K, inputs=model.inputs, outputs=model.outputs),
        optimizers.Adam(0.1),
        ["mse", "mae"],
    )
    model.fit([x, -x], targets, batch_size=4, epochs=3, verbose=0, shuffle=False)
    for a, b in zip(values(model), values(reference)):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["model", "optimizer", "legacy"])
def test_sparse_embeddings(wrapper):
    def build():
        tf.keras.utils.set_random_seed(0)
        x = tf.keras.Input((4,), dtype="int32")
        h = layers.GlobalAveragePooling1D()(layers.Embedding(20, 5)(x))
        return tf.keras.Model(x, layers.Dense(3)(h))

    x = np.random.default_rng(0).integers(0, 20, (EXAMPLES, 4))
    _, y = data()
    kind = LEGACY if wrapper == "legacy" else optimizers
    reference = compiled(build(), kind.Adam(0.1))
    reference.fit(x, y, batch_size=EXAMPLES, epochs=3, verbose=0)
    if wrapper == "model":
        model = compiled(wrapped(build()), kind.Adam(0.1))
    else:
        model = compiled(build(), GradientAccumulateOptimizer(kind.Adam(0.1), K))
    model.fit(x, y, batch_size=4, epochs=3, verbose=0, shuffle=False)
    for a, b in zip(values(model), values(reference)):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["model", "optimizer", "legacy"])
def test_mirrored_strategy(wrapper):
    reference = fit(compiled(network(), optimizers.Adam(0.1)))
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        if wrapper == "model":
            model = compiled(wrapped(), optimizers.Adam(0.1))
        else:
            kind = LEGACY if wrapper == "legacy" else optimizers
            optimizer = GradientAccumulateOptimizer(kind.Adam(0.1), K)
            model = compiled(network(), optimizer)
    assert_same(fit(model, EXAMPLES // K), reference)


@HDF5_IS_OLD
@pytest.mark.parametrize("suffix", [".keras", ".h5", ""])
def test_saving_a_model_that_accumulates(suffix, tmp_path):
    model = compiled(wrapped(), optimizers.Adam(0.1))
    fit(model, EXAMPLES // K)
    model.save(tmp_path / f"model{suffix}")
    loaded = tf.keras.models.load_model(tmp_path / f"model{suffix}", compile=True)
    assert_same(loaded, model, tolerance=0)
    np.testing.assert_array_equal(
        loaded.predict(data()[0], verbose=0), model.predict(data()[0], verbose=0)
    )
    assert isinstance(loaded, GradientAccumulateModel)
    if suffix:  # plain Keras 2 loses the optimizer's state in a SavedModel
        assert_same(fit(loaded, EXAMPLES // K), fit(model, EXAMPLES // K))


def test_an_update_that_fails_leaves_all_as_it_was():
    model = compiled(wrapped(), optimizers.Adam(0.1))
    fit(model, EXAMPLES // K)
    before = values(model)
    x, y = data()

    def microbatches():
        yield x[:4], y[:4]
        raise OSError("a bad example")

    with pytest.raises(tf.errors.UnknownError, match="a bad example"):
        model.fit(microbatches(), verbose=0)
    for a, b in zip(values(model), before):
        np.testing.assert_array_equal(a, b)


def test_train_on_batch():
    reference = compiled(network(), optimizers.Adam(0.1))
    model = accumulate(compiled(network(), optimizers.Adam(0.1)), microbatch_size=5)
    for each in (reference, model):
        each.train_on_batch(*data())
    assert_same(model, reference)
    accumulate(model, accum_steps=2)
    with pytest.raises(ValueError, match=r"microbatch_size.* Received: accum_steps=2"):
        model.train_on_batch(*data())
    accumulate(model, accum_steps=1)  # the model is plain again
    for each in (reference, model):
        each.train_on_batch(*data())
    assert_same(model, reference)


@pytest.mark.parametrize("steps_per_execution", [2, 3])
def test_steps_per_execution_validation_and_callbacks(steps_per_execution):
    def run(model, batch, **arguments):
        compiled(model, optimizers.Adam(0.1), metrics=["mae"], **arguments)
        x, y = data(32)
        history = model.fit(
            x,
            y,
            batch_size=batch,
            epochs=3,
            shuffle=False,
            verbose=0,
            validation_data=data(),
            callbacks=[tf.keras.callbacks.EarlyStopping("loss")],
        )
        return model, history.history

    reference, expected = run(network(), 8)
    model, history = run(
        wrapped(accum_steps=2), 4, steps_per_execution=steps_per_execution
    )
    assert_same(model, reference)
    assert history.keys() == expected.keys()
    for name, curve in expected.items():
        np.testing.assert_allclose(history[name], curve, rtol=1e-5)


def test_a_data_set_and_steps_per_epoch():
    x, y = data()
    microbatches = tf.data.Dataset.from_tensor_slices((x, y)).batch(4).repeat()
    model = compiled(wrapped(), optimizers.Adam(0.1))
    model.fit(microbatches, steps_per_epoch=3, epochs=3, verbose=0)
    assert_same(model, fit(compiled(network(), optimizers.Adam(0.1))))


def test_a_generator_of_unknown_length():
    x, y = data(10)

    def microbatches():
        for i in range(0, 10, 4):
            yield x[i : i + 4], y[i : i + 4]

    data_set = tf.data.Dataset.from_generator(
        microbatches,
        output_signature=(tf.TensorSpec((None, 6)), tf.TensorSpec((None, 3))),
    )
    model = compiled(wrapped(accum_steps=2), optimizers.Adam(0.1))
    model.fit(data_set, epochs=2, verbose=0)
    reference = compiled(network(), optimizers.Adam(0.1))
    reference.fit(Batches([(x[:8], y[:8]), (x[8:], y[8:])]), epochs=2, verbose=0)
    assert int(model.optimizer.iterations) == 4
    assert_same(model, reference)


def test_a_mask_of_a_lower_rank_than_the_loss():
    """Each step has two values of the loss, and one value of the mask."""

    def build():
        tf.keras.utils.set_random_seed(0)
        x = tf.keras.Input((4,), dtype="int32")
        return tf.keras.Model(
            x, layers.Dense(2)(layers.Embedding(9, 3, mask_zero=True)(x))
        )

    def squares(y, y_pred):
        return tf.square(y - y_pred)

    r = np.random.default_rng(0)
    x = r.integers(0, 9, (EXAMPLES, 4))
    x[:5, 2:] = 0
    y = r.normal(size=(EXAMPLES, 4, 2))
    reference = compiled(build(), optimizers.SGD(0.5), squares)
    model = accumulate(
        compiled(build(), optimizers.SGD(0.5), squares), microbatch_size=5
    )
    histories = [
        each.fit(x, y, batch_size=EXAMPLES, epochs=2, verbose=0).history["loss"]
        for each in (reference, model)
    ]
    np.testing.assert_allclose(*histories, rtol=1e-5)
    for a, b in zip(values(model), values(reference)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_model_that_is_not_compiled():
    model = wrapped()
    with pytest.raises(RuntimeError, match="compile"):
        fit(model, EXAMPLES // K)
    reference = fit(compiled(network(), optimizers.Adam(0.1)))
    assert_same(fit(compiled(model, optimizers.Adam(0.1)), EXAMPLES // K), reference)


@pytest.mark.parametrize("sizes, steps, what", [
    ((2, 2, 2, 1), None, "same number of examples"),
    ((2, 2, 2), 9, "ended before `steps_per_epoch`"),
])  # fmt: skip
def test_microbatches_that_are_not_what_they_should_be(sizes, steps, what):
    x, y = data(2)

    def microbatches(sizes):
        specs = tf.TensorSpec((None, 6)), tf.TensorSpec((None, 3))
        return tf.data.Dataset.from_generator(
            lambda: ((x, y[:n]) for n in sizes), output_signature=specs
        )

    model = network()
    model.compile("adam", "mse")
    accumulate(model, accum_steps=4).fit(microbatches((2,) * 4), verbose=0)
    before = values(model)
    with pytest.raises(ValueError, match=rf"{what}.*Received: "):
        model.fit(microbatches(sizes), steps_per_epoch=steps, verbose=0)
    for got, expected in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert int(model.optimizer.iterations) == 1


@pytest.mark.parametrize("loss, couples", [
    (lambda y, p: tf.reduce_mean((y - p) ** 2), False),
    (lambda y, p: tf.reduce_sum((y - p) ** 2), True),
])  # fmt: skip
def test_a_loss_that_couples_examples_is_told_of_once(loss, couples, recwarn):
    model = compiled(wrapped(), optimizers.SGD(0.01), loss)
    for _ in range(2):
        fit(model, EXAMPLES // K)
    messages = [str(w.message) for w in recwarn if w.category is AccumulationWarning]
    assert len(messages) == couples
    assert all("couples the examples" in message for message in messages)
