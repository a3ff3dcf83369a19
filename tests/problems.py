"""The list of models, losses and data that every exactness test is parametrized over.

A problem is what a user would write: a model, what it is compiled with, and full
batches, each of which one weight update is computed from. Nothing here knows about
accumulation; `benchmarks/` makes its table of what is exact from the same list.

Sizes are chosen so that every problem has a last piece that is smaller (12 examples
in pieces of 5) and a last update with fewer pieces (7 examples). Learning rates are
high, so that what is compared is far above float32's rounding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from api import KERAS_2, keras, layers, ops

BACKENDS = ("tensorflow", "jax", "torch")
SIZES = (12, 7)  # examples of the full batches of one epoch
PIECE = 5  # examples of a piece
FEATURES, CLASSES, STEPS, TOKENS = 6, 3, 6, 20


# ---------------------------------------------------------------------- the interface


def sgd(**overrides):
    return keras.optimizers.SGD(**{"learning_rate": 0.3, "momentum": 0.5, **overrides})


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, what it is compiled with, and its full batches.

    Args:
        name: What the problem is about.
        build: Makes the model, not compiled. Every call gives the same weights.
        batches: Makes the full batches of one epoch: tuples `(x,)`, `(x, y)` or
            `(x, y, sample_weight)`.
        arguments: Makes the arguments of `compile`, without the optimizer.
        optimizer: Makes the optimizer; keyword arguments are for its constructor.
        class_weight: For `fit`.
        pieces: Cuts one full batch for `accum_steps`, where that is not by examples.
        stages: What is done to the model before each `fit`, one entry a `fit`.
        epochs: Epochs of each `fit`.
        backends: Those that the problem exists on. `because` says why not on all.
        floatx: Keras's `floatx`.
        build_optimizer: Whether the optimizer is built before `fit`.
    """

    name: str
    build: Callable[[], keras.Model]
    batches: Callable[[], list[tuple]]
    arguments: Callable[[], dict[str, Any]] = lambda: {"loss": "mse"}
    optimizer: Callable[..., keras.optimizers.Optimizer] = sgd
    class_weight: dict[int, float] | None = None
    pieces: Callable[[tuple], list[tuple]] | None = None
    stages: tuple[Callable[[keras.Model], None] | None, ...] = (None,)
    epochs: int = 2
    backends: tuple[str, ...] = BACKENDS
    because: str = ""
    floatx: str = "float32"
    build_optimizer: bool = False

    def __str__(self):
        return self.name

    def compile(self, model, **overrides):
        """Compiles with a new optimizer; `overrides` go to its constructor."""
        model.compile(optimizer=self.optimizer(**overrides), **self.arguments())
        if self.build_optimizer:
            model.optimizer.build(model.trainable_variables)

    def cut(self, batch):
        """The pieces of one full batch, as `accum_steps` gets them."""
        return self.pieces(batch) if self.pieces else cut(batch, PIECE)

    @property
    def accum_steps(self):
        """Pieces of the largest full batch; a smaller one has fewer."""
        return max(len(self.cut(batch)) for batch in self.batches())


def cut(batch, size):
    """Cuts every array of a batch in pieces of `size` examples, the last smaller."""
    count = len(keras.tree.flatten(batch)[0])
    return [
        keras.tree.map_structure(lambda a, i=i: a[i : i + size], batch)
        for i in range(0, count, size)
    ]


PROBLEMS: list[Problem] = []


def add(name, build, batches, **settings):
    PROBLEMS.append(Problem(name, build, batches, **settings))


def here():
    """The problems that the active backend, and the Keras in use, can have."""
    return [
        p
        for p in PROBLEMS
        if keras.backend.backend() in p.backends and (not KERAS_2 or _in_keras_2(p))
    ]


# What TensorFlow 2.12 does not have yet.
_SINCE_2_13 = (
    "loss_categorical_focal_crossentropy",
    "optimizer_lion",
    "schedule_warmup",
)


def _in_keras_2(problem):
    """Whether plain Keras 2 can train it."""
    return (
        # A reduction of Keras 3's.
        "mean_with_sample_weight" not in problem.name
        and not problem.name.startswith(("reduction_mean", "regularizers_of_both"))
        and not (keras.__version__.startswith("2.12.") and problem.name in _SINCE_2_13)
        and problem.name
        not in (
            # Optimizers, losses and layers of Keras 3's.
            "optimizer_lamb",
            "loss_scale_factor",
            "loss_dice_of_each_example",
            "float8_overwrite_with_gradient",
            # It adds losses of each example to a scalar, and fails.
            "add_loss_of_each_example",
            # A full batch that is masked as a whole has loss NaN.
            "fully_masked_full_batch_sum_over_batch_size",
        )
    )


