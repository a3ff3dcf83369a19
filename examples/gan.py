"""A GAN whose two optimizers accumulate, with Keras's `fit`, on any of the backends.

    KERAS_BACKEND=jax python examples/gan.py

The model has its own `train_step` and its own optimizers. `FlushGradients` gets both
optimizers, so that an epoch's last micro-batches make an update of their own.
"""

import keras
import numpy as np
from keras import layers, ops

from gradient_accumulator import FlushGradients, GradientAccumulateOptimizer

BACKEND = keras.backend.backend()


class Networks(keras.Model):
    """A generator and a discriminator, each with its loss and its optimizer."""

    def __init__(self, generator, discriminator, g_optimizer, d_optimizer):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.g_optimizer, self.d_optimizer = g_optimizer, d_optimizer
        g_optimizer.build(generator.trainable_variables)
        d_optimizer.build(discriminator.trainable_variables)
        self.built = True

    def g_loss(self, real, noise):
        return ops.mean(ops.softplus(-self.discriminator(self.generator(noise))))

    def d_loss(self, real, noise):
        fake = self.discriminator(self.generator(noise))
        return ops.mean(ops.softplus(-self.discriminator(real)) + ops.softplus(fake))


class TensorFlowGAN(Networks):
    def train_step(self, data):
        import tensorflow as tf

        batch, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        g_variables = self.generator.trainable_variables
        d_variables = self.discriminator.trainable_variables
        with tf.GradientTape(persistent=True) as tape:
            g_loss, d_loss = self.g_loss(*batch), self.d_loss(*batch)
        g_gradients = tape.gradient(g_loss, g_variables)
        d_gradients = tape.gradient(d_loss, d_variables)
        self.g_optimizer.apply(g_gradients, g_variables)
        self.d_optimizer.apply(d_gradients, d_variables)
        return {"g_loss": g_loss, "d_loss": d_loss}


class TorchGAN(Networks):
    def train_step(self, data):
        import torch

        batch, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        g_variables = self.generator.trainable_variables
        d_variables = self.discriminator.trainable_variables
        g_loss, d_loss = self.g_loss(*batch), self.d_loss(*batch)
        g_gradients = torch.autograd.grad(g_loss, [v.value for v in g_variables])
        d_gradients = torch.autograd.grad(d_loss, [v.value for v in d_variables])
        with torch.no_grad():
            self.g_optimizer.apply(g_gradients, g_variables)
            self.d_optimizer.apply(d_gradients, d_variables)
        return {"g_loss": g_loss, "d_loss": d_loss}


class JAXGAN(Networks):
    """On JAX `train_step` gets the state from `fit`, and returns the new state."""

    @property
    def non_trainable_variables(self):
        optimizers = [*self.g_optimizer.variables, *self.d_optimizer.variables]
        return [*super().non_trainable_variables, *optimizers]

    def train_step(self, state, data):
        batch, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        trainable, others, compiled, metrics = state
        state = [
            *zip(self.trainable_variables, trainable),
            *zip(self.non_trainable_variables, others),
        ]
        g_variables = self.generator.trainable_variables
        d_variables = self.discriminator.trainable_variables
        g_loss, g_gradients = differentiated(self.g_loss, g_variables, state, batch)
        d_loss, d_gradients = differentiated(self.d_loss, d_variables, state, batch)
        with keras.StatelessScope(state_mapping=state) as scope:
            self.g_optimizer.apply(g_gradients, g_variables)
            self.d_optimizer.apply(d_gradients, d_variables)
        trainable, others = (
            [scope.get_current_value(v) for v in variables]
            for variables in (self.trainable_variables, self.non_trainable_variables)
        )
        logs = {"g_loss": g_loss, "d_loss": d_loss}
        return logs, (trainable, others, compiled, metrics)


def differentiated(loss, variables, state, batch):
    """Returns a loss and its gradients on JAX, where `state` has variables' values."""
    import jax

    def value(values):
        with keras.StatelessScope(state_mapping=[*state, *zip(variables, values)]):
            return loss(*batch)

    values = {id(variable): value for variable, value in state}
    return jax.value_and_grad(value)([values[id(v)] for v in variables])


GAN = {"tensorflow": TensorFlowGAN, "jax": JAXGAN, "torch": TorchGAN}[BACKEND]


def networks():
    generator = keras.Sequential(
        [layers.Input((4,)), layers.Dense(8, activation="tanh"), layers.Dense(2)]
    )
    discriminator = keras.Sequential(
        [layers.Input((2,)), layers.Dense(8, activation="tanh"), layers.Dense(1)]
    )
    return generator, discriminator


def main():
    r = np.random.default_rng(0)
    angles = r.uniform(0, 2 * np.pi, 992)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype("float32")
    noise = r.normal(size=(992, 4)).astype("float32")

    g_optimizer = GradientAccumulateOptimizer("adam", accum_steps=4)
    d_optimizer = GradientAccumulateOptimizer("adam", accum_steps=4)
    gan = GAN(*networks(), g_optimizer, d_optimizer)
    gan.compile()
    # An update takes 64 examples, 16 at a time; the last of an epoch takes 32.
    flush = FlushGradients(g_optimizer, d_optimizer)
    gan.fit((circle, noise), batch_size=16, epochs=5, callbacks=[flush], verbose=2)


if __name__ == "__main__":
    main()
