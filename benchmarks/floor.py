"""The floor: K forward-backward passes and one update, by hand, and nothing else.

No `fit`, no metrics, no sample weights, no shuffling: what each backend cannot do
without. Each function takes a compiled model and the size of a micro-batch and returns
`update(x, y)`, which trains on one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator


def update_function(model, size: int) -> Callable:
    import keras

    return {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[
        keras.backend.backend()
    ](model, size)


def _microbatches(x, y, size: int) -> Iterator[tuple]:
    for start in range(0, len(x), size):
        yield x[start : start + size], y[start : start + size]


def _tensorflow(model, size: int) -> Callable:
    import tensorflow as tf

    variables = model.trainable_variables

    @tf.function(jit_compile=model.jit_compile)
    def add(sums, x, y):
        with tf.GradientTape() as tape:
            loss = model.loss(y, model(x, training=True))
        gradients = tape.gradient(loss, variables)
        return [s + tf.convert_to_tensor(g) for s, g in zip(sums, gradients)]

    @tf.function(jit_compile=model.jit_compile)
    def apply(sums):
        model.optimizer.apply(sums, variables)

    @tf.function(autograph=False)
    def update(x, y):
        microbatches = x.shape[0] // size
        x, y = (tf.reshape(a, (microbatches, size, *a.shape[1:])) for a in (x, y))
        zeros = [tf.zeros(v.shape) for v in variables]
        _, sums = tf.while_loop(
            lambda k, _: k < microbatches,
            lambda k, sums: (k + 1, add(sums, x[k], y[k])),
            (tf.constant(0), zeros),
            parallel_iterations=1,
        )
        apply([s / microbatches for s in sums])

    return update


def _jax(model, size: int) -> Callable:
    import jax
    import jax.numpy as jnp

    optimizer = model.optimizer

    def loss(trainable, fixed, x, y):
        outputs, _ = model.stateless_call(trainable, fixed, x, training=True)
        return model.loss(y, outputs)

    def add(sums, *args):
        return jax.tree.map(lambda s, g: s + g, sums, jax.grad(loss)(*args))

    def apply(trainable, state, sums, microbatches):
        means = [total / microbatches for total in sums]
        updated = optimizer.stateless_apply(state, means, trainable)
        return *updated, [jnp.zeros_like(total) for total in sums]

    add = jax.jit(add, donate_argnums=0)
    apply = jax.jit(apply, donate_argnums=(0, 1, 2))
    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]
    state = [v.value for v in optimizer.variables]
    sums = [v * 0 for v in trainable]

    def update(x, y):
        nonlocal trainable, state, sums
        for microbatch in _microbatches(x, y, size):
            sums = add(sums, trainable, fixed, *microbatch)
        trainable, state, sums = apply(trainable, state, sums, len(x) / size)
        model.trainable_variables[-1].assign(trainable[-1])  # for who waits on it

    return update


def _torch(model, size: int) -> Callable:
    import torch
    from keras import ops

    def update(x, y):
        for x_microbatch, y_microbatch in _microbatches(x, y, size):
            loss = model.loss(
                ops.convert_to_tensor(y_microbatch),
                model(ops.convert_to_tensor(x_microbatch), training=True),
            )
            (loss * (len(x_microbatch) / len(x))).backward()
        variables = model.trainable_variables
        with torch.no_grad():
            model.optimizer.apply([v.value.grad for v in variables], variables)
        for variable in variables:
            variable.value.grad = None

    return update
