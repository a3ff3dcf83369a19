"""Training loops of one's own: what users write, against the batch and peers."""

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND, array, assert_close
from keras import layers, ops
from versions import OPTAX, unless_plain_fails

from gradient_accumulator import (
    GradientAccumulateOptimizer,
    accumulated_value_and_grad,
)

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="a TensorFlow loop")
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="a JAX loop")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="a PyTorch loop")
PAD = 0


def data(count=24):
    r = np.random.default_rng(0)
    x = problems.normal(r, count, problems.FEATURES)
    return x, np.tanh(x[:, :3] + problems.normal(r, count, 3))


def assert_equal_weights(ours, reference, before, tolerance=1e-5):
    for a, b, start in zip(ours, reference, before):
        moved = np.abs(b - start).max()
        assert moved > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * moved + 1e-7)


# --------------------------------------------- a GAN: two optimizers, one `train_step`


class GAN(keras.Model):
    """Its `train_step` is its own.

    Args:
        microbatch_size: Number of examples in a micro-batch, to accumulate as a
            function; None if the optimizers do, or nothing.

    With a function the generator is trained against the discriminator that has just
    been updated, on the same batch. Optimizers that accumulate update in a call
    of their own, so that there both gradients come before both updates.
    """

    def __init__(self, microbatch_size=None):
        super().__init__()
        keras.utils.set_random_seed(3)
        self.microbatch_size = microbatch_size
        self.generator = keras.Sequential(
            [layers.Input((4,)), layers.Dense(8, activation="tanh"), layers.Dense(6)]
        )
        self.discriminator = keras.Sequential(
            [layers.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(1)]
        )
        self.built = True

    def compile(self, of_discriminator, of_generator, in_turns=False):
        super().compile(run_eagerly=False)
        self.in_turns = in_turns
        self.of_discriminator, self.of_generator = of_discriminator, of_generator
        of_discriminator.build(self.discriminator.trainable_variables)
        of_generator.build(self.generator.trainable_variables)

    def discriminator_loss(self, microbatch):
        real, noise = microbatch
        fake_score = self.discriminator(self.generator(noise))
        real_score = self.discriminator(real)
        return ops.mean(ops.softplus(-real_score)) + ops.mean(ops.softplus(fake_score))

    def generator_loss(self, microbatch):
        _, noise = microbatch
        return ops.mean(ops.softplus(-self.discriminator(self.generator(noise))))

    def train_step(self, data):
        batch = data[0]
        of_discriminator = self.gradients(
            self.discriminator_loss, self.discriminator, batch
        )
        if self.in_turns:
            self.apply(self.of_discriminator, of_discriminator, self.discriminator)
        of_generator = self.gradients(self.generator_loss, self.generator, batch)
        if not self.in_turns:
            self.apply(self.of_discriminator, of_discriminator, self.discriminator)
        self.apply(self.of_generator, of_generator, self.generator)
        return {"loss": ops.zeros(())}  # Keras on TensorFlow wants something

    def gradients(self, loss, network, batch):
        variables = network.trainable_variables
        if self.microbatch_size is not None:
            return accumulated_value_and_grad(
                loss, microbatch_size=self.microbatch_size
            )(variables, batch)[1]
        if BACKEND == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                value = loss(batch)
            return tape.gradient(value, variables)
        import torch

        return torch.autograd.grad(loss(batch), [v.value for v in variables])

    def apply(self, optimizer, gradients, network):
        if BACKEND == "torch":
            import torch

            with torch.no_grad():
                optimizer.apply(gradients, network.trainable_variables)
        else:
            optimizer.apply(gradients, network.trainable_variables)


