"""Half precision in micro-batches: its error is not larger than that of the batch."""

import keras
import numpy as np
import pytest
from helpers import Batches, array, configured
from keras import layers
from problems import WAYS_OF_FIT, cut

from gradient_accumulator import (
    AccumBatchNormalization,
    FlushGradients,
    GradientAccumulateOptimizer,
    accumulate,
)


def global_policy(name):
    return configured("dtype_policy", name)


def data(examples=64):
    r = np.random.default_rng(0)
    x = r.normal(size=(examples, 16)).astype("float32")
    return x, np.tanh(x @ r.normal(size=(16, 4)) / 2).astype("float32")


def model_of(*, dtype=None, normalization=None):
    keras.utils.set_random_seed(0)
    body = [layers.Dense(32, activation="tanh", dtype=dtype)]
    if normalization is not None:
        body.append(normalization())
    body.append(layers.Dense(32, activation="gelu", dtype=dtype))
    return keras.Sequential(
        [layers.Input((16,)), *body, layers.Dense(4, dtype="float32")]
    )


def flat(model):
    return np.concatenate([array(w).ravel() for w in model.weights])


SEEDS, ORDERS = 4, 3  # the seeds of the weights, and the orders of a batch's examples


def order(number):
    """The numbers of the examples in some order; number 0 is the original order."""
    numbers = np.arange(64)
    return np.random.default_rng(number).permutation(numbers) if number else numbers


class Trained:
    """Trains one model, compiled once, from the weights of each seed.

    Args:
        policy: The dtype policy.
        per_layer: Whether the layers have the policy; otherwise it is global.
        way: The way to train in micro-batches of 8; None for plain training.
        **settings: Further arguments of `accumulate`.
    """

    def __init__(self, policy, per_layer=False, way=None, **settings):
        with global_policy("float32" if per_layer else policy):
            self.model = model_of(dtype=policy if per_layer else None)
            # With a global mixed_float16, Keras puts a `LossScaleOptimizer` around it.
            self.model.compile(keras.optimizers.Adam(1e-2, epsilon=1e-3), "mse")
        if way is not None:
            size = 8 if way == "microbatch_size" else 64 // 8
            accumulate(self.model, **{way: size}, **settings)
        self.way = way
        self.model.optimizer.build(self.model.trainable_variables)
        self.optimizer = [array(v) for v in self.model.optimizer.variables]

    def __call__(self, seed, examples):
        """The weights after 10 updates, with the examples in this order."""
        for variable, value in zip(self.model.optimizer.variables, self.optimizer):
            variable.assign(value)
        r = np.random.default_rng(seed)
        for weight in self.model.weights:
            scale = 1 / np.sqrt(weight.shape[0]) if len(weight.shape) > 1 else 0
            weight.assign(scale * r.normal(size=weight.shape))
        batch = tuple(array[examples] for array in data())
        microbatches = cut(batch, 8) if self.way == "accum_steps" else [batch]
        self.model.fit(Batches(microbatches * 10), verbose=0, shuffle=False)
        return flat(self.model)


