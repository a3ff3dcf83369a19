"""Adaptive gradient clipping: results equal optax's, and it clips once an update."""

import dataclasses

import keras
import numpy as np
import optax
import problems
import pytest
from helpers import (
    BACKEND,
    array,
    assert_same,
    core_on,
    even,
    in_microbatches,
    microbatches,
    moved,
    named,
    train,
)
from keras import layers, ops

from gradient_accumulator import (
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    accumulate,
    accumulated_value_and_grad,
    adaptive_clip_grad,
    compute_norm,
    unitwise_norm,
)

pytestmark = core_on("torch")

CLIP, EPS = 0.05, 1e-2


def kernels(layer, *shapes):
    """A built layer's weights, as NumPy arrays."""
    layer.build(*shapes)
    return [array(v).astype("float32") for v in layer.trainable_variables]


LAYERS = {
    "dense": lambda: kernels(layers.Dense(5), (None, 3)),
    "dense of one feature": lambda: kernels(layers.Dense(5), (None, 1)),
    "dense of one unit": lambda: kernels(layers.Dense(1), (None, 5)),
    "conv1d": lambda: kernels(layers.Conv1D(5, 3), (None, 9, 2)),
    "conv2d": lambda: kernels(layers.Conv2D(5, 3), (None, 9, 9, 2)),
    "conv2d of one value": lambda: kernels(layers.Conv2D(5, 1), (None, 9, 9, 1)),
    "conv3d": lambda: kernels(layers.Conv3D(5, 3), (None, 9, 9, 9, 2)),
    "depthwise": lambda: kernels(
        layers.DepthwiseConv2D(3, depth_multiplier=2), (None, 9, 9, 4)
    ),
    "attention": lambda: kernels(
        layers.MultiHeadAttention(2, 4), (None, 3, 8), (None, 3, 8)
    ),
    "embedding": lambda: kernels(layers.Embedding(7, 4), (None, 3)),
    "a scalar": lambda: [np.array(2.0, "float32")],
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.slow
def test_as_optax(kind):
    weights = LAYERS[kind]()
    r = np.random.default_rng(0)
    for size in (0.0, 1e-5, 1e-2, 1.0, 1e3):
        # The weight also has units whose gradients are small and stay.
        gradients = [
            np.array(
                r.normal(size=w.shape) * size * r.choice([1e-3, 1], w.shape[-1:]),
                "float32",
            )
            for w in weights
        ]
        clip = optax.adaptive_grad_clip(CLIP, EPS)
        expected, _ = clip.update(gradients, clip.init(weights), weights)
        got = adaptive_clip_grad(
            [ops.convert_to_tensor(w) for w in weights],
            [ops.convert_to_tensor(g) for g in gradients],
            CLIP,
            EPS,
        )
        for a, b in zip(got, expected, strict=True):
            a = ops.convert_to_numpy(a)
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "shape, norms",
    [
        ((), ()),
        ((4,), (1,)),
        ((3, 4), (1, 4)),
        ((3, 2, 4), (1, 2, 4)),
        ((3, 3, 2, 4), (1, 1, 1, 4)),
        ((3, 3, 3, 2, 4), (1, 1, 1, 1, 4)),
        ((1, 1, 4), (1, 1, 1)),
    ],
)
def test_the_units_of_each_rank(shape, norms):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    got = ops.convert_to_numpy(unitwise_norm(ops.convert_to_tensor(x)))
    assert got.shape == norms
    axes = tuple(i for i, n in enumerate(norms) if n == 1)
    expected = np.sqrt(np.sum(np.square(x), axis=axes, keepdims=True))
    np.testing.assert_allclose(got, expected.reshape(norms), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_norm_does_not_overflow(dtype):
    x = ops.cast(ops.full((8, 2), 300.0), dtype)
    norm = compute_norm(x, axis=0)
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.cast(norm, "float32")), 300 * np.sqrt(8), rtol=1e-2
    )
    assert tuple(compute_norm(x, axis=0, keepdims=True).shape) == (1, 2)
    assert tuple(compute_norm(x).shape) == ()


