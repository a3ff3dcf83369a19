"""A small 3D U-Net, compiled for training, and the metric of its predictions."""

from __future__ import annotations

import keras
from keras import layers, ops

from gradient_accumulator_cli.demo.data import CLASSES


def build_unet(filters: int = 8) -> keras.Model:
    """Returns a model of three levels with two convolutions each, for any volume.

    It has neither dropout nor batch normalization: equal batches give equal gradients,
    so that two runs differ only by rounding or by a wrong mean.
    """
    inputs = layers.Input((None, None, None, 1))
    fine = _convolve(inputs, filters)
    middle = _convolve(layers.MaxPooling3D()(fine), 2 * filters)
    coarse = _convolve(layers.MaxPooling3D()(middle), 4 * filters)
    x = layers.Concatenate()([layers.UpSampling3D()(coarse), middle])
    x = _convolve(x, 2 * filters)
    x = layers.Concatenate()([layers.UpSampling3D()(x), fine])
    x = _convolve(x, filters)
    return keras.Model(inputs, layers.Conv3D(len(CLASSES), 1)(x), name="unet")


def _convolve(x: keras.KerasTensor, filters: int) -> keras.KerasTensor:
    for _ in range(2):
        x = layers.Conv3D(
            filters,
            3,
            padding="same",
            activation="swish",
            kernel_initializer="he_normal",
        )(x)
    return x


def compiled_unet(steps: int | None, updates: int) -> keras.Model:
    """Returns the model, compiled for training.

    Args:
        steps: Keras's `gradient_accumulation_steps`.
        updates: The number of updates, which is not used: there is no schedule.
    """
    model = build_unet()
    model.compile(
        # With Adam's usual epsilon, weights whose gradient is about 0 take full steps
        # in a direction that rounding decides.
        keras.optimizers.Adam(3e-3, epsilon=1e-4, gradient_accumulation_steps=steps),
        # The mean over voxels of the brain, of which patches have different numbers.
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[Dice()],
    )
    return model


class Dice(keras.metrics.Metric):
    """Mean Dice score of grey and white matter, 2 |A and B| / (|A| + |B|)."""

    def __init__(self, name: str = "dice") -> None:
        super().__init__(name=name)
        shape = (len(CLASSES),)
        self.both = self.add_variable(shape, "zeros", name="both")
        self.either = self.add_variable(shape, "zeros", name="either")

    def update_state(self, y_true, y_pred, sample_weight=None):
        truth = ops.one_hot(ops.cast(y_true, "int32"), len(CLASSES))
        found = ops.one_hot(ops.argmax(y_pred, axis=-1), len(CLASSES))
        if sample_weight is not None:
            weight = ops.expand_dims(ops.cast(sample_weight, truth.dtype), -1)
            truth, found = truth * weight, found * weight
        voxels = tuple(range(len(truth.shape) - 1))
        # With weights of 0 and 1, min(truth, found) is their product.
        both = ops.sum(ops.minimum(truth, found), axis=voxels)
        either = ops.sum(truth + found, axis=voxels)
        self.both.assign_add(both)
        self.either.assign_add(either)

    def result(self):
        scores = 2 * self.both / ops.maximum(self.either, 1)
        return ops.mean(scores[1:])  # class 0 is background
