"""`FlushGradients`: the GAN of the examples, and its arguments."""

import importlib.util
from pathlib import Path

import keras
import numpy as np
import problems
import pytest
from helpers import array

from gradient_accumulator import FlushGradients, GradientAccumulateOptimizer

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]


def example_gan():
    spec = importlib.util.spec_from_file_location("gan", ROOT / "examples/gan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained_gan(wrap, size, flush=lambda *optimizers: []):
    example = example_gan()
    r = np.random.default_rng(0)
    real, noise = problems.normal(r, 20, 2), problems.normal(r, 20, 4)
    keras.utils.set_random_seed(1)
    g_optimizer, d_optimizer = (
        wrap(keras.optimizers.Adam(0.05, epsilon=1e-2, global_clipnorm=0.3))
        for _ in range(2)
    )
    gan = example.GAN(*example.networks(), g_optimizer, d_optimizer)
    gan.compile()
    before = [array(v) for v in gan.trainable_variables]
    gan.fit(
        (real, noise),
        batch_size=size,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=flush(g_optimizer, d_optimizer),
    )
    optimizers = g_optimizer, d_optimizer
    return before, [array(v) for v in gan.trainable_variables], optimizers


def test_the_gan_of_the_examples():
    """The batches have 8, 8 and 4 examples, and the model holds two optimizers."""
    before, reference, plain = trained_gan(lambda optimizer: optimizer, 8)
    _, ours, optimizers = trained_gan(
        lambda optimizer: GradientAccumulateOptimizer(optimizer, 4),
        2,
        lambda *optimizers: [FlushGradients(*optimizers)],
    )
    for a, b, start in zip(ours, reference, before, strict=True):
        moved = np.abs(b - start).max()
        assert moved > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * moved + 1e-7)
    for optimizer, other in zip(optimizers, plain):
        assert optimizer.pending == 0
        assert int(array(optimizer.iterations)) == int(array(other.iterations)) == 6


def test_without_flushing_the_gan_waits():
    _, _, optimizers = trained_gan(
        lambda optimizer: GradientAccumulateOptimizer(optimizer, 4), 2
    )
    assert [int(array(o.iterations)) for o in optimizers] == [5, 5]


def test_flush_gradients_of_a_gan_without_being_told():
    with pytest.raises(
        ValueError, match=r"FlushGradients\(g_optimizer, d_optimizer\).*Received: opt"
    ):
        trained_gan(
            lambda optimizer: GradientAccumulateOptimizer(optimizer, 4),
            2,
            lambda *_: [FlushGradients()],
        )


def test_flush_gradients_takes_one_around():
    inner = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 4)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    made = problems.mlp()()
    made.compile(outer, "mse")
    x = np.ones((6, problems.FEATURES), "float32")
    flush = FlushGradients(outer)
    made.fit(x, x[:, :3], batch_size=2, verbose=0, callbacks=[flush])
    assert inner.pending == 0 and int(array(inner.iterations)) == 1
    # Without arguments it flushes the optimizer of `compile`.
    made.fit(x, x[:, :3], batch_size=2, verbose=0, callbacks=[FlushGradients()])
    assert inner.pending == 0 and int(array(inner.iterations)) == 2


@pytest.mark.parametrize(
    "given, error",
    [
        (lambda: keras.optimizers.SGD(0.1), ValueError),
        (lambda: "sgd", TypeError),
        (lambda: None, TypeError),
        (lambda: [GradientAccumulateOptimizer("sgd", 2)], TypeError),
    ],
)
def test_flush_gradients_of_what_does_not_accumulate(given, error):
    with pytest.raises(error, match=r"takes optimizers.*Received: "):
        FlushGradients(GradientAccumulateOptimizer("sgd", 2), given())