class Clipped(keras.optimizers.SGD):
    """Plain Keras that clips the unscaled gradient, which it has in the update."""

    excluded = ()

    def update_step(self, gradient, variable, learning_rate):
        # On TensorFlow an update gets TensorFlow's own variables.
        path = getattr(variable, "path", variable.name)
        if not any(name in path for name in self.excluded):
            if BACKEND == "tensorflow":
                import tensorflow as tf

                gradient = tf.convert_to_tensor(gradient)
            axes = tuple(range(max(len(gradient.shape) - 1, 1)))
            if len(gradient.shape) == 3:
                axes = (0,)

            def norm(x):
                return ops.sqrt(ops.sum(x * x, axis=axes, keepdims=True))

            largest = CLIP * ops.maximum(norm(ops.convert_to_tensor(variable)), EPS)
            large = norm(gradient)
            gradient = gradient * ops.where(large < largest, 1.0, largest / large)
        super().update_step(gradient, variable, learning_rate)


def clipped(*excluded, **settings):
    optimizer = Clipped(0.3, momentum=0.5, **settings)
    optimizer.excluded = excluded
    return optimizer


def with_optimizer(problem, make):
    return dataclasses.replace(problem, optimizer=make)


def plain_sgd(**settings):
    return keras.optimizers.SGD(0.3, momentum=0.5, **settings)


def scaled(optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10)


PAIRS = {
    "": (clipped, plain_sgd),
    "a static scale": (
        lambda: clipped(loss_scale_factor=64.0),
        lambda: plain_sgd(loss_scale_factor=64.0),
    ),
    "a dynamic scale": (lambda: scaled(clipped()), lambda: scaled(plain_sgd())),
}


@pytest.mark.parametrize("way", problems.WAYS_OF_FIT)
@pytest.mark.parametrize("name", [p.name for p in problems.here() if p.agc])
@core_on("jax", "torch")
def test_an_update_is_clipped_once(name, way):
    problem = named(name)
    reference = train(with_optimizer(problem, clipped), problem.batches())
    assert_same(agc(with_optimizer(problem, plain_sgd), way), reference)
    # Clipping must have changed the update.
    unclipped = train(with_optimizer(problem, plain_sgd), problem.batches())
    assert moved(reference) < 0.9 * moved(unclipped)


@pytest.mark.parametrize("way", problems.WAYS_OF_FIT)
@pytest.mark.parametrize("scaling", PAIRS)
def test_clipping_sees_the_unscaled_gradient(scaling, way):
    problem = named("weights_int")
    reference, wrapped = (with_optimizer(problem, make) for make in PAIRS[scaling])
    assert_same(agc(wrapped, way), train(reference, problem.batches()))


def agc(problem, way):
    return in_microbatches(problem, way, use_agc=True, clip_factor=CLIP, eps=EPS)


def test_clipped_microbatches_add_up_to_something_else():
    problem = with_optimizer(named("weights_int"), clipped)
    whole = train(problem, problem.batches())
    # An optimizer that clips every micro-batch, as version 0.5.2 did.
    with pytest.raises(AssertionError):
        assert_same(train(problem, microbatches(problem)), whole)


def test_one_microbatch_an_update():
    problem = named("weights_int")
    reference = train(with_optimizer(problem, clipped), problem.batches())
    trained = train(
        with_optimizer(problem, plain_sgd),
        problem.batches(),
        lambda model: accumulate(
            model, accum_steps=1, use_agc=True, clip_factor=CLIP, eps=EPS
        ),
    )
    assert_same(trained, reference)


EXCLUDED = {
    "a layer": lambda model: model.layers[-1],
    "its name": lambda model: "head",
    "a variable's path": lambda model: ["head/kernel", "head/bias"],
    "a predicate": lambda model: lambda variable: "head" in variable.path,
}


@pytest.mark.parametrize("kind", EXCLUDED)
def test_what_is_excluded_is_not_clipped(kind):
    problem = named("weights_int")
    reference = train(
        with_optimizer(problem, lambda: clipped("head")), problem.batches()
    )
    trained = train(
        with_optimizer(problem, plain_sgd),
        problem.batches(),
        lambda model: accumulate(
            model,
            microbatch_size=5,
            use_agc=True,
            clip_factor=CLIP,
            eps=EPS,
            agc_exclude=EXCLUDED[kind](model),
        ),
    )
    assert_same(trained, reference)


