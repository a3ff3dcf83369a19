"""Variables: frozen, shared, sparse, without a gradient, or in half precision."""

import numpy as np
from api import keras, layers, ops

from .data import (
    CLASSES,
    FEATURES,
    STEPS,
    TOKENS,
    classified_tokens,
    each_size,
    empty_rows,
    normal,
    tokens,
    vectors,
    weighted,
)
from .losses import logits
from .models import Written, dense_steps, mlp, of_tokens, seeded, written
from .optimizers import OPTIMIZERS, SETTINGS, loss_scaled, of_class
from .problem import MICROBATCH, add, sgd
from .reductions import squared


def frozen(name):
    @seeded
    def build():
        model = mlp()()
        model.get_layer(name).trainable = False
        return model

    return build


def set_trainable(name, value):
    def stage(model):
        model.get_layer(name).trainable = value

    return stage


add("frozen_layer", frozen("hidden"), vectors)
add(
    "unfrozen_between_two_fits",
    frozen("hidden"),
    vectors,
    stages=(None, set_trainable("hidden", True)),
    core=("microbatch_size",),
)
add(
    "frozen_between_two_fits",
    mlp(),
    vectors,
    stages=(None, set_trainable("head", False)),
    core=("accum_steps", "optimizer"),
)


@seeded
def shared_layer():
    a, b = layers.Input((FEATURES,)), layers.Input((FEATURES,))
    encode = layers.Dense(5, activation="tanh")
    h = layers.Concatenate()([encode(a), encode(b)])
    return keras.Model([a, b], layers.Dense(1)(h))


add(
    "shared_layer",
    shared_layer,
    lambda: each_size(
        lambda r, n: (
            (normal(r, n, FEATURES), normal(r, n, FEATURES)),
            normal(r, n, 1),
        )
    ),
)

flat_tokens = of_tokens(
    lambda: layers.GlobalAveragePooling1D(), dense_steps(CLASSES), mask_zero=False
)
for _name, _fields in {
    "sgd_momentum": {"core": ("optimizer",), "agc": True},
    "adam": {"core": ("microbatch_size",)},
    "adagrad": {},
    "rmsprop": {},
}.items():
    add(
        f"embedding_{_name}",
        flat_tokens,
        classified_tokens,
        arguments=logits(),
        optimizer=OPTIMIZERS[_name],
        repeated_rows=True,
        **_fields,
    )
for _name, _fields in {
    "clipnorm": {},
    "global_clipnorm": {"core": ("accum_steps",)},
    "clipvalue": {},
}.items():
    add(
        f"embedding_{_name}",
        flat_tokens,
        classified_tokens,
        arguments=logits(),
        optimizer=lambda _name=_name, **overrides: sgd(**SETTINGS[_name], **overrides),
        repeated_rows=True,
        **_fields,
    )


