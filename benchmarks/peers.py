"""Loops of one's own: our function, and what the same loop is with a peer.

On JAX `optax.microbatching`, on PyTorch Accelerate's `accumulate`; nobody offers one
for TensorFlow. Both with the optimizer that belongs to the peer. Each function takes a
compiled model and the size of a micro-batch and returns `update(x, y)`, which trains on
one batch."""

from __future__ import annotations

from collections.abc import Callable


def function(model, size: int) -> Callable:
    """With `accumulated_value_and_grad`."""
    import keras

    from gradient_accumulator import accumulated_value_and_grad

    if keras.backend.backend() == "jax":
        return _jax(
            model,
            lambda loss: accumulated_value_and_grad(loss, microbatch_size=size),
        )
    if keras.backend.backend() == "torch":
        return _torch_function(model, size)
    return _tensorflow(model, size)


def host(model, size: int) -> Callable:
    """With `accumulated_value_and_grad` outside of `jax.jit`: a loop of the host."""
    from gradient_accumulator import accumulated_value_and_grad

    return _jax(
        model,
        lambda loss: accumulated_value_and_grad(loss, microbatch_size=size),
        jit_gradients=False,
    )


def peer(model, size: int) -> Callable:
    """With what the backend's users take for it."""
    import keras

    if keras.backend.backend() == "torch":
        return _torch_peer(model, size)
    if keras.backend.backend() == "tensorflow":
        raise NotImplementedError("There is no such loop for TensorFlow.")

    import jax
    import optax

    mean = optax.microbatching.AccumulationType.MEAN
    return _jax(
        model,
        lambda loss: optax.microbatching.microbatch(
            jax.value_and_grad(loss), argnums=1, microbatch_size=size, accumulator=mean
        ),
    )


def _jax(model, value_and_grad: Callable, jit_gradients: bool = True) -> Callable:
    """An update with an optimizer of optax's, one jitted function or two."""
    import jax
    import optax

    fixed = [v.value for v in model.non_trainable_variables]
    parameters = [v.value for v in model.trainable_variables]
    optimizer = optax.adam(1e-4)
    state = optimizer.init(parameters)

    def loss(parameters, microbatch):
        x, y = microbatch
        outputs, _ = model.stateless_call(parameters, fixed, x, training=True)
        return model.loss(y, outputs)

    gradients_of = value_and_grad(loss)

    def apply(parameters, state, gradients):
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    def step(parameters, state, batch):
        _, gradients = gradients_of(parameters, batch)
        return apply(parameters, state, gradients)

    if jit_gradients:
        step = jax.jit(step, donate_argnums=(0, 1))
    else:
        apply = jax.jit(apply, donate_argnums=(0, 1, 2))

    def update(x, y):
        nonlocal parameters, state
        parameters, state = step(parameters, state, (x, y))
        model.trainable_variables[-1].assign(parameters[-1])  # for who waits on it

    return update


def _tensorflow(model, size: int) -> Callable:
    import tensorflow as tf

    from gradient_accumulator import accumulated_value_and_grad

    variables = model.trainable_variables

    def loss(microbatch):
        x, y = microbatch
        return model.loss(y, model(x, training=True))

    gradients_of = accumulated_value_and_grad(loss, microbatch_size=size)

    @tf.function
    def update(x, y):
        _, gradients = gradients_of(variables, (x, y))
        model.optimizer.apply(gradients, variables)

    return update


def _torch_loss(model, x, y):
    from keras import ops

    outputs = model(ops.convert_to_tensor(x), training=True)
    return model.loss(ops.convert_to_tensor(y), outputs)


def _torch_function(model, size: int) -> Callable:
    import torch

    from gradient_accumulator import accumulated_value_and_grad

    parameters = [v.value for v in model.trainable_variables]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    gradients_of = accumulated_value_and_grad(
        lambda microbatch: _torch_loss(model, *microbatch), microbatch_size=size
    )

    def update(x, y):
        _, gradients = gradients_of(parameters, (x, y))
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return update


def _torch_peer(model, size: int) -> Callable:
    import accelerate
    import torch

    parameters = [v.value for v in model.trainable_variables]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    accelerators: dict[int, accelerate.Accelerator] = {}

    def update(x, y):
        nonlocal optimizer
        microbatches = -(-len(x) // size)
        if microbatches not in accelerators:
            accelerators[microbatches] = accelerate.Accelerator(
                gradient_accumulation_steps=microbatches
            )
            optimizer = accelerators[microbatches].prepare(optimizer)
        accelerator = accelerators[microbatches]
        for start in range(0, len(x), size):
            with accelerator.accumulate(model):
                microbatch = x[start : start + size], y[start : start + size]
                accelerator.backward(_torch_loss(model, *microbatch))
                optimizer.step()
                optimizer.zero_grad()

    return update


def replicated(model, size: int) -> Callable:
    """PyTorch's processes: `DistributedDataParallel` and an update after each
    micro-batch.

    With Keras's optimizer, for it stands beside `fit`.
    """
    import torch
    from keras import ops
    from torch.nn.parallel import DistributedDataParallel

    together = DistributedDataParallel(model)
    variables = model.trainable_variables

    def update(x, y):
        for i in range(0, len(x), size):
            microbatch = ops.convert_to_tensor(x[i : i + size])
            outputs = together(microbatch, training=True)
            model.loss(ops.convert_to_tensor(y[i : i + size]), outputs).backward()
            with torch.no_grad():
                model.optimizer.apply([v.value.grad for v in variables], variables)
            together.zero_grad()

    return update