# ------------------------------------------------------------------------------- data


def random(seed=0):
    return np.random.default_rng(seed)


def normal(r, *shape):
    return r.normal(size=shape).astype("float32")


def each_size(make, sizes=SIZES, seed=0):
    """`make(generator, examples)` for each full batch."""
    r = random(seed)
    return [make(r, count) for count in sizes]


def vectors(outputs=CLASSES):
    return each_size(lambda r, n: (normal(r, n, FEATURES), normal(r, n, outputs)))


def labelled(classes=CLASSES):
    return each_size(
        lambda r, n: (normal(r, n, FEATURES), r.integers(0, classes, n).astype("int32"))
    )


def one_hot():
    return [(x, np.eye(CLASSES, dtype="float32")[y]) for x, y in labelled()]


def uneven(r, *shape):
    """Sample weights between 0.1 and 5, a third of them zero."""
    weights = r.uniform(0.1, 5.0, shape) * (r.uniform(size=shape) > 0.33)
    return weights.astype("float32")


def weighted(batches, weights=lambda r, x, y: uneven(r, len(y))):
    r = random(1)
    return [(x, y, weights(r, x, y)) for x, y in batches]


def zero_from(start, stop, batches=None):
    """Weights that are zero from example `start` to `stop` of every full batch."""
    batches = weighted(vectors(), lambda r, x, y: r.uniform(0.5, 2, len(y)))
    for _, _, weights in batches:
        weights[start:stop] = 0
    return [(x, y, w.astype("float32")) for x, y, w in batches]


def tokens(r, count, shortest=1):
    """Token numbers from 1; each row ends in zeros, which `mask_zero` masks."""
    x = r.integers(1, TOKENS, (count, STEPS))
    lengths = r.integers(shortest, STEPS + 1, count)
    lengths[0] = STEPS
    return (x * (np.arange(STEPS) < lengths[:, None])).astype("int32")


def token_sequences(outputs=2):
    return each_size(lambda r, n: (tokens(r, n), normal(r, n, STEPS, outputs)))


def uneven_rows(r, count):
    """Weights of examples, for every step of theirs: beside a mask Keras wants both.

    In float64, which Keras copies: weights in float32 are multiplied by the mask in
    place on PyTorch, in plain Keras too, before the metrics see them.
    """
    return np.repeat(uneven(r, count, 1), STEPS, axis=1).astype("float64")


def weighted_rows(batches):
    return weighted(batches, lambda r, x, y: uneven_rows(r, len(x)))


def empty_rows(batches, start, stop):
    """Makes the rows `start` to `stop` of every batch fully masked."""
    for x, *_ in batches:
        x[start:stop] = 0
    return batches


def float_sequences(outputs=2):
    def make(r, n):
        x = normal(r, n, STEPS, 4) * (tokens(r, n) > 0)[..., None]
        return x, normal(r, n, STEPS, outputs)

    return each_size(make)


def images():
    return each_size(
        lambda r, n: (
            normal(r, n, 8, 8, 2),
            r.integers(0, CLASSES, n).astype("int32"),
        )
    )


# ----------------------------------------------------------------------------- models


def seeded(build):
    """A builder whose model has the same weights at every call."""

    def build_seeded():
        keras.utils.set_random_seed(7)
        return build()

    return build_seeded


def mlp(outputs=CLASSES, activation=None, **arguments):
    """Dense, tanh, dense. `arguments` are for the first layer."""

    @seeded
    def build():
        x = layers.Input((FEATURES,))
        hidden = layers.Dense(8, activation="tanh", name="hidden", **arguments)(x)
        y = layers.Dense(outputs, activation=activation, name="head")(hidden)
        return keras.Model(x, y)

    return build


def classifier():
    return mlp(activation="softmax")()


