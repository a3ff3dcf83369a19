"""Masks: of embeddings, of layers, of labels that are ignored."""

from api import keras, layers, ops

from .data import (
    CLASSES,
    STEPS,
    classified_tokens,
    each_size,
    float_sequences,
    labelled,
    normal,
    random,
    tokens,
    weighted,
    weighted_rows,
)
from .losses import logits, slow
from .models import conv_to_image, dense_steps, mlp, of_tokens, pooled, seeded
from .optimizers import of_class
from .problem import PIECE, add, of_reduction, sgd


def ignoring(reduction="sum_over_batch_size"):
    return lambda: {
        "loss": keras.losses.SparseCategoricalCrossentropy(
            ignore_class=-1, from_logits=True, reduction=reduction
        )
    }


def ignored_labels(start=None, stop=None):
    """Labels of which about half are -1, and all from `start` to `stop`."""
    batches = []
    for x, y in labelled():
        y[random(len(y)).uniform(size=len(y)) < 0.5] = -1
        y[-1] = 1
        if stop is not None:
            y[start:stop] = -1
        batches.append((x, y))
    return batches


def ignored_tokens():
    def make(r, n):
        return tokens(r, n), r.integers(-1, CLASSES, (n, STEPS)).astype("int32")

    return each_size(make)


for _reduction in ("sum", "sum_over_batch_size", "mean_with_sample_weight"):
    add(
        f"ignore_class_{_reduction}",
        mlp(),
        ignored_labels,
        arguments=ignoring(_reduction),
        optimizer=slow if _reduction == "sum" else sgd,
        **of_reduction(_reduction, equal=False),
    )
add(
    "ignore_class_weighted",
    mlp(),
    lambda: weighted(ignored_labels()),
    arguments=ignoring(),
    optimizer_reduction=None,
)
add(
    "ignore_class_whole_piece",
    mlp(),
    lambda: ignored_labels(0, PIECE),
    arguments=ignoring(),
    optimizer_reduction=None,
)
for _reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
    add(
        f"ignore_class_and_mask_zero_{_reduction}",
        of_tokens(dense_steps(CLASSES)),
        lambda: weighted_rows(ignored_tokens()),
        arguments=ignoring(_reduction),
        **of_reduction(_reduction, equal=False),
    )
add(
    "ignore_class_of_images",
    conv_to_image(CLASSES),
    lambda: each_size(
        lambda r, n: (
            normal(r, n, 8, 8, 2),
            r.integers(-1, CLASSES, (n, 8, 8)).astype("int32"),
        )
    ),
    arguments=ignoring(),
    optimizer=of_class("SGD", learning_rate=2.0),
    optimizer_reduction=None,
)


@seeded
def masking():
    return keras.Sequential(
        [
            layers.Input((STEPS, 4)),
            layers.Masking(),
            layers.Dense(6, activation="tanh"),
            layers.Dense(2),
        ]
    )


add("masking_layer", masking, float_sequences, optimizer_reduction=None)
add("masking_layer_weighted", masking, lambda: weighted_rows(float_sequences()),
    optimizer_reduction=None)  # fmt: skip


class OwnMask(layers.Layer):
    """Computes a mask of its own, from the values that it gets."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, x):
        return x * 1.0

    def compute_mask(self, x, mask=None):
        return ops.any(x > 0.8, axis=-1)


@seeded
def own_mask():
    x = layers.Input((STEPS, 4))
    h = layers.Dense(6, activation="tanh")(x)
    return keras.Model(x, layers.Dense(2)(OwnMask()(h)))


add("mask_computed_from_activations", own_mask, float_sequences,
    optimizer_reduction=None)  # fmt: skip


add("mask_used_up_by_pooling", pooled(), classified_tokens, arguments=logits())
