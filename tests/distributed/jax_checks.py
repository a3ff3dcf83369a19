"""Four devices of one process: runs the checks that the arguments name."""

import sys

import quickly

quickly.add_flags("--xla_force_host_platform_device_count=4")

import keras
import numpy as np
from checks import CHECKS, check, run
from helpers import TOLERANCE
from jax.sharding import PartitionSpec
from keras import layers

from gradient_accumulator import AccumBatchNormalization, accumulate

r = np.random.default_rng(0)
X = r.normal(size=(64, 6)).astype("float32")
Y = np.tanh(X[:, :4]).astype("float32")
FULL = 32


def build(*middle):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            layers.Input((6,)),
            layers.Dense(8, activation="tanh", name="wide"),
            *middle,
            layers.Dense(4),
        ]
    )


def fit(model, **way):
    if way:
        accumulate(model, **way)
    model.compile(keras.optimizers.Adam(0.05, epsilon=1e-2), "mse", metrics=["mae"])
    size = FULL // way.get("accum_steps", 1)
    history = model.fit(X, Y, batch_size=size, epochs=2, shuffle=False, verbose=0)
    return history.history


def weights(model):
    return [np.asarray(w) for w in model.get_weights()]


def compare(what, ours, reference, before):
    for a, b, start in zip(weights(ours), weights(reference), before, strict=True):
        off = np.abs(a - b).max() / max(np.abs(b - start).max(), 1e-6)
        assert off < TOLERANCE["float32"], f"{what}: off by {off}"


def parallel(shape):
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*wide/kernel"] = (None, "model")
    layout[".*wide/bias"] = ("model",)
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


# ----------------------------------------------------------------------------- checks


@check
def model_parallel():
    """Accumulators are sharded as their variables: a half or a quarter on a device."""
    reference = build()
    before = weights(reference)
    history = fit(reference)
    for shape in ((2, 2), (1, 4)):
        keras.distribution.set_distribution(parallel(shape))
        for way in ({"microbatch_size": 3}, {"accum_steps": 4}):
            model = build()
            logs = fit(model, **way)
            compare(f"{shape}, {way}", model, reference, before)
            for name, values in history.items():
                np.testing.assert_allclose(logs[name], values, rtol=1e-5)
            value = model.get_layer("wide").kernel.value
            assert value.sharding.spec == PartitionSpec(None, "model")
            (slot,) = (
                v.value
                for v in model.optimizer.variables
                if "wide_kernel_momentum" in v.path
            )
            assert slot.sharding.spec == PartitionSpec(None, "model")


@check
def accumulators():
    """While micro-batches are added, a device holds sums of its shards only."""
    from gradient_accumulator.engine.jax import JaxEngine

    held = {}
    steps_of = JaxEngine.steps

    def watch(distribution, kind):
        keras.distribution.set_distribution(distribution)
        model = build()
        made = []

        def steps(self, update):
            made.append(steps_of(self, update))
            return made[-1]

        JaxEngine.steps = steps
        try:
            fit(model, microbatch_size=3)
        finally:
            JaxEngine.steps = steps_of
        sums = made[0].zeros().sums
        # Beside the sums of metrics, if devices have parts of a micro-batch.
        gradients = sums[0] if isinstance(sums, tuple) else sums
        held[kind] = sum(array.addressable_shards[0].data.nbytes for array in gradients)
        return 4 * model.count_params(), 4 * (6 * 8 + 8)

    everything, wide = watch(keras.distribution.DataParallel(), "data")
    watch(parallel((2, 2)), "halves")
    watch(parallel((1, 4)), "quarters")
    assert held == {
        "data": everything,
        "halves": everything - wide // 2,
        "quarters": everything - 3 * wide // 4,
    }, held


@check
def clipped():
    clip = {"use_agc": True, "clip_factor": 0.02, "eps": 1e-2}
    reference, plain = build(), build()
    before = weights(reference)
    accumulate(reference, microbatch_size=FULL, **clip)
    fit(reference)
    fit(plain)
    assert any(
        np.abs(a - b).max() > 0.1 * np.abs(a - start).max()
        for a, b, start in zip(weights(reference), weights(plain), before)
    )
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = build()
    fit(model, microbatch_size=3, **clip)
    compare("clipped", model, reference, before)


@check
def normalization():
    """Normalization uses a micro-batch's examples on all devices, as in Keras."""
    for layer in (
        layers.BatchNormalization,
        AccumBatchNormalization,
        lambda **kwargs: AccumBatchNormalization(synchronized=True, **kwargs),
    ):
        keras.distribution.set_distribution(None)
        reference = build(layers.BatchNormalization(momentum=0.5))
        before = weights(reference)
        fit(reference)
        pooled = build(AccumBatchNormalization(momentum=0.5))
        fit(pooled, accum_steps=4)
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        model = build(layer(momentum=0.5))
        fit(model, microbatch_size=FULL // 4)  # one micro-batch, a part on each device
        compare(f"{layer}, one micro-batch", model, reference, before)
        if layer is AccumBatchNormalization:
            model = build(layer(momentum=0.5))
            fit(model, accum_steps=4)
            compare(f"{layer}, four micro-batches", model, pooled, before)


class Largest(keras.metrics.Metric):
    """A metric whose state is not a sum."""

    def __init__(self):
        super().__init__(name="largest")
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_pred)))

    def result(self):
        return self.value.value


@check
def own_metric():
    def run(**way):
        model = build()
        if way:
            accumulate(model, **way)
        model.compile("sgd", "mse", metrics=[Largest()])
        return model.fit(X, Y, batch_size=FULL, shuffle=False, verbose=0).history

    reference = run()
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    for name, values in run(microbatch_size=3).items():
        np.testing.assert_allclose(values, reference[name], rtol=1e-5)


@check
def dropout():
    """Devices draw different masks, and two runs from one seed are equal."""
    keras.distribution.set_distribution(keras.distribution.DataParallel())

    def run():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [layers.Input((50,)), layers.Dropout(0.5), layers.Dense(1)]
        )
        model.layers[-1].set_weights([np.zeros((50, 1)), np.zeros(1)])
        model.compile(keras.optimizers.SGD(1.0), "mae")
        accumulate(model, microbatch_size=1)
        # The gradient is the mean of the masks. Equal masks on all devices would give
        # only few values.
        model.fit(np.ones((16, 50)), np.ones((16, 1)), batch_size=16, verbose=0)
        return np.asarray(model.layers[-1].kernel)

    first, second = run(), run()
    np.testing.assert_array_equal(first, second)
    # Dropout doubles the values that it keeps.
    counts = np.abs(first) / 2 * 16
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
    assert np.round(counts % 4).any(), counts


def alone(name):
    keras.distribution.set_distribution(None)
    CHECKS[name]()


if __name__ == "__main__":
    run(sys.argv[1:], alone)
