"""Loops with `jax.jit`, compared with the batch and with optax."""

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND
from helpers.loops import adam, assert_equal_weights, data, tokens_and_labels
from keras import ops
from versions import OPTAX, unless_plain_fails

from gradient_accumulator import GradientAccumulateOptimizer, accumulated_value_and_grad

on_jax = pytest.mark.skipif(BACKEND != "jax", reason="a JAX loop")


def jax_parameters():
    r = np.random.default_rng(1)
    return {
        "embedding": r.normal(size=(problems.TOKENS, 5)).astype("float32"),
        "kernel": r.normal(size=(5, 1)).astype("float32"),
    }


def jax_sum(parameters, microbatch):
    tokens, labels, mask = microbatch
    hidden = ops.tanh(ops.take(parameters["embedding"], tokens, axis=0))
    errors = ops.square((hidden @ parameters["kernel"])[..., 0] - labels)
    return ops.sum(errors * mask), ops.sum(mask)


def jax_mean(parameters, microbatch):
    numerator, denominator = jax_sum(parameters, microbatch)
    return numerator / denominator


def jax_loop(optimizer, gradients, batches):
    """A jitted loop with an optax optimizer."""
    import jax
    import optax

    parameters = jax.tree.map(ops.convert_to_tensor, jax_parameters())
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, batch):
        updates, state = optimizer.update(
            gradients(parameters, batch), state, parameters
        )
        return optax.apply_updates(parameters, updates), state

    for _ in range(3):
        for batch in batches:
            parameters, state = step(parameters, state, batch)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(parameters)]


@on_jax
@unless_plain_fails(OPTAX)
@pytest.mark.parametrize("weighted", [False, True])
def test_optax_beside_multi_steps_and_microbatching(weighted):
    import jax
    import optax

    batch = tokens_and_labels()
    if not weighted:
        batch = (batch[0], batch[1], np.ones_like(batch[2]))
    microbatches = [tuple(a[i : i + 4] for a in batch) for i in (0, 4, 8)]
    before = jax.tree.leaves(jax_parameters())
    adam = optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.05, eps=1e-2))
    reference = jax_loop(adam, jax.grad(jax_mean), [batch])

    def ours(parameters, batch):
        loss = jax_sum if weighted else jax_mean
        return accumulated_value_and_grad(loss, microbatch_size=4)(parameters, batch)[1]

    assert_equal_weights(jax_loop(adam, ours, [batch]), reference, before)

    microbatched = optax.microbatching.microbatch(
        jax.grad(jax_mean),
        argnums=1,
        microbatch_size=4,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    peers = (
        jax_loop(optax.MultiSteps(adam, 3), jax.grad(jax_mean), microbatches),
        jax_loop(adam, microbatched, [batch]),
    )
    for peer in peers:
        if weighted:  # micro-batches have equal weights, whatever their tokens
            with pytest.raises(AssertionError):
                assert_equal_weights(peer, reference, before, tolerance=1e-2)
        else:
            assert_equal_weights(peer, reference, before)


@on_jax
@pytest.mark.core
def test_a_jitted_loop_with_stateless_apply_and_flush():
    import jax

    def trained(optimizer, size, flush=False):
        model = problems.mlp()()
        before = model.get_weights()
        optimizer.build(model.trainable_variables)
        trainable = [v.value for v in model.trainable_variables]
        state = [v.value for v in optimizer.variables]
        fixed = [v.value for v in model.non_trainable_variables]

        def loss(trainable, x, y):
            predictions, _ = model.stateless_call(trainable, fixed, x, training=True)
            return ops.mean(ops.square(predictions - y))

        @jax.jit
        def step(trainable, state, x, y):
            gradients = jax.grad(loss)(trainable, x, y)
            return optimizer.stateless_apply(state, gradients, trainable)

        x, y = data(20)
        for _ in range(3):
            for i in range(0, len(x), size):
                batch = x[i : i + size], y[i : i + size]
                trainable, state = step(trainable, state, *batch)
            if flush:
                trainable, state = jax.jit(optimizer.stateless_flush)(state, trainable)
        return before, [np.asarray(v) for v in trainable]

    before, reference = trained(adam(clipnorm=0.1), 8)  # 8, 8 and 4 examples
    _, ours = trained(GradientAccumulateOptimizer(adam(clipnorm=0.1), 4), 2, flush=True)
    assert_equal_weights(ours, reference, before)


@on_jax
@pytest.mark.parametrize("around", [False, True])
def test_the_compiled_program_updates_in_a_branch_only(around):
    """The optimizer's square roots are in a loop that runs once an update, or not.

    Keras's own accumulation computes them on every micro-batch.
    """
    import jax

    def entry_and_rest(optimizer):
        if around:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        variables = [keras.Variable(np.ones((64, 64), "float32"))]
        optimizer.build(variables)
        values = [v.value for v in variables]
        lowered = jax.jit(optimizer.stateless_apply).lower(
            [v.value for v in optimizer.variables], values, values
        )
        text = lowered.as_text()  # before XLA fuses operations
        inside, depth = [], None
        for line in text.splitlines():
            if depth is None and "stablehlo.while" in line:
                depth = 0
            if depth is not None:
                inside.append(line)
                depth += line.count("{") - line.count("}")
                if depth == 0 and len(inside) > 3 and "do" not in line:
                    depth = None
        outside = [line for line in text.splitlines() if line not in set(inside)]
        return sqrt(outside), sqrt(inside), text

    def sqrt(lines):
        return sum("stablehlo.sqrt" in line and "64x64" in line for line in lines)

    outside, inside, _ = entry_and_rest(GradientAccumulateOptimizer("adam", 4))
    assert (outside, inside) == (0, 1)
    if not around:
        own = keras.optimizers.Adam(gradient_accumulation_steps=4)
        outside, _, text = entry_and_rest(own)
        assert outside == 1 and "stablehlo.while" not in text
