"""Training loops of a user's own on every backend, compared with the batch."""

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND
from helpers.loops import adam, assert_equal_weights, tokens_and_labels
from keras import layers, ops

from gradient_accumulator import GradientAccumulateOptimizer, accumulated_value_and_grad

# --------------------------------------------- a GAN: two optimizers, one `train_step`


class GAN(keras.Model):
    """A model with its own `train_step`.

    With the function, the generator is trained on the batch after the discriminator
    has been updated on it. Optimizers that accumulate update in one call each, so
    that both gradients come before both updates.

    Args:
        microbatch_size: Number of examples in a micro-batch of the function; None if
            the optimizers accumulate, or nothing does.
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
        return {"loss": ops.zeros(())}  # Keras on TensorFlow requires a log

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
    """On JAX a training step is a function of the state of two networks."""

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


# ------------------------------- on all backends: the user gives a micro-batch's weight


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