def test_a_layer_excludes_itself_only():
    heads = [layers.Dense(2, name="head") for _ in range(2)]
    for head in heads:
        head.build((None, 3))
    variables = [w for head in heads for w in head.weights]
    gradients = [ops.full(v.shape, 100.0) for v in variables]
    clipped_too = adaptive_clip_grad(variables, gradients, agc_exclude=heads[1])
    sizes = [float(ops.max(g)) for g in clipped_too]
    assert [size == 100 for size in sizes] == [False, False, True, True]


def functional(**settings):
    keras.utils.set_random_seed(1)
    x = layers.Input((6,))
    y = layers.Dense(3, name="head")(layers.Dense(8, name="hidden")(x))
    return GradientAccumulateModel(
        inputs=x,
        outputs=y,
        microbatch_size=2,
        use_agc=True,
        clip_factor=CLIP,
        eps=EPS,
        **settings,
    )


DATA = (
    np.random.default_rng(0).normal(size=(8, 6)).astype("float32"),
    np.random.default_rng(1).normal(size=(8, 3)).astype("float32"),
)


@pytest.mark.parametrize("kind", EXCLUDED)
@pytest.mark.core
def test_a_saved_model_clips_as_before(kind, tmp_path):
    model = functional()
    model = functional(agc_exclude=EXCLUDED[kind](model))
    model.compile(plain_sgd(), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "m.keras")
    copies = [keras.models.load_model(tmp_path / "m.keras")]
    copies.append(keras.models.clone_model(model))
    copies[-1].set_weights(model.get_weights())
    copies[-1].compile(plain_sgd(), "mse")
    model.fit(*DATA, batch_size=8, shuffle=False, verbose=0)
    for copy in copies:
        copy.fit(*DATA, batch_size=8, shuffle=False, verbose=0)
        for a, b in zip(copy.weights, model.weights, strict=True):
            np.testing.assert_array_equal(array(a), array(b))


@pytest.mark.parametrize("scaling", PAIRS)
@pytest.mark.core
def test_the_optimizer_wrapper_clips_the_finished_gradient(scaling):
    problem = named("weights_int")
    batch, given = even(problem)
    reference, inner = PAIRS[scaling]

    def wrapped():
        return GradientAccumulateOptimizer(
            inner(), len(given), use_agc=True, clip_factor=CLIP, eps=EPS
        )

    assert_same(
        train(with_optimizer(problem, wrapped), given),
        train(with_optimizer(problem, reference), [batch]),
    )


def test_a_scaler_around_the_optimizer_wrapper():
    problem = named("weights_int")
    batch, given = even(problem)

    def wrapped():
        return scaled(
            GradientAccumulateOptimizer(
                plain_sgd(), len(given), use_agc=True, clip_factor=CLIP, eps=EPS
            )
        )

    reference = with_optimizer(problem, lambda: scaled(clipped()))
    assert_same(
        train(with_optimizer(problem, wrapped), given), train(reference, [batch])
    )


@pytest.mark.core
def test_the_optimizer_wrapper_is_made_again():
    model = functional()
    optimizer = GradientAccumulateOptimizer(
        "sgd", 2, use_agc=True, agc_exclude=lambda v: v.path.endswith("bias")
    )
    with pytest.raises(ValueError, match="Received: agc_exclude="):
        optimizer.get_config()
    optimizer.build(model.trainable_variables)
    config = optimizer.get_config()
    assert config["agc_exclude"] == ["hidden/bias", "head/bias"]
    again = GradientAccumulateOptimizer.from_config(config)
    again.build(model.trainable_variables)
    assert again.get_config() == config
    assert "use_agc" not in GradientAccumulateOptimizer("sgd", 2).get_config()