@pytest.mark.parametrize(
    "per_layer, way",
    [
        (False, "microbatch_size"),
        pytest.param(False, "accum_steps", marks=pytest.mark.full),
        pytest.param(True, "microbatch_size", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_no_further_off_than_the_batch(policy, per_layer, way):
    """The error, from float32, is compared with other errors of this run.

    The error of half precision depends on the rounding of each number, and so on the
    processor. So this also measures, over several seeds, the batch with its examples in
    another order, and sums of gradients in half precision.
    """
    exact, plain = Trained("float32"), Trained(policy, per_layer)
    ours = Trained(policy, per_layer, way)
    half = Trained(policy, per_layer, way, accum_dtype=policy.removeprefix("mixed_"))
    first, *orders = (order(number) for number in range(ORDERS))
    reordered, in_float32, in_half = [], [], []
    for seed in range(SEEDS):
        reference = exact(seed, first)

        def off(training, examples=first, seed=seed, reference=reference):
            return np.log(np.linalg.norm(training(seed, examples) - reference))

        floor = off(plain)
        reordered += [abs(off(plain, examples) - floor) for examples in orders]
        in_float32.append(off(ours) - floor)
        in_half.append(off(half) - floor)
    assert np.mean(in_float32) < max(*reordered, np.mean(in_half))


def bfloat16_update(spread, size=None, examples=slice(None), **settings):
    """The weights of a pure bfloat16 model after one update from weights of 0."""
    keras.utils.set_random_seed(0)
    dense = layers.Dense(8, kernel_initializer="zeros", dtype="bfloat16")
    model = keras.Sequential([layers.Input((16,), dtype="bfloat16"), dense])
    if size is not None:
        accumulate(model, microbatch_size=size, **settings)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    r = np.random.default_rng(0)
    x = 1 + spread * r.normal(size=(256, 16))
    y = 1.75 + spread * r.normal(size=(256, 8))
    model.fit(x[examples], y[examples], batch_size=256, verbose=0, shuffle=False)
    return array(dense.kernel)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
@pytest.mark.core
def test_sixty_four_microbatches_in_bfloat16(spread):
    full = bfloat16_update(spread)

    def off(**settings):
        update = bfloat16_update(spread, **settings)
        return np.linalg.norm(update - full) / np.linalg.norm(full)

    # Each of the two updates is rounded to the spacing of bfloat16, and the batch's own
    # error depends on the order of its examples.
    reordered = np.random.default_rng(1).permutation(256)
    assert off(size=4) < off(examples=reordered) + 2.0**-7
    if spread == 0:
        # Sums in bfloat16 lose small numbers, and all these errors have one sign.
        assert off(size=4, accum_dtype="bfloat16") > 0.05


def values(model, optimizer):
    variables = [*model.variables, *optimizer.inner_optimizer.variables]
    return {v.path: array(v) for v in variables if "loss" not in v.path}


def overflowing():
    """Data in which the scaled gradient of an example overflows (micro-batch 2)."""
    x, y = data(16)
    y[5] = 1e5
    return x, y


@pytest.mark.parametrize("way", WAYS_OF_FIT)
@pytest.mark.parametrize("own_scaler", [False, True])
@pytest.mark.parametrize(
    "normalization", [None, AccumBatchNormalization, layers.BatchNormalization]
)
def test_one_overflow_skips_the_update(normalization, own_scaler, way):
    with global_policy("mixed_float16"):
        model = model_of(normalization=normalization)
        warn = normalization is not layers.BatchNormalization
        accumulate(model, **{way: 4}, warn=warn)
        optimizer = keras.optimizers.Adam(1e-2)
        if own_scaler:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(optimizer, "mse")
    scaler = model.optimizer
    assert isinstance(scaler, keras.optimizers.LossScaleOptimizer)

    def fit(batch):
        microbatches = [batch]
        if way == "accum_steps":
            microbatches = cut(batch, 4)
        model.fit(Batches(microbatches), verbose=0, shuffle=False)

    fit(data(16))
    before = values(model, scaler)
    scale = float(array(scaler.dynamic_scale))
    fit(overflowing())
    for path, value in values(model, scaler).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    assert float(array(scaler.dynamic_scale)) == scale / 2
    # The skipped update has no effect on the next one.
    fit(data(16))
    after = values(model, scaler)
    assert all(np.isfinite(v).all() for v in after.values())
    moving = [path for path in after if "moving" in path]
    assert all((after[path] != before[path]).any() for path in moving)
    assert float(array(scaler.inner_optimizer.iterations)) == 2


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.core
def test_one_overflow_with_the_optimizer_wrapper(around):
    adam = keras.optimizers.Adam(1e-2)
    if around:
        optimizer = keras.optimizers.LossScaleOptimizer(
            GradientAccumulateOptimizer(adam, 4)
        )
    else:
        scaler = keras.optimizers.LossScaleOptimizer(adam)
        optimizer = GradientAccumulateOptimizer(scaler, 4)
    with global_policy("mixed_float16"):
        model = model_of()
        model.compile(optimizer, "mse", auto_scale_loss=False)

    def fit(batch):
        model.fit(Batches(cut(batch, 4)), verbose=0, shuffle=False)

    fit(data(16))
    before = flat(model), int(array(adam.iterations))
    assert before[1] == 1
    x, y = data(16)
    y[5] = np.inf
    fit((x, y))
    np.testing.assert_array_equal(flat(model), before[0])
    assert int(array(adam.iterations)) == 1
    fit(data(16))
    assert int(array(adam.iterations)) == 2
    assert np.isfinite(flat(model)).all()


@pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="the optimizer's stateless step has no access to a layer's statistics",
)
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.core
def test_a_skipped_update_takes_back_what_layers_that_count_moved(around, flushed):
    """Only the targets are not finite, so that the layer's statistics are finite."""
    adam = keras.optimizers.Adam(1e-2)
    if around:
        optimizer = keras.optimizers.LossScaleOptimizer(
            GradientAccumulateOptimizer(adam, 4), initial_scale=2.0**8
        )
    else:
        scaler = keras.optimizers.LossScaleOptimizer(adam, initial_scale=2.0**8)
        optimizer = GradientAccumulateOptimizer(scaler, 4)
    with global_policy("mixed_float16"):
        model = model_of(normalization=lambda: AccumBatchNormalization(accum_steps=4))
        model.compile(optimizer, "mse", auto_scale_loss=False)

    def fit(batch):
        callbacks = [FlushGradients()] if flushed else []
        microbatches = cut(batch, 4)
        model.fit(Batches(microbatches), verbose=0, shuffle=False, callbacks=callbacks)

    examples = 12 if flushed else 16
    (layer,) = (x for x in model.layers if isinstance(x, AccumBatchNormalization))

    def statistics():
        return array(layer.moving_mean), array(layer.moving_variance)

    fit(data(examples))
    before = statistics()
    assert before[0].any()
    x, y = data(examples)
    y[5] = np.inf
    fit((x, y))
    assert int(array(adam.iterations)) == 1
    np.testing.assert_array_equal(statistics(), before)
    fit(data(examples))
    assert int(array(adam.iterations)) == 2
    assert (statistics()[0] != before[0]).any()
