"""Models that warn while they train, and the messages of their warnings."""

import warnings

import keras
from keras import layers

from gradient_accumulator import AccumulationWarning


def told(function):
    """The messages of our warnings while a function is called."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AccumulationWarning)
        function()
    return [
        str(each.message)
        for each in caught
        if issubclass(each.category, AccumulationWarning)
    ]


def normalized(layer, shape=(4,)):
    x = layers.Input(shape)
    h = layers.Conv2D(3, 3)(x) if len(shape) == 3 else layers.Dense(3)(x)
    model = keras.Model(x, layers.Dense(1)(layers.Flatten()(layer(h))), name="mine")
    model.compile("sgd", "mse")
    return model
