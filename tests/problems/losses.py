"""Losses, reductions, sample weights and class weights."""

from api import keras, ops
from versions import MEAN_OVER_NO_WEIGHT

from .data import (
    SIZES,
    each_size,
    empty_rows,
    labelled,
    normal,
    one_hot,
    token_sequences,
    uneven,
    vectors,
    weighted,
    weighted_rows,
    zero_from,
)
from .models import classifier, conv_to_image, mlp, tagger
from .problem import ALIKE, MICROBATCH, add, change, of_reduction, sgd

REDUCTIONS = ("sum", "sum_over_batch_size", "mean", "mean_with_sample_weight", "none")
ONLY_TENSORFLOW = {
    "backends": ("tensorflow",),
    "because": "JAX and PyTorch differentiate scalars only, in plain Keras too",
}


def squared(reduction):
    return lambda: {"loss": keras.losses.MeanSquaredError(reduction=reduction)}


def logits(metrics=("accuracy",)):
    return lambda: {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": list(metrics),
    }


def slow(**overrides):
    """For sums over a batch, whose gradients are large."""
    return sgd(**{"learning_rate": 0.02, **overrides})


LIKE_OTHERS = {
    "sum": {"alike": ("fit",)},
    "sum_over_batch_size": ALIKE,
    "none": {"alike": ("optimizer",)},  # as sums
}
for _reduction in REDUCTIONS:
    _settings = {
        "arguments": squared(_reduction),
        "optimizer": slow if _reduction in ("sum", "none") else sgd,
        **(ONLY_TENSORFLOW if _reduction == "none" else {}),
        **LIKE_OTHERS.get(_reduction, {}),
    }
    _plain = _settings | of_reduction(_reduction)
    _masked = _settings | of_reduction(_reduction, equal=False)
    _weighted = _settings | of_reduction(
        _reduction, equal=_reduction != "mean_with_sample_weight"
    )
    add(f"reduction_{_reduction}", mlp(), vectors, **_plain)
    add(f"reduction_{_reduction}_masked", tagger, token_sequences, **_masked)
    if _reduction == "mean":  # another name of sum_over_batch_size
        continue
    add(
        f"reduction_{_reduction}_weighted",
        mlp(),
        lambda: weighted(vectors()),
        **_weighted,
    )
    add(
        f"reduction_{_reduction}_masked_weighted",
        tagger,
        lambda: weighted_rows(token_sequences()),
        **_masked,
    )
    add(
        f"reduction_{_reduction}_weights_of_steps",
        tagger,
        lambda: weighted(
            token_sequences(), lambda r, x, y: uneven(r, len(x), x.shape[1])
        ),
        **_masked,
    )
    add(
        f"reduction_{_reduction}_microbatch_of_zero_weight",
        mlp(),
        lambda: zero_from(0, MICROBATCH),
        **_weighted,
    )
    add(
        f"reduction_{_reduction}_masked_microbatch",
        tagger,
        lambda: empty_rows(token_sequences(), MICROBATCH, 2 * MICROBATCH),
        **_masked,
    )
change("reduction_sum_over_batch_size_masked_weighted", core=("microbatch_size",))
change("reduction_mean_with_sample_weight_masked_microbatch", core=("accum_steps",))
change("reduction_none_masked", core=("accum_steps",))
change("reduction_sum", alike=(), core=("microbatch_size", "optimizer"))
change(
    "reduction_sum_masked_weighted", devices=("jax", "torch"), core=("microbatch_size",)
)
change(
    "reduction_sum_over_batch_size_masked",
    devices=("jax", "torch", "tensorflow"),
    core=("accum_steps",),
)
change(
    "reduction_mean_with_sample_weight_masked_weighted",
    devices=("jax", "torch", "tensorflow", "workers"),
    core=("microbatch_size", "accum_steps"),
)


def cast_weights(dtype):
    def batches():
        return [
            (x, y, (w > 1).astype(dtype) if dtype == "bool" else w.astype(dtype))
            for x, y, w in weighted(vectors())
        ]

    return batches


add("weights_float64", mlp(), cast_weights("float64"))
add("weights_int", mlp(), cast_weights("int32"))
add(
    "weights_bool",
    mlp(),
    cast_weights("bool"),
    plain_replicas=False,
    core=("microbatch_size",),
)
add(
    "weights_column",
    mlp(),
    lambda: weighted(vectors(), lambda r, x, y: uneven(r, len(y), 1)),
)
add(
    "weights_negative",
    mlp(),
    lambda: weighted(vectors(), lambda r, x, y: normal(r, len(y))),
)
for _reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
    _by_weights = _reduction == "mean_with_sample_weight"
    _settings = {
        **of_reduction(_reduction, equal=not _by_weights),
        "since": (MEAN_OVER_NO_WEIGHT,) if _by_weights else (),
    }
    add(
        f"weights_zero_in_a_batch_{_reduction}",
        mlp(),
        lambda: [
            (x, y, w * (len(y) == SIZES[0]))
            for x, y, w in weighted(vectors())
        ],
        arguments=squared(_reduction),
        **_settings,
    )  # fmt: skip
    add(
        f"fully_masked_batch_{_reduction}",
        tagger,
        lambda: [
            (x * (len(x) == SIZES[0]), y) for x, y in token_sequences()
        ],
        arguments=squared(_reduction),
        # The loss of a batch that is masked as a whole is NaN in plain Keras 2.
        **_settings | {"keras2": None, "optimizer_reduction": None},
    )  # fmt: skip