class TiedEmbedding(keras.Model):
    """A model in which the embedding's table is also the last layer's kernel."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(
            TOKENS, 5, embeddings_initializer="glorot_uniform"
        )

    def call(self, x):
        return ops.matmul(self.table(x), ops.transpose(self.table.embeddings))


add(
    "embedding_tied_to_the_head",
    written(TiedEmbedding, (1, STEPS)),
    lambda: each_size(lambda r, n: (tokens(r, n), tokens(r, n))),
    arguments=lambda: {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    },
    repeated_rows=True,
    core=("accum_steps",),
)


class TokensThatAre(layers.Layer):
    """A layer that adds up the embeddings of tokens that are not 0.

    It looks up no others, so that the number of slices depends on the data.
    """

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(TOKENS, CLASSES)

    def call(self, x):
        import tensorflow as tf

        places = tf.where(x > 0)
        found = self.table(tf.gather_nd(x, places))
        return tf.math.unsorted_segment_sum(found, places[:, 0], tf.shape(x)[0])

    def compute_output_shape(self, shape):
        return shape[0], CLASSES


@seeded
def tokens_that_are():
    x = layers.Input((STEPS,), dtype="int32")
    return keras.Model(x, TokensThatAre()(x))


add(
    "embedding_of_ever_more_tokens",
    tokens_that_are,
    lambda: empty_rows(classified_tokens(), 0, 4),
    arguments=logits(),
    optimizer=OPTIMIZERS["adam"],
    backends=("tensorflow",),
    because="the others have no sparse gradients",
    repeated_rows=True,
)


class UnusedWeight(Written):
    """A layer with a variable on which no loss depends."""

    def build(self, shape):
        self.build_layers(shape)
        self.unused = self.add_weight(shape=(3,), initializer="ones", name="unused")


add(
    "gradient_none_on_all_microbatches",
    written(UnusedWeight),
    vectors,
    optimizer=lambda **overrides: sgd(weight_decay=0.1, **overrides),
    core=("accum_steps", "optimizer"),
)


class Gated(Written):
    """A model with a branch that runs only if an example of the batch needs it."""

    def build(self, shape):
        self.build_layers(shape)
        self.branch = layers.Dense(CLASSES)
        self.branch.build(shape)

    def call(self, x):
        y = super().call(x)
        needed = x[:, :1] > 0
        if bool(ops.any(needed)):
            y = y + self.branch(x) * ops.cast(needed, "float32")
        return y


def gated_batches(none_needed=False):
    """Batches in which only examples of the second micro-batch need the branch."""
    batches = vectors()
    for x, _ in batches:
        x[:, 0] = -np.abs(x[:, 0])
        x[MICROBATCH : MICROBATCH + 2, 0] *= -1
    if none_needed:
        batches[1][0][:, 0] = -np.abs(batches[1][0][:, 0])
    return batches


EAGER = {
    "arguments": lambda: {"loss": "mse", "run_eagerly": True},
    "backends": ("tensorflow", "torch"),
    "because": "JAX traces: a branch cannot depend on the data there",
    # A variable has a gradient in one update and none in the next.
    "plain_replicas": False,
}
add("gradient_none_on_some_microbatches", written(Gated), gated_batches, **EAGER,
    devices=("torch",), core=("microbatch_size",))  # fmt: skip
add(
    "gradient_none_on_all_microbatches_of_one_update",
    written(Gated),
    lambda: gated_batches(none_needed=True),
    **EAGER,
)


class CountsExamples(layers.Layer):
    """A layer that keeps the number of all examples that it has seen."""

    def build(self, shape):
        self.seen = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="seen"
        )

    def call(self, x, training=False):
        if training:
            self.seen.assign_add(ops.sum(ops.ones_like(x[:, 0])))
        return x


@seeded
def counting():
    x = layers.Input((FEATURES,))
    h = CountsExamples()(layers.Dense(8, activation="tanh")(x))
    return keras.Model(x, layers.Dense(CLASSES)(h))


add(
    "state_travels_from_microbatch_to_microbatch",
    counting,
    vectors,
    per_process=True,
    core=("microbatch_size",),
)


@seeded
def float8():
    model = keras.Sequential(
        [
            layers.Input((16,)),
            # A float8 layer rounds its bias, and so the bias's gradient, to bfloat16.
            layers.Dense(16, activation="tanh", use_bias=False),
            layers.Dense(16, use_bias=False),
        ]
    )
    for layer in model.layers:
        layer.quantize("float8")
    return model


add(
    "float8_overwrite_with_gradient",
    float8,
    lambda: each_size(lambda r, n: (normal(r, n, 16), normal(r, n, 16))),
    keras2=None,
    # Rounding depends on the size of the micro-batch's own gradients.
    optimizer_reduction=None,
    devices=("jax", "torch"),
    core=("accum_steps",),
)


def of_policy(policy):
    """A model whose numbers and sums are exact in half precision."""

    @seeded
    def build():
        layer = layers.Dense(2, use_bias=False, dtype=policy)
        model = keras.Sequential([layers.Input((4,)), layer])
        layer.kernel.assign([[1, -1], [0.5, 0], [0, 1], [-1, 0.5]])
        return model

    return build


class Product(keras.losses.Loss):
    """A loss that is linear in the prediction, so that its gradient is the target."""

    def call(self, y_true, y_pred):
        return ops.sum(y_true * y_pred, axis=-1)


def small_integers():
    def make(r, n):
        return (
            r.integers(-1, 2, (n, 4)).astype("float32"),
            r.integers(-1, 2, (n, 2)).astype("float32"),
        )

    return each_size(make, sizes=(16, 8))


def add_policy(policy, optimizer, **fields):
    add(
        f"policy_{policy}",
        of_policy(policy),
        small_integers,
        arguments=lambda: {"loss": Product()},
        optimizer=optimizer,
        rounds_loss=True,
        **fields,
    )


add_policy("bfloat16", of_class("SGD", learning_rate=0.5), core=("accum_steps",))
add_policy(
    "mixed_bfloat16",
    of_class("SGD", learning_rate=0.5),
    devices=("jax", "torch"),
    thirds=False,
)
add_policy(
    "mixed_float16",
    loss_scaled(initial_scale=4.0),
    core=("microbatch_size", "optimizer"),
    scaler_around=True,
    thirds=False,
)
add(
    "float64",
    mlp(),
    lambda: weighted(vectors()),
    arguments=squared("sum"),
    optimizer=of_class("Adam", learning_rate=0.1),
    optimizer_reduction="SUM",
    floatx="float64",
    backends=("tensorflow",),
    because="JAX needs a flag of the process; Keras on PyTorch computes in float32",
    core=("microbatch_size", "optimizer"),
)
