"""Masks of embeddings, of layers, and of ignored labels."""

from api import keras, layers, ops

from gradient_accumulator.compat import internals

from .data import (
    CLASSES,
    FEATURES,
    STEPS,
    TOKENS,
    classified_tokens,
    each_size,
    float_sequences,
    labelled,
    normal,
    random,
    token_sequences,
    tokens,
    vectors,
    weighted,
    weighted_rows,
)
from .losses import logits
from .models import conv_to_image, dense_steps, mlp, of_tokens, pooled, seeded
from .optimizers import of_class
from .problem import MICROBATCH, add
from .reductions import of_reduction


def ignoring(reduction="sum_over_batch_size"):
    return lambda: {
        "loss": keras.losses.SparseCategoricalCrossentropy(
            ignore_class=-1, from_logits=True, reduction=reduction
        )
    }


def ignored_labels(start=None, stop=None):
    """Labels, about half of which are -1, and all of them from `start` to `stop`."""
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


for _reduction, _fields in (
    ("sum", {}),
    ("sum_over_batch_size", {}),
    ("mean_with_sample_weight", {"core": ("accum_steps",)}),
):
    add(
        f"ignore_class_{_reduction}",
        mlp(),
        ignored_labels,
        arguments=ignoring(_reduction),
        **of_reduction(_reduction, masked=True),
        **_fields,
    )
add(
    "ignore_class_weighted",
    mlp(),
    lambda: weighted(ignored_labels()),
    arguments=ignoring(),
    optimizer_reduction=None,
)
add(
    "ignore_class_whole_microbatch",
    mlp(),
    lambda: ignored_labels(0, MICROBATCH),
    arguments=ignoring(),
    optimizer_reduction=None,
)
for _reduction, _fields in (
    ("sum_over_batch_size", {}),
    ("mean_with_sample_weight", {"core": ("microbatch_size",)}),
):
    add(
        f"ignore_class_and_mask_zero_{_reduction}",
        of_tokens(dense_steps(CLASSES)),
        lambda: weighted_rows(ignored_tokens()),
        arguments=ignoring(_reduction),
        **of_reduction(_reduction, masked=True),
        **_fields,
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
    """A layer that computes its own mask from its inputs."""

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
    optimizer_reduction=None, core=("accum_steps",))  # fmt: skip


add("mask_used_up_by_pooling", pooled(), classified_tokens, arguments=logits())


@seeded
def kept_by_an_operation():
    """An operation that returns its input, which on PyTorch still has its mask."""
    x = layers.Input((STEPS,), dtype="int32")
    h = layers.Embedding(TOKENS, 4, mask_zero=True)(x)
    return keras.Model(x, ops.cast(layers.Dense(2)(h), "float32"))


@seeded
def of_two_inputs():
    """A model whose inputs are not in the order of their names, which sort the data."""
    a = layers.Input((STEPS,), dtype="int32", name="y")
    b = layers.Input((STEPS,), dtype="int32", name="x")
    outputs = [
        layers.Dense(2, name=name)(layers.Embedding(TOKENS, 4, mask_zero=True)(tokens))
        for name, tokens in (("first", a), ("second", b))
    ]
    return keras.Model([a, b], outputs)


def two_named_inputs():
    def make(r, n):
        x = {"x": tokens(r, n), "y": tokens(r, n)}
        return x, (normal(r, n, STEPS, 2), normal(r, n, STEPS, 2))

    return each_size(make)


add(
    "mask_kept_by_an_operation",
    kept_by_an_operation,
    token_sequences,
    keras2=None,  # functional models of Keras 2 have no operations
    optimizer_reduction=None,
)
add(
    "mask_of_each_input",
    of_two_inputs,
    two_named_inputs,
    arguments=lambda: {"loss": ["mse", "mse"]},
    keras2=None,  # Keras 2 takes dictionaries only for dictionaries of inputs
    optimizer_reduction=None,
)
add(
    "mask_and_regularizers",
    of_tokens(
        lambda: layers.Dense(
            6, "tanh", kernel_regularizer="l2", activity_regularizer="l2"
        ),
        dense_steps(),
    ),
    token_sequences,
    optimizer_reduction=None,
)


@seeded
def two_heads():
    x = layers.Input((FEATURES,))
    h = layers.Dense(8, activation="tanh")(x)
    return keras.Model(x, [layers.Dense(CLASSES, name=name)(h) for name in "ab"])


class Squares(keras.losses.Loss):
    """A user's loss that ignores targets by its own mask."""

    def call(self, y_true, y_pred):
        values = ops.mean(ops.square(y_true - y_pred), axis=-1)
        internals.set_mask(values, ops.any(y_pred > 0.5, axis=-1))
        return values


_BY_PREDICTIONS = {
    "arguments": lambda: {"loss": Squares()},
    "keras2": None,
    "optimizer_reduction": None,
}
add("mask_by_a_loss_of_predictions", mlp(), vectors, **_BY_PREDICTIONS)
add(
    "mask_by_losses_of_predictions",
    two_heads,
    lambda: [(x, (y, y)) for x, y in vectors()],
    **_BY_PREDICTIONS,
)
