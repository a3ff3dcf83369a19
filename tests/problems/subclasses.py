"""Subclassed models and metrics."""

from api import KERAS_2, keras, ops
from versions import METRICS

from .data import (
    CLASSES,
    FEATURES,
    STEPS,
    TOKENS,
    each_size,
    normal,
    one_hot,
    token_sequences,
    tokens,
    vectors,
    weighted,
    weighted_rows,
)
from .models import Written, classifier, dense_steps, mlp, of_tokens, seeded, written
from .optimizers import OPTIMIZERS
from .problem import add
from .reductions import of_reduction


class OwnComputeLoss(Written):
    """A model with its own loss, a mean over the examples."""

    def __init__(self):
        super().__init__()
        self.hidden.kernel_regularizer = keras.regularizers.L2(0.05)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return ops.mean(ops.square(y - y_pred)) + sum(self.losses)


class MoreComputeLoss(Written):
    """A model whose loss is the compiled loss and another one."""

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        training = {} if KERAS_2 else {"training": training}
        loss = super().compute_loss(x, y, y_pred, sample_weight, **training)
        return loss + 0.2 * ops.mean(ops.abs(y_pred))


class OwnComputeMetrics(Written):
    """A model with a metric that `compile` does not know."""

    def __init__(self):
        super().__init__()
        self.size = keras.metrics.Mean(name="size")

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        self.size.update_state(ops.mean(ops.abs(y_pred), axis=-1))
        return {**logs, "size": self.size.result()}


class OfNamedInputs(Written):
    """A model whose `call` takes a nested structure and `training`."""

    def call(self, inputs, training=False):
        a, (b, c) = inputs["a"], inputs["rest"]
        y = super().call(a + b * c)
        return {"y": y, "double": 2.0 * y}


def nested_batches():
    def make(r, n):
        x = {
            "a": normal(r, n, FEATURES),
            "rest": (normal(r, n, FEATURES), normal(r, n, 1)),
        }
        return x, {"y": normal(r, n, CLASSES), "double": normal(r, n, CLASSES)}

    return each_size(make)


@seeded
def of_named_inputs():
    model = OfNamedInputs()
    model(nested_batches()[0][0])
    return model


add("subclass", written(Written), lambda: weighted(vectors()),
    optimizer=OPTIMIZERS["adam"])  # fmt: skip
add(
    "subclass_compute_loss",
    written(OwnComputeLoss),
    vectors,
    arguments=dict,
    core=("microbatch_size",),
)
add(
    "subclass_compute_loss_calls_super",
    written(MoreComputeLoss),
    vectors,
    core=("accum_steps",),
)
add(
    "subclass_compute_metrics",
    written(OwnComputeMetrics),
    vectors,
    arguments=lambda: {"loss": "mse", "metrics": ["mae"]},
    devices=("jax", "torch"),
    core=("microbatch_size",),
)
add(
    "subclass_nested_inputs",
    of_named_inputs,
    nested_batches,
    arguments=lambda: {"loss": {"y": "mse", "double": "mae"}},
    core=("accum_steps",),
)


def mean_absolute(y, y_pred):
    return ops.mean(ops.abs(y - y_pred), axis=-1)


add(
    "metrics",
    classifier,
    lambda: weighted(one_hot()),
    arguments=lambda: {
        "loss": "categorical_crossentropy",
        "metrics": [
            "accuracy",
            mean_absolute,
            keras.metrics.AUC(num_thresholds=20, name="auc"),
            # The metric of Keras 2 needs the shape of the targets.
            *([] if KERAS_2 else [keras.metrics.F1Score(name="f1")]),
            keras.metrics.TopKCategoricalAccuracy(2, name="top"),
        ],
        "weighted_metrics": [
            "accuracy",
            keras.metrics.AUC(num_thresholds=20, name="auc_weighted"),
            keras.metrics.CategoricalCrossentropy(name="cce_weighted"),
        ],
    },
    since=(METRICS,),
    core=("microbatch_size",),
)
add(
    "metrics_masked",
    of_tokens(dense_steps(CLASSES, "softmax")),
    lambda: weighted_rows(
        each_size(
            lambda r, n: (
                tokens(r, n),
                r.integers(0, CLASSES, (n, STEPS)).astype("int32"),
            )
        )
    ),
    arguments=lambda: {
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy"],
        "weighted_metrics": ["accuracy"],
    },
    optimizer_reduction=None,
    devices=("jax", "torch", "tensorflow"),
    core=("accum_steps",),
)
add(
    "metrics_of_mean_with_sample_weight",
    mlp(),
    lambda: weighted(vectors()),
    arguments=lambda: {
        "loss": keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        "metrics": ["mae"],
        "weighted_metrics": ["mae"],
    },
    **of_reduction("mean_with_sample_weight", weighted=True),
)


def mean_of_all(y, y_pred):
    """A metric function that gives one number for a batch."""
    return ops.mean(ops.abs(y - y_pred))


class OwnMean(keras.metrics.Mean):
    """Keras's `Mean`, updated with one number for a batch."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(mean_of_all(y_true, y_pred))


class CountedInTheLoss(Written):
    """A model that records a part of its loss, as a variational autoencoder does."""

    def __init__(self):
        super().__init__()
        self.size = keras.metrics.Mean(name="size")

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        training = {} if KERAS_2 else {"training": training}
        loss = super().compute_loss(x, y, y_pred, sample_weight, **training)
        size = mean_of_all(0.0 * y_pred, y_pred)
        self.size.update_state(size)
        return loss + 0.1 * size


add(
    "metrics_of_one_number",
    mlp(),
    vectors,
    arguments=lambda: {
        "loss": "mse",
        "metrics": [mean_of_all, OwnMean(name="own"), "mae"],
    },
    core=("microbatch_size",),
)
add(
    "metrics_counted_in_the_loss",
    written(CountedInTheLoss),
    vectors,
    core=("microbatch_size",),
)


class Shifted(keras.Model):
    """A model that predicts the next token. Its `compute_loss` drops a step, and the
    mask.
    """

    def __init__(self):
        super().__init__()
        self.embed = keras.layers.Embedding(TOKENS, 5, mask_zero=True)
        self.head = keras.layers.Dense(2)

    def call(self, x):
        return self.head(self.embed(x))

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return super().compute_loss(
            x, y[:, 1:], y_pred[:, :-1], sample_weight, training
        )


class WeighedInTheLoss(Shifted):
    """A model that makes the weights of its loss itself."""

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        weights = ops.cast(x % 3, "float32")
        return keras.Model.compute_loss(self, x, y, y_pred, weights, training)


class TwiceInTheLoss(Shifted):
    """A model that calls the compiled loss twice, with different weights."""

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        first = super().compute_loss(x, y, y_pred, None, training)
        weights = ops.cast(x % 3, "float32")
        whole = keras.Model.compute_loss(self, x, y, y_pred, weights, training)
        return first + 0.5 * whole


for _model in (Shifted, WeighedInTheLoss, TwiceInTheLoss):
    for _reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
        add(
            f"subclass_{_model.__name__}_{_reduction}",
            written(_model, (1, STEPS)),
            token_sequences,
            arguments=lambda reduction=_reduction: {
                "loss": keras.losses.MeanSquaredError(reduction=reduction)
            },
            keras2=None,  # Keras 2 calls `compute_loss` in another way
            optimizer_reduction=None,
        )