def test_in_a_loop_of_ones_own():
    """Clipping transforms the gradients between the function and the optimizer."""
    model = functional()
    x, y = (ops.convert_to_tensor(a) for a in DATA)
    variables = model.trainable_variables

    if BACKEND == "jax":
        import jax

        def loss_fn(trainable, microbatch):
            a, b = microbatch
            out, _ = model.stateless_call(trainable, model.non_trainable_variables, a)
            return ops.mean(ops.square(out - b))

        whole = jax.grad(loss_fn)([v.value for v in variables], (x, y))
        compiled, given = jax.jit, [v.value for v in variables]
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        def loss_fn(microbatch):
            a, b = microbatch
            return ops.mean(ops.square(model(a) - b))

        with tf.GradientTape() as tape:
            loss = loss_fn((x, y))
        whole = tape.gradient(loss, [v.value for v in variables])
        compiled, given = tf.function, variables
    else:
        import torch

        def loss_fn(microbatch):
            a, b = microbatch
            return ops.mean(ops.square(model(a) - b))

        whole = torch.autograd.grad(loss_fn((x, y)), [v.value for v in variables])
        compiled, given = (lambda f: f), variables
    value_and_grad = accumulated_value_and_grad(loss_fn, microbatch_size=2)

    def step(x, y):
        _, gradients = value_and_grad(given, (x, y))
        return adaptive_clip_grad(given, gradients, CLIP, EPS)

    for got, expected in zip(
        compiled(step)(x, y), adaptive_clip_grad(given, whole, CLIP, EPS), strict=True
    ):
        np.testing.assert_allclose(
            ops.convert_to_numpy(got), ops.convert_to_numpy(expected), atol=1e-6
        )


def test_a_gradient_that_is_none_stays_none():
    weight = ops.ones((2, 3))
    assert adaptive_clip_grad([weight], [None]) == [None]


def test_a_gradient_that_is_not_finite_stays_so():
    (got,) = adaptive_clip_grad([ops.ones((1,))], [ops.full((1,), float("inf"))])
    assert not np.isfinite(ops.convert_to_numpy(got)).any()


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"clip_factor": 0}, ValueError),
        ({"clip_factor": -1.0}, ValueError),
        ({"clip_factor": float("nan")}, ValueError),
        ({"clip_factor": "0.01"}, TypeError),
        ({"clip_factor": True}, TypeError),
        ({"eps": 0.0}, ValueError),
        ({"eps": None}, TypeError),
        ({"agc_exclude": 3}, TypeError),
        ({"agc_exclude": ["head", None]}, TypeError),
    ],
)
def test_bad_arguments(settings, error):
    name = next(iter(settings))
    for make in (
        lambda: accumulate(
            problems.classifier(), microbatch_size=2, use_agc=True, **settings
        ),
        lambda: GradientAccumulateOptimizer("sgd", 2, use_agc=True, **settings),
        lambda: adaptive_clip_grad([ops.ones(2)], [ops.ones(2)], **settings),
    ):
        with pytest.raises(error, match=rf"`{name}`.*Received: {name}="):
            make()


def test_one_gradient_for_each_parameter():
    with pytest.raises(ValueError, match="Received: 1 gradients for 2 parameters"):
        adaptive_clip_grad([ops.ones(2)] * 2, [ops.ones(2)])


@pytest.mark.parametrize("entry", ["tail", layers.Dense(2)])
def test_what_is_excluded_must_be_there(entry):
    model = problems.classifier()
    before = model.get_weights()
    model.compile(plain_sgd(), "mse")
    accumulate(model, microbatch_size=2, use_agc=True, agc_exclude=entry)
    with pytest.raises(ValueError, match=r"`agc_exclude`.*head/kernel.*Received"):
        model.fit(*DATA, verbose=0)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    optimizer = GradientAccumulateOptimizer("sgd", 2, use_agc=True, agc_exclude=entry)
    with pytest.raises(ValueError, match=r"`agc_exclude`.*head/kernel.*Received"):
        optimizer.build(model.trainable_variables)
    accumulate(model, microbatch_size=2)
    model.fit(*DATA, verbose=0)


def test_in_microbatches_alone_clips_nothing():
    problem = with_optimizer(named("weights_int"), plain_sgd)
    assert_same(
        in_microbatches(problem, "microbatch_size"), train(problem, problem.batches())
    )