def of_tokens(*body, mask_zero=True, width=5):
    """An embedding followed by the layers that the functions in `body` make."""

    @seeded
    def build():
        x = layers.Input((None,), dtype="int32")
        h = layers.Embedding(
            TOKENS, width, mask_zero=mask_zero, embeddings_initializer="glorot_uniform"
        )(x)
        for make in body:
            h = make()(h)
        return keras.Model(x, h)

    return build


def dense_steps(outputs=2, activation=None):
    return lambda: layers.Dense(outputs, activation=activation)


tagger = of_tokens(lambda: layers.Dense(6, activation="tanh"), dense_steps())


class Written(keras.Model):
    """A subclassed model: layers made in `__init__`, built here as a user would."""

    def __init__(self, outputs=CLASSES, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(8, activation="tanh")
        self.head = layers.Dense(outputs)

    def call(self, x):
        return self.head(self.hidden(x))

    def build_layers(self, shape):
        if not KERAS_2:  # which calls the model to build it
            super().build(shape)
        self.hidden.build(shape)
        self.head.build((None, 8))


def written(cls, shape=(1, FEATURES)):
    @seeded
    def build():
        model = cls()
        model(np.zeros(shape, "float32"))
        return model

    return build


# ------------------------------------------------------------------------- optimizers
#
# `epsilon` is large where the update divides by the gradient's own size: otherwise the
# smallest gradients' rounding, not their value, would decide.


def of_class(name, **settings):
    def make(**overrides):
        return getattr(keras.optimizers, name)(**{**settings, **overrides})

    return make


def loss_scaled(**settings):
    def make(**overrides):
        return keras.optimizers.LossScaleOptimizer(sgd(**overrides), **settings)

    return make


def multi(**overrides):
    of_head = keras.optimizers.Adam(0.05, epsilon=1e-2, **overrides)
    by_path = keras.optimizers.OptimizerMap(sgd(**overrides), {"head/.*": of_head})
    return keras.optimizers.MultiOptimizer(by_path)


OPTIMIZERS = {
    "sgd": of_class("SGD", learning_rate=0.3),
    "sgd_momentum": of_class("SGD", learning_rate=0.3, momentum=0.9),
    "sgd_nesterov": of_class("SGD", learning_rate=0.3, momentum=0.9, nesterov=True),
    "rmsprop": of_class("RMSprop", learning_rate=0.05, epsilon=1e-2),
    "rmsprop_centered": of_class(
        "RMSprop", learning_rate=0.05, epsilon=1e-2, centered=True, momentum=0.5
    ),
    "adam": of_class("Adam", learning_rate=0.1, epsilon=1e-2),
    "adam_amsgrad": of_class("Adam", learning_rate=0.1, epsilon=1e-2, amsgrad=True),
    "adamw": of_class("AdamW", learning_rate=0.1, epsilon=1e-2, weight_decay=0.1),
    "adadelta": of_class("Adadelta", learning_rate=3.0, epsilon=1e-2),
    "adagrad": of_class("Adagrad", learning_rate=0.2, epsilon=1e-2),
    "adamax": of_class("Adamax", learning_rate=0.1, epsilon=1e-2),
    "adafactor": of_class("Adafactor", learning_rate=0.3, epsilon_1=1e-4),
    "nadam": of_class("Nadam", learning_rate=0.1, epsilon=1e-2),
    "ftrl": of_class("Ftrl", learning_rate=0.5, l1_regularization_strength=0.01),
    "lion": of_class("Lion", learning_rate=0.03, weight_decay=0.1),
    "lamb": of_class("Lamb", learning_rate=0.1, epsilon=1e-2),
    "muon": of_class("Muon", learning_rate=0.1, epsilon=1e-2, ns_steps=2),
    "schedule_free_adamw": of_class(
        "ScheduleFreeAdamW", learning_rate=0.1, epsilon=1e-2, weight_decay=0.1
    ),
    "multi_optimizer": multi,
    "loss_scale_optimizer": loss_scaled(initial_scale=2.0**10),
}
# Keras got these later than the oldest version that is supported.
NEWER = {
    "muon": "Muon",
    "schedule_free_adamw": "ScheduleFreeAdamW",
    "multi_optimizer": "MultiOptimizer",
}
for _name, _optimizer in OPTIMIZERS.items():
    if hasattr(keras.optimizers, NEWER.get(_name, "Optimizer")):
        add(
            f"optimizer_{_name}",
            mlp(),
            vectors,
            optimizer=_optimizer,
            # It copies the weights when it is built. Plain Keras on TensorFlow builds
            # an optimizer inside the first step, and the copies are lost.
            build_optimizer=_name == "schedule_free_adamw",
        )

SCHEDULES = {
    "exponential_decay": lambda: keras.optimizers.schedules.ExponentialDecay(
        0.4, decay_steps=1, decay_rate=0.6
    ),
    "piecewise": lambda: keras.optimizers.schedules.PiecewiseConstantDecay(
        [1, 2], [0.4, 0.2, 0.1]
    ),
    "warmup": lambda: keras.optimizers.schedules.CosineDecay(
        0.05, decay_steps=3, warmup_target=0.4, warmup_steps=2
    ),
}
for _name, _schedule in SCHEDULES.items():
    add(
        f"schedule_{_name}",
        mlp(),
        vectors,
        optimizer=lambda _schedule=_schedule, **overrides: sgd(
            learning_rate=_schedule(), **overrides
        ),
    )

FEATURES_OF_OPTIMIZERS = {
    "clipnorm": {"clipnorm": 0.05},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.02},
    "weight_decay": {"weight_decay": 0.2},
    "ema_overwrite_every_2": {
        "use_ema": True,
        "ema_momentum": 0.6,
        "ema_overwrite_frequency": 2,
    },
    "ema_overwrite_at_the_end": {"use_ema": True, "ema_momentum": 0.6},
    "loss_scale_factor": {"loss_scale_factor": 128.0},
}
for _name, _settings in FEATURES_OF_OPTIMIZERS.items():
    add(
        _name,
        mlp(),
        vectors,
        optimizer=lambda _settings=_settings, **overrides: sgd(
            **_settings, **overrides
        ),
    )

