"""Masks that layers compute, pass on, lose and draw, compared with plain Keras."""

import dataclasses

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND, arrays, assert_same, fit, in_microbatches, train, ways
from hypothesis import given
from hypothesis import strategies as st
from keras import layers, ops
from problems.problem import sgd

from gradient_accumulator import accumulate

STEPS, TOKENS, WIDTH = problems.STEPS, problems.TOKENS, 3


class Masks(layers.Layer):
    """Masks the steps whose inputs are all zeros."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, x):
        return x * 1.0

    def compute_mask(self, x, mask=None):
        return ops.any(x != 0, axis=-1)


class Drawn(layers.Layer):
    """Draws a mask from its own seed, which does not depend on the input."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.seed = keras.random.SeedGenerator(5)

    def call(self, x):
        return x * 1.0

    def compute_mask(self, x, mask=None):
        if isinstance(x, keras.KerasTensor):  # its number of examples is not known
            return keras.KerasTensor(x.shape[:2], "bool")
        return keras.random.uniform(ops.shape(x)[:2], seed=self.seed) > 0.5


def masked_by(*makers, outputs=1, regularizer=None):
    """A model whose mask comes from these layers."""

    @problems.seeded
    def build():
        x = h = layers.Input((STEPS, WIDTH))
        for make in makers:
            h = make()(h)
        heads = [
            layers.Dense(2, name=f"head_{k}", kernel_regularizer=regularizer)(h)
            for k in range(outputs)
        ]
        return keras.Model(x, heads if outputs > 1 else heads[0])

    return build


MODELS = {
    "one_loss": {},
    "two_losses": {"outputs": 2},
    "a_loss_and_a_penalty": {"regularizer": "l2"},
}
MAKERS = {
    "dropped": (lambda: layers.Dropout(0.7, seed=3), Masks),
    "drawn": (Drawn,),
}
models = pytest.mark.parametrize("model", MODELS)
makers = pytest.mark.parametrize("mask", MAKERS)


def float_steps(outputs, sizes=problems.data.SIZES):
    def make(r, n):
        y = 1 + problems.normal(r, n, STEPS, 2)
        x = problems.normal(r, n, STEPS, WIDTH)
        return x, y if outputs == 1 else (y,) * outputs

    return problems.each_size(make, sizes)


@models
@makers
@ways
def test_a_micro_batch_of_the_whole_batch_has_its_masks(way, mask, model):
    """With one micro-batch an update, every layer draws as in plain Keras."""
    settings = MODELS[model]
    batches = float_steps(settings.get("outputs", 1))
    problem = problems.Problem(
        "whole",
        masked_by(*MAKERS[mask], **settings),
        lambda: batches,
        optimizer=lambda: sgd(learning_rate=0.02),
        microbatches=lambda batch: [batch],
    )
    whole = max(len(x) for x, _ in batches)
    if way == "accum_steps":
        # The one micro-batch of the epoch is an update of 2: `accum_steps=1` is plain.
        problem = dataclasses.replace(problem, batches=lambda: batches[:1])
        trained = train(
            problem,
            batches[:1],
            lambda model: accumulate(model, accum_steps=2, warn=False),
        )
    else:
        trained = in_microbatches(problem, way, whole, warn=False)
    assert_same(trained, train(problem, problem.batches()))


@models
@makers
@ways
def test_the_mean_of_equal_values_is_that_value(way, mask, model):
    """With any drawn masks, the denominator is the number of the summed values."""
    settings = MODELS[model]
    outputs = settings.get("outputs", 1)
    built = masked_by(*MAKERS[mask], **settings)()
    for weight in built.trainable_weights:
        weight.assign(np.zeros(weight.shape))
    built.compile(keras.optimizers.SGD(0.0), "mse")
    accumulate(built, **{way: 5 if way == "microbatch_size" else 3})
    ((x, _),) = float_steps(1, [12])
    y = np.ones((12, STEPS, 2), "float32")
    history = fit(
        built,
        x,
        y if outputs == 1 else (y,) * outputs,
        batch_size=12 if way == "microbatch_size" else 5,
        epochs=3,
    ).history
    np.testing.assert_allclose(history["loss"], outputs, rtol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="modules of PyTorch's own")
