"""Regularizers, and losses that layers and models add."""

from api import keras, layers, ops

from .data import CLASSES, FEATURES, token_sequences, vectors, weighted
from .models import Written, dense_steps, mlp, of_tokens, seeded, written
from .problem import add
from .reductions import slow, squared

add("regularizer_of_weights", mlp(kernel_regularizer=keras.regularizers.L2(0.05)),
    lambda: weighted(vectors()), core=("optimizer",))  # fmt: skip
add(
    "regularizer_of_weights_loss_sum",
    mlp(kernel_regularizer=keras.regularizers.L1L2(0.05, 0.05)),
    vectors,
    arguments=squared("sum"),
    optimizer=slow,
    optimizer_reduction=None,
)
add("regularizer_of_activity", mlp(activity_regularizer=keras.regularizers.L2(0.1)),
    lambda: weighted(vectors()))  # fmt: skip
add(
    "regularizer_of_activity_masked",
    of_tokens(
        lambda: layers.Dense(
            6, activation="tanh", activity_regularizer=keras.regularizers.L1(0.1)
        ),
        dense_steps(),
    ),
    token_sequences,
    optimizer_reduction=None,
    core=("accum_steps",),
)
add(
    "regularizers_of_both",
    mlp(
        kernel_regularizer=keras.regularizers.L2(0.05),
        activity_regularizer=keras.regularizers.L1(0.1),
    ),
    vectors,
    arguments=squared("mean_with_sample_weight"),
    keras2=None,
    devices=("jax", "torch"),
    core=("microbatch_size",),
)
add(
    "regularizer_orthogonal",
    mlp(kernel_regularizer=keras.regularizers.OrthogonalRegularizer(0.05)),
    vectors,
)


class MeanOverExamples(Written):
    """A layer that adds a scalar loss, the mean over the examples."""

    def call(self, x):
        y = super().call(x)
        self.add_loss(0.5 * ops.mean(ops.square(y - x[:, :CLASSES])))
        return y


class LossOfEachExample(Written):
    """A layer that adds one loss for each example. Keras sums them."""

    def call(self, x):
        y = super().call(x)
        self.add_loss(0.1 * ops.mean(ops.square(y - x[:, :CLASSES]), axis=-1))
        return y


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(0.3 * ops.mean(ops.square(x)))
        return x


@seeded
def layer_adds_loss():
    x = layers.Input((FEATURES,))
    h = AddsLoss()(layers.Dense(8, activation="tanh")(x))
    return keras.Model(x, layers.Dense(CLASSES)(h))


def without_targets():
    return [(x,) for x, _ in vectors()]


add("add_loss_mean", written(MeanOverExamples), lambda: weighted(vectors()))
# Keras 2 adds losses of each example to a scalar, and fails.
add("add_loss_of_each_example", written(LossOfEachExample), vectors, keras2=None,
    optimizer_reduction=None, core=("microbatch_size",))  # fmt: skip
add("add_loss_in_a_layer", layer_adds_loss, vectors, devices=("jax", "torch"))
add("add_loss_only_mean", written(MeanOverExamples), without_targets,
    arguments=dict, core=("accum_steps",))  # fmt: skip
add("add_loss_only_of_each_example", written(LossOfEachExample), without_targets,
    arguments=dict, optimizer_reduction="SUM")  # fmt: skip