# Two updates in a row with finite gradients double the scale.
add(
    "loss_scale_grows",
    mlp(),
    vectors,
    optimizer=loss_scaled(initial_scale=2.0**10, dynamic_growth_steps=2),
)


def one_overflow():
    """The first full batch's gradient overflows when scaled, its loss does not."""
    batches = vectors(1)
    batches[0][0][1, 0] = 1e36
    return batches


@seeded
def linear():
    return keras.Sequential([layers.Input((FEATURES,)), layers.Dense(1)])


add(
    "loss_scale_skips_an_overflow",
    linear,
    one_overflow,
    optimizer=loss_scaled(initial_scale=2.0**15),
    arguments=lambda: {"loss": "mae"},
)
add(
    "constraint_max_norm",
    mlp(kernel_constraint=keras.constraints.MaxNorm(0.8)),
    vectors,
)
add("constraint_non_neg", mlp(kernel_constraint="non_neg"), vectors)
add("constraint_unit_norm", mlp(kernel_constraint="unit_norm"), vectors)


# ------------------------------------------------------------- losses and reductions

REDUCTIONS = ("sum", "sum_over_batch_size", "mean", "mean_with_sample_weight", "none")
ONLY_TENSORFLOW = {
    "backends": ("tensorflow",),
    "because": "JAX and PyTorch differentiate scalars only, in plain Keras too",
}


def squared(reduction):
    return lambda: {"loss": keras.losses.MeanSquaredError(reduction=reduction)}


def slow(**overrides):
    """For sums over a batch, whose gradients are large."""
    return sgd(**{"learning_rate": 0.02, **overrides})


for _reduction in REDUCTIONS:
    _settings = {
        "arguments": squared(_reduction),
        "optimizer": slow if _reduction in ("sum", "none") else sgd,
        **(ONLY_TENSORFLOW if _reduction == "none" else {}),
    }
    add(f"reduction_{_reduction}", mlp(), vectors, **_settings)
    add(f"reduction_{_reduction}_masked", tagger, token_sequences, **_settings)
    if _reduction == "mean":  # another name of sum_over_batch_size
        continue
    add(
        f"reduction_{_reduction}_weighted",
        mlp(),
        lambda: weighted(vectors()),
        **_settings,
    )
    add(
        f"reduction_{_reduction}_masked_weighted",
        tagger,
        lambda: weighted_rows(token_sequences()),
        **_settings,
    )
    add(
        f"reduction_{_reduction}_weights_of_steps",
        tagger,
        lambda: weighted(
            token_sequences(), lambda r, x, y: uneven(r, len(x), x.shape[1])
        ),
        **_settings,
    )
    add(
        f"reduction_{_reduction}_piece_of_zero_weight",
        mlp(),
        lambda: zero_from(0, PIECE),
        **_settings,
    )
    add(
        f"reduction_{_reduction}_masked_piece",
        tagger,
        lambda: empty_rows(token_sequences(), PIECE, 2 * PIECE),
        **_settings,
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
add("weights_bool", mlp(), cast_weights("bool"))
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
    add(
        f"weights_zero_in_a_full_batch_{_reduction}",
        mlp(),
        lambda: [
            (x, y, w * (len(y) == SIZES[0]))
            for x, y, w in weighted(vectors())
        ],
        arguments=squared(_reduction),
    )  # fmt: skip
    add(
        f"fully_masked_full_batch_{_reduction}",
        tagger,
        lambda: [
            (x * (len(x) == SIZES[0]), y) for x, y in token_sequences()
        ],
        arguments=squared(_reduction),
    )  # fmt: skip

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
    )


