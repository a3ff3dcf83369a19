"""Every optimizer, schedules, and what an optimizer does besides."""

from api import keras, layers

from .data import FEATURES, vectors
from .models import mlp, seeded
from .problem import ALIKE, add, change, sgd

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
# When Keras 2 got those that its oldest version does not have.
KERAS_2_HAS = {"lion": "2.13", "lamb": None}
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
            keras2=KERAS_2_HAS.get(_name, "2.12"),
            alike=("fit",),
        )
if hasattr(keras.optimizers, "MultiOptimizer"):
    change("optimizer_multi_optimizer", core=("accum_steps",))
change("optimizer_loss_scale_optimizer", core=("microbatch_size", "optimizer"))
change(
    "optimizer_adam",
    devices=("jax", "torch", "tensorflow", "workers"),
    core=("microbatch_size", "accum_steps", "optimizer"),
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
        keras2="2.13" if _name == "warmup" else "2.12",
        **ALIKE,
    )
change("schedule_piecewise", core=("accum_steps",))
change("schedule_exponential_decay", devices=("jax", "torch"))

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
        keras2=None if _name == "loss_scale_factor" else "2.12",
        # A branch of replicas that wait for each other.
        plain_replicas=_name != "ema_overwrite_every_2",
    )
change("ema_overwrite_every_2", core=("accum_steps", "optimizer"))
change(
    "global_clipnorm",
    devices=("jax", "torch", "tensorflow", "workers"),
    core=("optimizer",),
)

# Two updates in a row with finite gradients double the scale.
add(
    "loss_scale_grows",
    mlp(),
    vectors,
    optimizer=loss_scaled(initial_scale=2.0**10, dynamic_growth_steps=2),
)


def one_overflow():
    """The first batch's gradient overflows when scaled, its loss does not."""
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
    skips_first=True,
    devices=("jax", "torch"),
    core=("microbatch_size", "accum_steps", "optimizer"),
)
add(
    "constraint_max_norm",
    mlp(kernel_constraint=keras.constraints.MaxNorm(0.8)),
    vectors,
    **ALIKE,
)
add("constraint_non_neg", mlp(kernel_constraint="non_neg"), vectors, **ALIKE)
add("constraint_unit_norm", mlp(kernel_constraint="unit_norm"), vectors, **ALIKE)
