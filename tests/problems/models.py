"""Small models that several topics share."""

import numpy as np
from api import KERAS_2, keras, layers

from .data import CLASSES, FEATURES, TOKENS


def seeded(build):
    """A builder whose models have equal weights at every call."""

    def build_seeded():
        keras.utils.set_random_seed(7)
        return build()

    return build_seeded


def mlp(outputs=CLASSES, activation=None, **arguments):
    """A model of two dense layers with tanh. `arguments` are for the first layer."""

    @seeded
    def build():
        x = layers.Input((FEATURES,))
        hidden = layers.Dense(8, activation="tanh", name="hidden", **arguments)(x)
        y = layers.Dense(outputs, activation=activation, name="head")(hidden)
        return keras.Model(x, y)

    return build


def classifier():
    return mlp(activation="softmax")()


def of_tokens(*body, mask_zero=True, width=5):
    """An embedding, followed by the layers that the functions in `body` make."""

    @seeded
    def build():
        x = layers.Input((None,), dtype="int32")
        h = layers.Embedding(
            TOKENS, width, mask_zero=mask_zero, embeddings_initializer="glorot_uniform"
        )(x)
        for make in body:
            h = make()(h)
        return keras.Model(x, h)

    return build


def dense_steps(outputs=2, activation=None):
    return lambda: layers.Dense(outputs, activation=activation)


tagger = of_tokens(lambda: layers.Dense(6, activation="tanh"), dense_steps())


class Written(keras.Model):
    """A subclassed model. `__init__` makes the layers, and the first call builds it."""

    def __init__(self, outputs=CLASSES, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(8, activation="tanh")
        self.head = layers.Dense(outputs)

    def call(self, x):
        return self.head(self.hidden(x))

    def build_layers(self, shape):
        if not KERAS_2:  # Keras 2 calls the model to build it
            super().build(shape)
        self.hidden.build(shape)
        self.head.build((None, 8))


def written(cls, shape=(1, FEATURES)):
    @seeded
    def build():
        model = cls()
        model(np.zeros(shape, "float32"))
        return model

    return build


def pooled(outputs=CLASSES):
    return of_tokens(
        lambda: layers.GlobalAveragePooling1D(), lambda: layers.Dense(outputs)
    )


def conv_to_image(outputs=1, **arguments):
    @seeded
    def build():
        x = layers.Input((8, 8, 2))
        h = layers.Conv2D(4, 3, padding="same", activation="tanh")(x)
        return keras.Model(x, layers.Conv2D(outputs, 1, activation="sigmoid")(h))

    return build