def conv_to_image(outputs=1, **arguments):
    @seeded
    def build():
        x = layers.Input((8, 8, 2))
        h = layers.Conv2D(4, 3, padding="same", activation="tanh")(x)
        return keras.Model(x, layers.Conv2D(outputs, 1, activation="sigmoid")(h))

    return build


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
)
add(
    "loss_weights_of_pixels",
    conv_to_image(),
    lambda: weighted(segmentations(), lambda r, x, y: uneven(r, len(x), 8, 8)),
    arguments=lambda: {"loss": keras.losses.BinaryCrossentropy()},
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
    """Cannot be taken apart: pieces weigh by their examples, right for a mean."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        return ops.mean(ops.square(y_true - y_pred))


add("loss_function", mlp(), lambda: weighted(vectors()),
    arguments=lambda: {"loss": loss_of_examples})  # fmt: skip
add("loss_function_of_batch", mlp(), vectors,
    arguments=lambda: {"loss": loss_of_batch})  # fmt: skip
add("loss_with_own_call", mlp(), lambda: weighted(vectors()),
    arguments=lambda: {"loss": LossByCall()})  # fmt: skip
add("loss_with_own_dunder_call", mlp(), vectors,
    arguments=lambda: {"loss": LossWhole()})  # fmt: skip

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
    )
add(
    "class_weight_one_hot",
    classifier,
    one_hot,
    arguments=lambda: {"loss": "categorical_crossentropy"},
    class_weight=CLASS_WEIGHT,
)


# ------------------------------------------------------------------------------ masks


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
    )
add(
    "ignore_class_weighted",
    mlp(),
    lambda: weighted(ignored_labels()),
    arguments=ignoring(),
)
add(
    "ignore_class_whole_piece",
    mlp(),
    lambda: ignored_labels(0, PIECE),
    arguments=ignoring(),
)
for _reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
    add(
        f"ignore_class_and_mask_zero_{_reduction}",
        of_tokens(dense_steps(CLASSES)),
        lambda: weighted_rows(ignored_tokens()),
        arguments=ignoring(_reduction),
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


add("masking_layer", masking, float_sequences)
add("masking_layer_weighted", masking, lambda: weighted_rows(float_sequences()))


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


add("mask_computed_from_activations", own_mask, float_sequences)


def pooled(outputs=CLASSES):
    return of_tokens(
        lambda: layers.GlobalAveragePooling1D(), lambda: layers.Dense(outputs)
    )


def classified_tokens():
    return each_size(
        lambda r, n: (tokens(r, n), r.integers(0, CLASSES, n).astype("int32"))
    )


def logits(metrics=("accuracy",)):
    return lambda: {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": list(metrics),
    }


add("mask_used_up_by_pooling", pooled(), classified_tokens, arguments=logits())


# --------------------------------------------- pieces that differ in sequence length


def trimmed(batch):
    """Pieces as a pipeline that buckets by length makes them: without the padding."""

    def trim(piece):
        x = piece[0]
        longest = int((x > 0).sum(axis=1).max())
        steps = [a[:, :longest] if a.ndim > 1 else a for a in piece]
        return tuple(steps)

    return [trim(piece) for piece in cut(batch, PIECE)]


def bucketed(make=token_sequences):
    """Batches whose pieces have different longest rows."""

    def batches():
        result = make()
        for x, *_ in result:
            x[0:PIECE, 3:] = 0
            x[PIECE] = np.maximum(x[PIECE], 1)
            x[2 * PIECE :, 4:] = 0
        return result

    return batches


for _reduction in ("sum", "sum_over_batch_size", "mean_with_sample_weight"):
    add(
        f"pieces_of_different_length_{_reduction}",
        tagger,
        bucketed(lambda: weighted_rows(token_sequences())),
        arguments=squared(_reduction),
        optimizer=slow if _reduction == "sum" else sgd,
        pieces=trimmed,
    )
add(
    "pieces_of_different_length_pooled",
    pooled(),
    bucketed(classified_tokens),
    arguments=logits(),
    pieces=trimmed,
)
add(
    "pieces_of_different_length_lstm",
    of_tokens(lambda: layers.LSTM(4, return_sequences=True), dense_steps()),
    bucketed(),
    pieces=trimmed,
)


# -------------------------------------------------------------------- several outputs


@seeded
def tagger_and_classifier():
    """One output for each step, which has a mask, and one that has none."""
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


add("outputs_one_of_two_masked", tagger_and_classifier, two_targets,
    arguments=two_losses())  # fmt: skip
add(
    "outputs_loss_weights",
    tagger_and_classifier,
    two_targets,
    arguments=two_losses(loss_weights=[0.3, 2.5]),
)
for _first, _second in (
    ("sum", "mean_with_sample_weight"),
    ("mean_with_sample_weight", "sum_over_batch_size"),
):
    add(
        f"outputs_{_first}_and_{_second}",
        tagger_and_classifier,
        lambda: weighted(
            two_targets(), lambda r, x, y: (uneven_rows(r, len(x)), uneven(r, len(x)))
        ),
        arguments=two_losses(_first, _second, loss_weights=[0.2, 1.0]),
        optimizer=lambda **overrides: sgd(**{"learning_rate": 0.15, **overrides}),
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
)
add(
    "outputs_only_one_has_a_loss",
    tagger_and_classifier,
    two_targets,
    arguments=lambda: {"loss": [None, "sparse_categorical_crossentropy"]},
)


@seeded
def named():
    """Named inputs and outputs."""
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
)
add(
    "outputs_named_weighted",
    named,
    lambda: named_batches(with_weights=True),
    arguments=named_losses(weighted_metrics={"value": ["mse"], "kind": ["accuracy"]}),
)


# ------------------------------------------------- regularizers and additional losses

add("regularizer_of_weights", mlp(kernel_regularizer=keras.regularizers.L2(0.05)),
    lambda: weighted(vectors()))  # fmt: skip
add(
    "regularizer_of_weights_loss_sum",
    mlp(kernel_regularizer=keras.regularizers.L1L2(0.05, 0.05)),
    vectors,
    arguments=squared("sum"),
    optimizer=slow,
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
)
add(
    "regularizers_of_both",
    mlp(
        kernel_regularizer=keras.regularizers.L2(0.05),
        activity_regularizer=keras.regularizers.L1(0.1),
    ),
    vectors,
    arguments=squared("mean_with_sample_weight"),
)
add(
    "regularizer_orthogonal",
    mlp(kernel_regularizer=keras.regularizers.OrthogonalRegularizer(0.05)),
    vectors,
)


class MeanOverExamples(Written):
    """Adds a scalar loss, a mean over the examples."""

    def call(self, x):
        y = super().call(x)
        self.add_loss(0.5 * ops.mean(ops.square(y - x[:, :CLASSES])))
        return y


class LossOfEachExample(Written):
    """Adds one loss an example, which Keras sums."""

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
add("add_loss_of_each_example", written(LossOfEachExample), vectors)
add("add_loss_in_a_layer", layer_adds_loss, vectors)
add("add_loss_only_mean", written(MeanOverExamples), without_targets,
    arguments=dict)  # fmt: skip
add("add_loss_only_of_each_example", written(LossOfEachExample), without_targets,
    arguments=dict)  # fmt: skip


# ------------------------------------------------------------- variables and gradients


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
)
add(
    "frozen_between_two_fits",
    mlp(),
    vectors,
    stages=(None, set_trainable("head", False)),
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
for _name in ("sgd_momentum", "adam", "adagrad", "rmsprop"):
    add(
        f"embedding_{_name}",
        flat_tokens,
        classified_tokens,
        arguments=logits(),
        optimizer=OPTIMIZERS[_name],
    )
for _name in ("clipnorm", "global_clipnorm", "clipvalue"):
    add(
        f"embedding_{_name}",
        flat_tokens,
        classified_tokens,
        arguments=logits(),
        optimizer=lambda _name=_name, **overrides: sgd(
            **FEATURES_OF_OPTIMIZERS[_name], **overrides
        ),
    )


class TiedEmbedding(keras.Model):
    """The embedding's table is also the last layer's kernel."""

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
)


class UnusedWeight(Written):
    """Has a variable that no loss depends on."""

    def build(self, shape):
        self.build_layers(shape)
        self.unused = self.add_weight(shape=(3,), initializer="ones", name="unused")


add(
    "gradient_none_on_all_pieces",
    written(UnusedWeight),
    vectors,
    optimizer=lambda **overrides: sgd(weight_decay=0.1, **overrides),
)


class Gated(Written):
    """A branch that runs only if an example of the batch needs it."""

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
    """Only examples of the second piece need the branch."""
    batches = vectors()
    for x, _ in batches:
        x[:, 0] = -np.abs(x[:, 0])
        x[PIECE : PIECE + 2, 0] *= -1
    if none_needed:
        batches[1][0][:, 0] = -np.abs(batches[1][0][:, 0])
    return batches


EAGER = {
    "arguments": lambda: {"loss": "mse", "run_eagerly": True},
    "backends": ("tensorflow", "torch"),
    "because": "JAX traces: a branch cannot depend on the data there",
}
add("gradient_none_on_some_pieces", written(Gated), gated_batches, **EAGER)
add(
    "gradient_none_on_all_pieces_of_one_update",
    written(Gated),
    lambda: gated_batches(none_needed=True),
    **EAGER,
)


class CountsExamples(layers.Layer):
    """Keeps a sum over all the examples that it has seen, and uses it."""

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


add("state_travels_from_piece_to_piece", counting, vectors)


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
)


def of_policy(policy):
    """Numbers that the half precisions hold exactly, so that sums are exact too."""

    @seeded
    def build():
        layer = layers.Dense(2, use_bias=False, dtype=policy)
        model = keras.Sequential([layers.Input((4,)), layer])
        layer.kernel.assign([[1, -1], [0.5, 0], [0, 1], [-1, 0.5]])
        return model

    return build


class Product(keras.losses.Loss):
    """Linear in the prediction: its gradient is the target."""

    def call(self, y_true, y_pred):
        return ops.sum(y_true * y_pred, axis=-1)


def small_integers():
    def make(r, n):
        return (
            r.integers(-1, 2, (n, 4)).astype("float32"),
            r.integers(-1, 2, (n, 2)).astype("float32"),
        )

    return each_size(make, sizes=(16, 8))


POLICIES = {
    "mixed_bfloat16": of_class("SGD", learning_rate=0.5),
    "mixed_float16": loss_scaled(initial_scale=4.0),
}
for _policy, _optimizer in POLICIES.items():
    add(
        f"policy_{_policy}",
        of_policy(_policy),
        small_integers,
        arguments=lambda: {"loss": Product()},
        optimizer=_optimizer,
    )
add(
    "float64",
    mlp(),
    lambda: weighted(vectors()),
    arguments=squared("sum"),
    optimizer=of_class("Adam", learning_rate=0.1),
    floatx="float64",
    backends=("tensorflow",),
    because="JAX needs a flag of the process; Keras on PyTorch computes in float32",
)


# ----------------------------------------------------------------------------- layers


def sequential(shape, *body):
    @seeded
    def build():
        model = keras.Sequential([layers.Input(shape)])
        for make in body:
            model.add(make())
        return model

    return build


add(
    "layer_conv2d",
    sequential(
        (8, 8, 2),
        lambda: layers.Conv2D(4, 3, activation="tanh"),
        lambda: layers.AveragePooling2D(2),
        lambda: layers.Flatten(),
        lambda: layers.Dense(CLASSES),
    ),
    images,
    arguments=logits(),
)
add(
    "layer_depthwise_and_transposed_conv",
    sequential(
        (8, 8, 2),
        lambda: layers.SeparableConv2D(4, 3, strides=2, activation="tanh"),
        lambda: layers.Conv2DTranspose(3, 3, strides=2, activation="tanh"),
        lambda: layers.GlobalAveragePooling2D(),
        lambda: layers.Dense(CLASSES),
    ),
    images,
    arguments=logits(),
)
add(
    "layer_lstm_masked",
    of_tokens(lambda: layers.LSTM(4), lambda: layers.Dense(CLASSES)),
    lambda: weighted(classified_tokens()),
    arguments=logits(),
)
add(
    "layer_gru_bidirectional_masked",
    of_tokens(
        lambda: layers.Bidirectional(layers.GRU(3, return_sequences=True)),
        dense_steps(),
    ),
    token_sequences,
)


@seeded
def attention():
    """A transformer block. No biases: the key's has a gradient of zero."""
    x = layers.Input((STEPS,), dtype="int32")
    h = layers.Embedding(TOKENS, 8, mask_zero=True)(x)
    a = layers.MultiHeadAttention(2, 4, use_bias=False)(h, h)
    h = layers.LayerNormalization()(h + a)
    h = layers.LayerNormalization()(h + layers.Dense(8, activation="gelu")(h))
    return keras.Model(x, layers.Dense(2)(h))


add(
    "layer_attention_masked",
    attention,
    lambda: weighted_rows(token_sequences()),
    optimizer=of_class("SGD", learning_rate=0.02),
)


@seeded
def frozen_normalization():
    x = layers.Input((FEATURES,))
    h = layers.Dense(8)(x)
    normalization = layers.BatchNormalization()
    h = normalization(h)
    normalization.moving_mean.assign(np.linspace(-1, 1, 8))
    normalization.moving_variance.assign(np.linspace(0.5, 2, 8))
    normalization.trainable = False
    return keras.Model(x, layers.Dense(CLASSES)(layers.Activation("tanh")(h)))


add("layer_batch_normalization_frozen", frozen_normalization, vectors)
add(
    "layer_group_and_unit_normalization",
    sequential(
        (FEATURES,),
        lambda: layers.Dense(8),
        lambda: layers.GroupNormalization(groups=2),
        lambda: layers.Activation("tanh"),
        lambda: layers.UnitNormalization(),
        lambda: layers.Dense(CLASSES),
    ),
    vectors,
)
add(
    "layers_inside_a_model_inside_a_model",
    sequential((FEATURES,), mlp(5), lambda: layers.Dense(CLASSES)),
    vectors,
)


# ---------------------------------------------------------- subclassed models, metrics


class OwnComputeLoss(Written):
    """A loss of its own, a mean over the examples."""

    def __init__(self):
        super().__init__()
        self.hidden.kernel_regularizer = keras.regularizers.L2(0.05)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return ops.mean(ops.square(y - y_pred)) + sum(self.losses)


class MoreComputeLoss(Written):
    """The compiled loss and another one."""

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        training = {} if KERAS_2 else {"training": training}
        loss = super().compute_loss(x, y, y_pred, sample_weight, **training)
        return loss + 0.2 * ops.mean(ops.abs(y_pred))


class OwnComputeMetrics(Written):
    """A metric that `compile` knows nothing about."""

    def __init__(self):
        super().__init__()
        self.size = keras.metrics.Mean(name="size")

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        self.size.update_state(ops.mean(ops.abs(y_pred), axis=-1))
        return {**logs, "size": self.size.result()}


class OfNamedInputs(Written):
    """Its `call` takes a nested structure and `training`."""

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
add("subclass_compute_loss", written(OwnComputeLoss), vectors, arguments=dict)
add("subclass_compute_loss_calls_super", written(MoreComputeLoss), vectors)
add(
    "subclass_compute_metrics",
    written(OwnComputeMetrics),
    vectors,
    arguments=lambda: {"loss": "mse", "metrics": ["mae"]},
)
add(
    "subclass_nested_inputs",
    of_named_inputs,
    nested_batches,
    arguments=lambda: {"loss": {"y": "mse", "double": "mae"}},
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
            # Keras 2's needs to know the shape of the targets.
            *([] if KERAS_2 else [keras.metrics.F1Score(name="f1")]),
            keras.metrics.TopKCategoricalAccuracy(2, name="top"),
        ],
        "weighted_metrics": [
            "accuracy",
            keras.metrics.AUC(num_thresholds=20, name="auc_weighted"),
            keras.metrics.CategoricalCrossentropy(name="cce_weighted"),
        ],
    },
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
)
