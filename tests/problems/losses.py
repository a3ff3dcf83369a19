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
from .problem import ALIKE, MICROBATCH, add, sgd
from .reductions import REDUCTIONS, of_reduction, squared


def logits(metrics=("accuracy",)):
    return lambda: {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": list(metrics),
    }


def add_reduction(reduction, alike=(), **fields):
    """Adds the problems of a reduction. `fields` has more fields of a case, by name."""
    cases = {
        "plain": (mlp(), vectors, {}),
        "masked": (tagger, token_sequences, {"masked": True}),
        "weighted": (mlp(), lambda: weighted(vectors()), {"weighted": True}),
        "masked_weighted": (
            tagger,
            lambda: weighted_rows(token_sequences()),
            {"masked": True},
        ),
        "weights_of_steps": (
            tagger,
            lambda: weighted(
                token_sequences(), lambda r, x, y: uneven(r, len(x), x.shape[1])
            ),
            {"masked": True},
        ),
        "microbatch_of_zero_weight": (
            mlp(),
            lambda: zero_from(0, MICROBATCH),
            {"weighted": True},
        ),
        "masked_microbatch": (
            tagger,
            lambda: empty_rows(token_sequences(), MICROBATCH, 2 * MICROBATCH),
            {"masked": True},
        ),
    }
    if REDUCTIONS[reduction].another_name:
        cases = {name: cases[name] for name in ("plain", "masked")}
    assert fields.keys() <= cases.keys()
    for name, (build, batches, differ) in cases.items():
        add(
            f"reduction_{reduction}" + ("" if name == "plain" else f"_{name}"),
            build,
            batches,
            arguments=squared(reduction),
            **{"alike": alike, **of_reduction(reduction, **differ)}
            | fields.get(name, {}),
        )


add_reduction(
    "sum",
    alike=("fit",),
    plain={"alike": (), "core": ("microbatch_size", "optimizer")},
    masked_weighted={"devices": ("jax", "torch"), "core": ("microbatch_size",)},
)
add_reduction(
    "sum_over_batch_size",
    **ALIKE,
    masked={"devices": ("jax", "torch", "tensorflow"), "core": ("accum_steps",)},
    masked_weighted={"core": ("microbatch_size",)},
)
add_reduction("mean", masked={"agc": True})
add_reduction(
    "mean_with_sample_weight",
    masked_weighted={
        "devices": ("jax", "torch", "tensorflow", "workers"),
        "core": ("microbatch_size", "accum_steps"),
    },
    masked_microbatch={"core": ("accum_steps",)},
)
add_reduction(
    "none",
    alike=("optimizer",),  # as sums
    masked={"core": ("accum_steps",)},
)


def cast_weights(dtype):
    def batches():
        return [
            (x, y, (w > 1).astype(dtype) if dtype == "bool" else w.astype(dtype))
            for x, y, w in weighted(vectors())
        ]

    return batches


add("weights_float64", mlp(), cast_weights("float64"))
add("weights_int", mlp(), cast_weights("int32"), agc=True)
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


def add_nothing_counts(reduction, zero, masked, since=()):
    """Adds problems in which no example of a batch counts.

    Args:
        reduction: The reduction.
        zero: More fields of the problem in which all weights are 0.
        masked: More fields of the problem in which the mask is empty.
        since: The versions since which plain Keras can train them.
    """
    fields = {
        "arguments": squared(reduction),
        "since": since,
        **of_reduction(reduction, weighted=True),
    }
    add(
        f"weights_zero_in_a_batch_{reduction}",
        mlp(),
        lambda: [(x, y, w * (len(y) == SIZES[0])) for x, y, w in weighted(vectors())],
        **fields | zero,
    )
    # In plain Keras 2 the loss of a batch that is fully masked is NaN.
    fields |= {"keras2": None, "optimizer_reduction": None}
    add(
        f"fully_masked_batch_{reduction}",
        tagger,
        lambda: [(x * (len(x) == SIZES[0]), y) for x, y in token_sequences()],
        **fields | masked,
    )


add_nothing_counts(
    "sum_over_batch_size",
    zero={"core": ("accum_steps",)},
    masked={"devices": ("jax", "torch")},
)
add_nothing_counts(
    "mean_with_sample_weight",
    zero={},
    masked={"core": ("microbatch_size",)},
    since=(MEAN_OVER_NO_WEIGHT,),
)


def add_loss(loss, batches, **fields):
    add(
        f"loss_{loss}",
        classifier,
        lambda: weighted(batches()),
        arguments=lambda: {"loss": loss},
        **ALIKE,
        **fields,
    )


add_loss("sparse_categorical_crossentropy", labelled)
add_loss("categorical_crossentropy", one_hot)
add_loss("binary_crossentropy", one_hot)
add_loss("categorical_focal_crossentropy", one_hot, keras2="2.13")
add_loss("kl_divergence", one_hot)
add_loss("poisson", one_hot)
add_loss("cosine_similarity", one_hot)
add_loss("huber", one_hot)
add_loss("log_cosh", one_hot)
add_loss("mae", one_hot)
add_loss("squared_hinge", one_hot)


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
    """A loss with its own `call`, as Keras documents it."""

    def call(self, y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred) ** 1.5, axis=-1)


class LossWhole(keras.losses.Loss):
    """A loss without a known denominator: examples are the weights, as for a mean."""

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
for _reduction, _fields in (
    ("sum_over_batch_size", {}),
    (
        "mean_with_sample_weight",
        {"devices": ("jax", "torch"), "core": ("microbatch_size",)},
    ),
):
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
        **of_reduction(_reduction, weighted=True),
        **_fields,
    )
add(
    "class_weight_one_hot",
    classifier,
    one_hot,
    arguments=lambda: {"loss": "categorical_crossentropy"},
    class_weight=CLASS_WEIGHT,
)