@ways
def test_measuring_masks_leaves_what_keras_does_not_know_of(way):
    """PyTorch's own seeds, and state of its modules, move once for each micro-batch."""
    import torch

    class Wrapped(layers.TorchModuleWrapper):
        supports_masking = True

        def compute_output_shape(self, *_, **__):
            return (None, STEPS, 4)

    @problems.seeded
    def build():
        x = layers.Input((STEPS,), dtype="int32")
        h = layers.Embedding(TOKENS, 4, mask_zero=True)(x)
        module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(STEPS))
        h = Wrapped(module)(h)
        return keras.Model(x, [layers.Dense(2)(h), layers.Dense(2)(h)])

    r = problems.random()
    x, y = problems.tokens(r, 12), problems.normal(r, 12, STEPS, 2)
    results = []
    for each in (None, way):
        torch.manual_seed(0)
        model = build()
        model.compile(sgd(), "mse")
        if each:
            sizes = {"microbatch_size": 12, "accum_steps": 2}
            accumulate(model, **{each: sizes[each]}, warn=False)
        fit(model, x, (y, y), batch_size=12, epochs=2)
        buffers = {name: b.double().numpy() for name, b in model.named_buffers()}
        results.append((arrays(model.weights), buffers))
    for got, expected in zip(results[1], results[0], strict=True):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-5, err_msg=name)


# ------------------------------------------------------------------ drawn graphs

UNARY = {
    "dense": lambda: layers.Dense(WIDTH, activation="tanh"),
    "cast": lambda: lambda h: ops.cast(h, "float32"),
    "times_one": lambda: lambda h: h * 1.0,
    "squeezed": lambda: lambda h: ops.squeeze(ops.expand_dims(h, 1), 1),
    "dropout": lambda: layers.Dropout(0.0),
    "normalized": layers.LayerNormalization,
    "in_time": lambda: layers.TimeDistributed(layers.Dense(WIDTH)),
    "recurrent": lambda: layers.SimpleRNN(WIDTH, return_sequences=True),
    "convolved": lambda: layers.Conv1D(WIDTH, 3, padding="same"),
    "masks": lambda: layers.Masking(0.0),
    "begins_a_mask": Masks,
    "activity": lambda: layers.ActivityRegularization(l2=0.01),
}
BINARY = {
    "add": lambda: lambda a, b: layers.Add()([a, b]),
    "plus": lambda: lambda a, b: a + b,
    "concatenate": lambda: lambda a, b: layers.Concatenate()([a, b])[..., :WIDTH],
    "second": lambda: lambda a, b: layers.Maximum()([b, a]),
}


@st.composite
def graphs(draw):
    """A graph: inputs (a name, and whether it begins a mask), steps and outputs."""
    names = draw(st.permutations("abc"))[: draw(st.integers(1, 3))]
    inputs = [(name, draw(st.booleans())) for name in names]
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from([*UNARY, *BINARY]), st.integers(0, 9), st.integers(0, 9)
            ),
            min_size=1,
            max_size=5,
        )
    )
    outputs = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))
    return inputs, steps, outputs


def build_graph(inputs, steps, outputs):
    given = [layers.Input((STEPS,), dtype="int32", name=name) for name, _ in inputs]
    tensors = [
        layers.Embedding(TOKENS, WIDTH, mask_zero=masks)(each)
        for each, (_, masks) in zip(given, inputs)
    ]
    for name, first, second in steps:
        a, b = tensors[first % len(tensors)], tensors[second % len(tensors)]
        tensors.append(UNARY[name]()(a) if name in UNARY else BINARY[name]()(a, b))
    last = tensors[::-1]
    heads = [last[k % len(last)] for k in outputs]
    # Some outputs are of a layer, and some are of an operation.
    heads = {
        f"head_{k}": layers.Dense(2)(h) if k % 2 else h[..., :2]
        for k, h in enumerate(heads)
    }
    return keras.Model(given, _of_heads(heads))


def _of_heads(values):
    """The values by the names of heads. Keras requires that one head has no name."""
    return values if len(values) > 1 else values["head_0"]


@ways
@pytest.mark.filterwarnings("ignore:.*was passed an input with a mask:UserWarning")
@given(
    graph=graphs(),
    reduction=st.sampled_from(problems.TO_A_NUMBER),
    lengths=st.lists(st.integers(0, STEPS), min_size=12, max_size=12),
)
def test_drawn_graphs(way, graph, reduction, lengths):
    inputs, _, outputs = graph

    def make(r, n):
        x = {}
        for number, (name, _) in enumerate(sorted(inputs)):
            kept = np.arange(STEPS) < np.roll(lengths, number)[:n, None]
            x[name] = r.integers(1, TOKENS, (n, STEPS)).astype("int32") * kept
        y = {
            f"head_{k}": problems.normal(r, n, STEPS, 2) for k, _ in enumerate(outputs)
        }
        return x, _of_heads(y)

    problem = problems.Problem(
        "drawn",
        problems.seeded(lambda: build_graph(*graph)),
        lambda: problems.each_size(make),
        arguments=lambda: {
            "loss": _of_heads(
                {
                    f"head_{k}": keras.losses.MeanSquaredError(reduction=reduction)
                    for k, _ in enumerate(outputs)
                }
            )
        },
        optimizer=lambda: sgd(
            learning_rate=0.05 / (12 * STEPS if reduction == "sum" else 1)
        ),
        epochs=1,
    )
    trained = in_microbatches(problem, way)
    assert_same(trained, train(problem, problem.batches()))
