"""Every optimizer, schedules, and the other settings of an optimizer."""

from api import keras, layers

from .data import FEATURES, vectors
from .models import mlp, seeded
from .problem import ALIKE, add, sgd

# If an update divides by the size of the gradient, `epsilon` is large. Otherwise the
# rounding of the smallest gradients would decide, and not their values.


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


OPTIMIZERS, SETTINGS = {}, {}  # by name, for other topics


def add_optimizer(name, optimizer, **fields):
    OPTIMIZERS[name] = optimizer
    add(
        f"optimizer_{name}",
        mlp(),
        vectors,
        optimizer=optimizer,
        alike=("fit",),
        **fields,
    )


add_optimizer("sgd", of_class("SGD", learning_rate=0.3))
add_optimizer("sgd_momentum", of_class("SGD", learning_rate=0.3, momentum=0.9))
add_optimizer(
    "sgd_nesterov", of_class("SGD", learning_rate=0.3, momentum=0.9, nesterov=True)
)
add_optimizer("rmsprop", of_class("RMSprop", learning_rate=0.05, epsilon=1e-2))
add_optimizer(
    "rmsprop_centered",
    of_class("RMSprop", learning_rate=0.05, epsilon=1e-2, centered=True, momentum=0.5),
)
add_optimizer(
    "adam",
    of_class("Adam", learning_rate=0.1, epsilon=1e-2),
    devices=("jax", "torch", "tensorflow", "workers"),
    core=("microbatch_size", "accum_steps", "optimizer"),
)
add_optimizer(
    "adam_amsgrad", of_class("Adam", learning_rate=0.1, epsilon=1e-2, amsgrad=True)
)
add_optimizer(
    "adamw", of_class("AdamW", learning_rate=0.1, epsilon=1e-2, weight_decay=0.1)
)
add_optimizer("adadelta", of_class("Adadelta", learning_rate=3.0, epsilon=1e-2))
add_optimizer("adagrad", of_class("Adagrad", learning_rate=0.2, epsilon=1e-2))
add_optimizer("adamax", of_class("Adamax", learning_rate=0.1, epsilon=1e-2))
add_optimizer("adafactor", of_class("Adafactor", learning_rate=0.3, epsilon_1=1e-4))
add_optimizer("nadam", of_class("Nadam", learning_rate=0.1, epsilon=1e-2))
add_optimizer(
    "ftrl", of_class("Ftrl", learning_rate=0.5, l1_regularization_strength=0.01)
)
add_optimizer(
    "lion", of_class("Lion", learning_rate=0.03, weight_decay=0.1), keras2="2.13"
)
add_optimizer("lamb", of_class("Lamb", learning_rate=0.1, epsilon=1e-2), keras2=None)
add_optimizer(
    "muon",
    of_class("Muon", learning_rate=0.1, epsilon=1e-2, ns_steps=2),
    needs="Muon",
)
add_optimizer(
    "schedule_free_adamw",
    of_class("ScheduleFreeAdamW", learning_rate=0.1, epsilon=1e-2, weight_decay=0.1),
    needs="ScheduleFreeAdamW",
    # It copies the weights when it is built. On TensorFlow plain Keras builds an
    # optimizer in the first step, and loses the copies.
    build_optimizer=True,
)
add_optimizer("multi_optimizer", multi, needs="MultiOptimizer", core=("accum_steps",))
add_optimizer(
    "loss_scale_optimizer",
    loss_scaled(initial_scale=2.0**10),
    core=("microbatch_size", "optimizer"),
)


def add_schedule(name, schedule, **fields):
    add(
        f"schedule_{name}",
        mlp(),
        vectors,
        optimizer=lambda **overrides: sgd(learning_rate=schedule(), **overrides),
        **ALIKE,
        **fields,
    )


add_schedule(
    "exponential_decay",
    lambda: keras.optimizers.schedules.ExponentialDecay(
        0.4, decay_steps=1, decay_rate=0.6
    ),
    devices=("jax", "torch"),
)
add_schedule(
    "piecewise",
    lambda: keras.optimizers.schedules.PiecewiseConstantDecay([1, 2], [0.4, 0.2, 0.1]),
    core=("accum_steps",),
)
add_schedule(
    "warmup",
    lambda: keras.optimizers.schedules.CosineDecay(
        0.05, decay_steps=3, warmup_target=0.4, warmup_steps=2
    ),
    keras2="2.13",
)


def add_setting(name, settings, **fields):
    SETTINGS[name] = settings
    add(
        name,
        mlp(),
        vectors,
        optimizer=lambda **overrides: sgd(**settings, **overrides),
        **fields,
    )


add_setting("clipnorm", {"clipnorm": 0.05})
add_setting(
    "global_clipnorm",
    {"global_clipnorm": 0.1},
    devices=("jax", "torch", "tensorflow", "workers"),
    core=("optimizer",),
)
add_setting("clipvalue", {"clipvalue": 0.02})
add_setting("weight_decay", {"weight_decay": 0.2})
add_setting(
    "ema_overwrite_every_2",
    {"use_ema": True, "ema_momentum": 0.6, "ema_overwrite_frequency": 2},
    plain_replicas=False,  # replicas wait for each other in a branch
    core=("accum_steps", "optimizer"),
)
add_setting("ema_overwrite_at_the_end", {"use_ema": True, "ema_momentum": 0.6})
add_setting("loss_scale_factor", {"loss_scale_factor": 128.0}, keras2=None)

# Two updates in a row with finite gradients double the scale.
add(
    "loss_scale_grows",
    mlp(),
    vectors,
    optimizer=loss_scaled(initial_scale=2.0**10, dynamic_growth_steps=2),
    scaler_around=True,
)


def one_overflow():
    """The scaled gradient of the first batch overflows, and its loss is finite."""
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
    scaler_around=True,
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