change("weights_zero_in_a_batch_sum_over_batch_size", core=("accum_steps",))
change("fully_masked_batch_mean_with_sample_weight", core=("microbatch_size",))
change("fully_masked_batch_sum_over_batch_size", devices=("jax", "torch"))

CLASSIFICATION = {
    "sparse_categorical_crossentropy": labelled,
    "categorical_crossentropy": one_hot,
    "binary_crossentropy": one_hot,
    "categorical_focal_crossentropy": one_hot,
    "kl_divergence": one_hot,
    "poisson": one_hot,
    "cosine_similarity": one_hot,
    "huber": one_hot,
    "log_cosh": one_hot,
    "mae": one_hot,
    "squared_hinge": one_hot,
}
for _loss, _batches in CLASSIFICATION.items():
    add(
        f"loss_{_loss}",
        classifier,
        lambda _batches=_batches: weighted(_batches()),
        arguments=lambda _loss=_loss: {"loss": _loss},
        keras2="2.13" if _loss == "categorical_focal_crossentropy" else "2.12",
        **ALIKE,
    )


def segmentations():
    return each_size(
        lambda r, n: (
            normal(r, n, 8, 8, 2),
            (r.uniform(size=(n, 8, 8, 1)) > 0.6).astype("float32"),
        )
    )


add(
    "loss_dice_of_each_example",
    conv_to_image(),
    segmentations,
    arguments=lambda: {"loss": keras.losses.Dice(axis=(1, 2, 3))},
    optimizer=lambda **overrides: sgd(**{"learning_rate": 3.0, **overrides}),
    keras2=None,
    **ALIKE,
)
add(
    "loss_weights_of_pixels",
    conv_to_image(),
    lambda: weighted(segmentations(), lambda r, x, y: uneven(r, len(x), 8, 8)),
    arguments=lambda: {"loss": keras.losses.BinaryCrossentropy()},
    **ALIKE,
)


def loss_of_examples(y, y_pred):
    return ops.mean(ops.square(y - y_pred), axis=-1)


def loss_of_batch(y, y_pred):
    return ops.mean(ops.square(y - y_pred))


class LossByCall(keras.losses.Loss):
    """Has its own `call`, as Keras documents it."""

    def call(self, y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred) ** 1.5, axis=-1)


class LossWhole(keras.losses.Loss):
    """Not taken apart: micro-batches weigh by their examples, right for a mean."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        return ops.mean(ops.square(y_true - y_pred))


add("loss_function", mlp(), lambda: weighted(vectors()),
    arguments=lambda: {"loss": loss_of_examples}, **ALIKE)  # fmt: skip
add(
    "loss_function_of_batch",
    mlp(),
    vectors,
    arguments=lambda: {"loss": loss_of_batch},
    **ALIKE,
    core=("microbatch_size",),
)
add("loss_with_own_call", mlp(), lambda: weighted(vectors()),
    arguments=lambda: {"loss": LossByCall()}, **ALIKE)  # fmt: skip
add(
    "loss_with_own_dunder_call",
    mlp(),
    vectors,
    arguments=lambda: {"loss": LossWhole()},
    **ALIKE,
    core=("accum_steps",),
)

CLASS_WEIGHT = {0: 0.2, 1: 1.0, 2: 6.0}
for _reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
    add(
        f"class_weight_{_reduction}",
        classifier,
        labelled,
        arguments=lambda _reduction=_reduction: {
            "loss": keras.losses.SparseCategoricalCrossentropy(reduction=_reduction),
            "metrics": ["accuracy"],
            "weighted_metrics": ["accuracy"],
        },
        class_weight=CLASS_WEIGHT,
        **of_reduction(_reduction, equal=_reduction == "sum_over_batch_size"),
    )
change(
    "class_weight_mean_with_sample_weight",
    devices=("jax", "torch"),
    core=("microbatch_size",),
)
add(
    "class_weight_one_hot",
    classifier,
    one_hot,
    arguments=lambda: {"loss": "categorical_crossentropy"},
    class_weight=CLASS_WEIGHT,
)