class JAXGAN(GAN):
    """On JAX a training step is a function of the state, two networks' here."""

    def parts(self):
        return (
            (self.discriminator, self.discriminator_loss, self.of_discriminator),
            (self.generator, self.generator_loss, self.of_generator),
        )

    def fit(self, batches, epochs, **_):
        import jax

        state = [
            ([v.value for v in n.trainable_variables], [v.value for v in o.variables])
            for n, _, o in self.parts()
        ]
        step = jax.jit(self.step)
        for _ in range(epochs):
            for batch in batches:
                state = step(state, batch)
        for (network, _, _), (trainable, _) in zip(self.parts(), state):
            for variable, value in zip(network.trainable_variables, trainable):
                variable.assign(value)

    def step(self, state, batch):
        state = list(state)
        gradients = [None, None]
        for i, (_, _, optimizer) in enumerate(self.parts()):
            gradients[i] = self.jax_gradients(i, state, batch)
            if self.in_turns:
                state[i] = self.applied(optimizer, state[i], gradients[i])
        if not self.in_turns:
            for i, (_, _, optimizer) in enumerate(self.parts()):
                state[i] = self.applied(optimizer, state[i], gradients[i])
        return state

    def jax_gradients(self, i, state, batch):
        import jax

        parts = self.parts()
        (network, loss, _), (other, _, _) = parts[i], parts[1 - i]

        def value(trainable, microbatch):
            mapping = [
                *zip(network.trainable_variables, trainable),
                *zip(other.trainable_variables, state[1 - i][0]),
            ]
            with keras.StatelessScope(state_mapping=mapping):
                return loss(microbatch)

        if self.microbatch_size is None:
            return jax.grad(value)(state[i][0], batch)
        function = accumulated_value_and_grad(
            value, microbatch_size=self.microbatch_size
        )
        return function(state[i][0], batch)[1]

    def applied(self, optimizer, state, gradients):
        return optimizer.stateless_apply(state[1], gradients, state[0])


def trained_gan(optimizer, size, in_turns, microbatch_size=None):
    r = np.random.default_rng(0)
    real, noise = problems.normal(r, 24, 6), problems.normal(r, 24, 4)
    gan = (JAXGAN if BACKEND == "jax" else GAN)(microbatch_size)
    before = [np.array(w) for w in gan.get_weights()]
    gan.compile(optimizer(), optimizer(), in_turns=in_turns)
    arguments = {"batch_size": size, "shuffle": False, "verbose": 0}
    batches = (real, noise)
    if BACKEND == "jax":
        batches = [
            (real[i : i + size], noise[i : i + size]) for i in range(0, 24, size)
        ]
    gan.fit(batches, epochs=3, **arguments)
    return before, gan.get_weights()


def adam(**settings):
    return keras.optimizers.Adam(0.05, epsilon=1e-2, **settings)


def test_a_gan_with_two_optimizers_that_accumulate():
    plain = lambda: adam(global_clipnorm=0.3)  # noqa: E731
    before, reference = trained_gan(plain, 12, in_turns=False)
    _, ours = trained_gan(
        lambda: GradientAccumulateOptimizer(plain(), 3), 4, in_turns=False
    )
    assert_equal_weights(ours, reference, before)


@pytest.mark.core
def test_a_gan_with_the_function():
    before, reference = trained_gan(adam, 12, in_turns=True)
    _, ours = trained_gan(adam, 12, in_turns=True, microbatch_size=5)
    assert_equal_weights(ours, reference, before)


# ------------------------------------------------------- a `tf.GradientTape` loop


@on_tensorflow
@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.core
def test_a_tape_in_a_tf_function(jit_compile):
    import tensorflow as tf

    def trained(optimizer, size):
        model = problems.mlp()()
        variables = model.trainable_variables
        before = model.get_weights()
        optimizer.build(variables)

        @tf.function(jit_compile=jit_compile)
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

        x, y = data()
        for _ in range(3):
            for i in range(0, len(x), size):
                step(x[i : i + size], y[i : i + size])
        return before, model.get_weights()

    before, reference = trained(adam(clipnorm=0.1), 8)
    _, ours = trained(GradientAccumulateOptimizer(adam(clipnorm=0.1), 4), 2)
    assert_equal_weights(ours, reference, before)


@on_tensorflow
@pytest.mark.core
def test_flush_in_a_tf_function():
    import tensorflow as tf

    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 3)
    weight = keras.Variable(np.ones(2, "float32"))
    optimizer.build([weight])

    @tf.function
    def epoch(count):
        for _ in tf.range(count):
            optimizer.apply([tf.ones(2)], [weight])
        optimizer.flush()

    epoch(tf.constant(4))
    assert_close({"w": array(weight)}, {"w": np.full(2, -1.0)})
    assert optimizer.pending == 0


# ------------------------------------------------------------------ a `jax.jit` loop


def tokens_and_labels():
    """Sequences of different lengths: micro-batches differ in what they are worth."""
    r = np.random.default_rng(0)
    tokens = problems.tokens(r, 12)
    labels = r.normal(size=(12, problems.STEPS)).astype("float32")
    return tokens, labels, (tokens != PAD).astype("float32")


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
        if weighted:  # every micro-batch counts as much as any, whatever its tokens
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
    """The optimizer's square roots are in the loop that runs once an update, or never;
    Keras's own accumulation computes them on every micro-batch."""
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
        text = lowered.as_text()  # before XLA fuses anything
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


