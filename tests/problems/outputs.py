"""Several outputs, each with its own loss and denominator."""

from api import keras, layers
from versions import MASKS_IN_PLACE

from .data import (
    CLASSES,
    FEATURES,
    STEPS,
    TOKENS,
    each_size,
    normal,
    tokens,
    uneven,
    uneven_rows,
    weighted,
)
from .models import seeded
from .problem import add, sgd


@seeded
def tagger_and_classifier():
    """A model with two outputs: one for each step, with a mask, and one without."""
    x = layers.Input((STEPS,), dtype="int32")
    h = layers.Embedding(TOKENS, 5, mask_zero=True)(x)
    h = layers.Dense(6, activation="tanh")(h)
    steps = layers.Dense(2, name="steps")(h)
    whole = layers.Dense(CLASSES, activation="softmax", name="whole")(
        layers.GlobalAveragePooling1D()(h)
    )
    return keras.Model(x, [steps, whole])


def two_targets():
    def make(r, n):
        y = (normal(r, n, STEPS, 2), r.integers(0, CLASSES, n).astype("int32"))
        return tokens(r, n), y

    return each_size(make)


def two_losses(first="sum_over_batch_size", second="sum_over_batch_size", **more):
    return lambda: {
        "loss": [
            keras.losses.MeanSquaredError(reduction=first),
            keras.losses.SparseCategoricalCrossentropy(reduction=second),
        ],
        **more,
    }


_masked = {"optimizer_reduction": None, "since": (MASKS_IN_PLACE,)}
add("outputs_one_of_two_masked", tagger_and_classifier, two_targets,
    arguments=two_losses(), **_masked)  # fmt: skip
add(
    "outputs_loss_weights",
    tagger_and_classifier,
    two_targets,
    arguments=two_losses(loss_weights=[0.3, 2.5]),
    **_masked,
)
for _first, _second, _fields in (
    ("sum", "mean_with_sample_weight", {"devices": ("jax", "torch")}),
    ("mean_with_sample_weight", "sum_over_batch_size", {}),
):
    add(
        f"outputs_{_first}_and_{_second}",
        tagger_and_classifier,
        lambda: weighted(
            two_targets(), lambda r, x, y: (uneven_rows(r, len(x)), uneven(r, len(x)))
        ),
        arguments=two_losses(_first, _second, loss_weights=[0.2, 1.0]),
        optimizer=lambda **overrides: sgd(**{"learning_rate": 0.15, **overrides}),
        **_masked | {"keras2": None} | _fields,
    )
add(
    "outputs_metrics_of_each",
    tagger_and_classifier,
    lambda: weighted(
        two_targets(), lambda r, x, y: (uneven_rows(r, len(x)), uneven(r, len(x)))
    ),
    arguments=two_losses(
        metrics=[["mae"], ["accuracy"]], weighted_metrics=[["mse"], ["accuracy"]]
    ),
    devices=("jax", "torch"),
    **_masked,
    core=("accum_steps",),
)
add(
    "outputs_only_one_has_a_loss",
    tagger_and_classifier,
    two_targets,
    arguments=lambda: {"loss": [None, "sparse_categorical_crossentropy"]},
    since=(MASKS_IN_PLACE,),
    core=("accum_steps",),
)


@seeded
def named():
    """A model with named inputs and outputs."""
    inputs = {
        "a": layers.Input((FEATURES,), name="a"),
        "b": layers.Input((4,), name="b"),
    }
    h = layers.Concatenate()(
        [
            layers.Dense(5, activation="tanh")(inputs["a"]),
            layers.Dense(3, activation="tanh")(inputs["b"]),
        ]
    )
    return keras.Model(
        inputs,
        {
            "value": layers.Dense(1, name="value")(h),
            "kind": layers.Dense(CLASSES, activation="softmax", name="kind")(h),
        },
    )


def named_batches(with_weights=False):
    def make(r, n):
        x = {"a": normal(r, n, FEATURES), "b": normal(r, n, 4)}
        y = {
            "value": normal(r, n, 1),
            "kind": r.integers(0, CLASSES, n).astype("int32"),
        }
        weights = {"value": uneven(r, n), "kind": uneven(r, n)}
        return (x, y, weights) if with_weights else (x, y)

    return each_size(make)


def named_losses(**more):
    return lambda: {
        "loss": {"value": "mse", "kind": "sparse_categorical_crossentropy"},
        "loss_weights": {"value": 0.5, "kind": 2.0},
        "metrics": {"value": ["mae"], "kind": ["accuracy"]},
        **more,
    }


add("outputs_named", named, named_batches, arguments=named_losses())
add(
    "outputs_named_sum_and_mean",
    named,
    named_batches,
    arguments=named_losses(
        loss={
            "value": keras.losses.MeanSquaredError(reduction="sum"),
            "kind": "sparse_categorical_crossentropy",
        },
        loss_weights={"value": 0.1, "kind": 2.0},
    ),
    optimizer_reduction=None,
    core=("microbatch_size",),
)
add(
    "outputs_named_weighted",
    named,
    lambda: named_batches(with_weights=True),
    arguments=named_losses(weighted_metrics={"value": ["mse"], "kind": ["accuracy"]}),
)
