"""A process with two processors: two replicas give what one device gives.

`test_loops.py` runs it, for the processors must be made before TensorFlow begins.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from gradient_accumulator import FlushGradients, GradientAccumulateOptimizer

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

r = np.random.default_rng(0)
x = r.normal(size=(40, 6)).astype("float32")
y = np.tanh(x[:, :3])


def build():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [layers.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(3)]
    )


def adam():
    # Not clipped: Keras clips each replica's gradient before it sums them.
    return keras.optimizers.Adam(0.05, epsilon=1e-2)


def trained(optimizer, size, strategy, **arguments):
    with strategy.scope():
        model = build()
        before = np.concatenate([w.ravel() for w in model.get_weights()])
        model.compile(optimizer(), "mse", metrics=["mae"])
    history = model.fit(
        x, y, batch_size=size, epochs=2, shuffle=False, verbose=0, **arguments
    ).history
    after = np.concatenate([w.ravel() for w in model.get_weights()])
    return before, after, model, history


def check(name, ours, reference, before):
    off = np.abs(ours - reference).max() / np.abs(reference - before).max()
    assert off < 1e-5, f"{name}: off by {off}"


def around(steps):
    inner = GradientAccumulateOptimizer(adam(), steps)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)


def inside(steps):
    scaler = keras.optimizers.LossScaleOptimizer(adam(), initial_scale=8.0)
    return GradientAccumulateOptimizer(scaler, steps)


one = tf.distribute.get_strategy()
before, reference, _, _ = trained(adam, 16, one)  # 16, 16 and 8 examples
for name, wrapped in {
    "wrapped": lambda: GradientAccumulateOptimizer(adam(), 4),
    "scaled inside": lambda: inside(4),
    "scaled around": lambda: around(4),
}.items():
    _, ours, model, history = trained(
        wrapped, 4, STRATEGY, callbacks=[FlushGradients()]
    )
    check(name, ours, reference, before)

# A save in the middle of an accumulation holds the replicas' sum.
_, _, model, _ = trained(lambda: GradientAccumulateOptimizer(adam(), 8), 4, STRATEGY)
optimizer = model.optimizer
assert optimizer.pending == 4, optimizer.pending
store: dict = {}
optimizer.save_own_variables(store)
_, _, single, _ = trained(lambda: GradientAccumulateOptimizer(adam(), 8), 4, one)
sums = [
    np.asarray(v)
    for v in single.optimizer.variables
    if "gradient_accumulator" in v.path
]
saved = [
    store[str(i)]
    for i, v in enumerate(optimizer.variables)
    if "gradient_accumulator" in v.path
]
for a, b in zip(saved, sums, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