# ------------------------------------------------------------------- a PyTorch loop


def torch_model():
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(problems.TOKENS, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    )


def torch_sum(model, microbatch):
    tokens, labels, mask = microbatch
    errors = (model(tokens)[..., 0] - labels) ** 2
    return (errors * mask).sum(), mask.sum()


def torch_batch():
    import torch

    tokens, labels, mask = tokens_and_labels()
    return torch.tensor(tokens).long(), torch.tensor(labels), torch.tensor(mask)


@on_torch
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_beside_accelerate(weighted):
    import accelerate
    import torch

    batch = torch_batch()
    if not weighted:
        batch = (batch[0], batch[1], torch.ones_like(batch[2]))
    microbatches = [tuple(a[i : i + 4] for a in batch) for i in (0, 4, 8)]

    def mean(model, microbatch):
        numerator, denominator = torch_sum(model, microbatch)
        return numerator / denominator

    def trained(run):
        model = torch_model()
        before = [p.detach().clone().numpy() for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-2)
        for _ in range(3):
            run(model, optimizer)
        return before, [p.detach().numpy() for p in model.parameters()]

    def full(model, optimizer):
        optimizer.zero_grad()
        mean(model, batch).backward()
        optimizer.step()

    def ours(model, optimizer):
        loss = torch_sum if weighted else mean
        function = accumulated_value_and_grad(
            lambda microbatch: loss(model, microbatch), microbatch_size=4
        )
        parameters = list(model.parameters())
        _, gradients = function(parameters, batch)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        optimizer.step()

    accelerator = accelerate.Accelerator(gradient_accumulation_steps=3, cpu=True)

    def accelerated(model, optimizer):
        optimizer = accelerator.prepare(optimizer)
        for microbatch in microbatches:
            with accelerator.accumulate(model):
                accelerator.backward(mean(model, microbatch))
                optimizer.step()
                optimizer.zero_grad()

    before, reference = trained(full)
    _, got = trained(ours)
    assert_equal_weights(got, reference, before)
    _, peer = trained(accelerated)
    if (
        weighted
    ):  # every micro-batch counts as much as any, whatever its number of tokens
        with pytest.raises(AssertionError):
            assert_equal_weights(peer, reference, before, tolerance=1e-2)
    else:
        assert_equal_weights(peer, reference, before)


# --------------------------------------- on all backends: what a micro-batch is worth,
# told


def test_weights_of_tokens_make_a_custom_loop_exact():
    x, y, mask = tokens_and_labels()
    batch = tuple(ops.convert_to_tensor(a) for a in (x, y, mask))
    microbatches = [tuple(a[i : i + 4] for a in batch) for i in (0, 4, 8)]

    def trained(optimizer, batches, weigh):
        model = problems.of_tokens(problems.dense_steps(1), mask_zero=False)()
        variables = model.trainable_variables
        before = model.get_weights()
        optimizer.build(variables)
        fixed = [v.value for v in model.non_trainable_variables]

        def loss(microbatch, predictions):
            _, labels, mask = microbatch
            errors = ops.square(predictions[..., 0] - labels)
            return ops.sum(errors * mask), ops.sum(mask)

        if BACKEND == "jax":

            def loss_fn(values, microbatch):
                return loss(
                    microbatch, model.stateless_call(values, fixed, microbatch[0])[0]
                )

        else:

            def loss_fn(microbatch):
                return loss(microbatch, model(microbatch[0]))

        gradients_of = accumulated_value_and_grad(loss_fn, microbatch_size=12)
        for _ in range(3):
            for microbatch in batches:
                values = [v.value for v in variables] if BACKEND == "jax" else variables
                _, gradients = gradients_of(values, microbatch)
                weight = {"weight": ops.sum(microbatch[2])} if weigh else {}
                if BACKEND == "torch":
                    import torch

                    with torch.no_grad():
                        optimizer.apply(gradients, variables, **weight)
                else:
                    optimizer.apply(gradients, variables, **weight)
        return before, model.get_weights()

    before, reference = trained(adam(clipnorm=0.1), [batch], weigh=False)
    wrapped = GradientAccumulateOptimizer(adam(clipnorm=0.1), 3)
    _, ours = trained(wrapped, microbatches, weigh=True)
    assert_equal_weights(ours, reference, before)
    assert wrapped.pending == 0
