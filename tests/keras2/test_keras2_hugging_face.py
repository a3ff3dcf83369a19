"""A Hugging Face model on Keras 2, in micro-batches, on texts from scikit-learn."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from api import KERAS_2

if not KERAS_2:
    pytest.skip("of Keras 2 only", allow_module_level=True)

from gradient_accumulator import GradientAccumulateModel, accumulate

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("sklearn.datasets")

STEPS, EXAMPLES, MICROBATCH = 24, 12, 4


def sentences():
    """Lines of the descriptions of scikit-learn's data sets, with the set's number."""
    loaders = (datasets.load_iris, datasets.load_wine, datasets.load_digits)
    lines = []
    for label, load in enumerate(loaders):
        words = [line.split() for line in load().DESCR.splitlines()]
        words = [line for line in words if len(line) > 3]
        lines += [(line, label) for line in words[: EXAMPLES // 3]]
    return lines


def tokens():
    """Inputs (the numbers of words, and a mask of the padding), and labels."""
    lines = sentences()
    vocabulary = sorted({word.lower() for line, _ in lines for word in line})
    number = {word: i + 1 for i, word in enumerate(vocabulary)}
    ids = np.zeros((len(lines), STEPS), "int32")
    for row, (line, _) in zip(ids, lines):
        row[: len(line)] = [number[word.lower()] for word in line[:STEPS]]
    labels = np.array([label for _, label in lines])
    order = np.random.default_rng(0).permutation(len(lines))
    ids, labels = ids[order], labels[order]
    return {"input_ids": ids, "attention_mask": (ids > 0).astype("int32")}, labels


def bert(kind=None, **settings):
    tf.keras.utils.set_random_seed(0)
    settings = {"num_labels": 3, **settings}
    config = transformers.BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=STEPS,
        # No dropout: micro-batches would draw other random numbers than the batch.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **settings,
    )
    model = (kind or transformers.TFBertForSequenceClassification)(config)
    model({k: v[:1] for k, v in tokens()[0].items()})
    return model


def functional(model):
    """The functional model that users make of it."""
    inputs = {
        name: tf.keras.Input((STEPS,), dtype="int32", name=name) for name in tokens()[0]
    }
    return tf.keras.Model(inputs, model(inputs).logits)


def crossentropy(**arguments):
    return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, **arguments)


def trained(model, batch=EXAMPLES, data=tokens, loss=crossentropy, **arguments):
    before = [w.numpy() for w in model.weights]
    if loss is not None:
        arguments["loss"] = loss()
    model.compile(tf.keras.optimizers.Adam(3e-2, epsilon=1e-3), **arguments)
    x, y, weights = tf.keras.utils.unpack_x_y_sample_weight(data())
    history = model.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=batch,
        epochs=3,
        shuffle=False,
        verbose=0,
    )
    return before, [w.numpy() for w in model.weights], history.history


def assert_same(trained, reference):
    _, weights, history = trained
    before, expected, expected_history = reference
    moved = [np.abs(b - c).max() for b, c in zip(expected, before)]
    assert max(moved) > 1e-2
    for a, b, m in zip(weights, expected, moved):
        # Softmax does not depend on the key's bias, whose gradient is rounding only.
        assert np.abs(a - b).max() <= 1e-5 * m + 1e-6
    assert history.keys() == expected_history.keys()
    for name, curve in expected_history.items():
        np.testing.assert_allclose(history[name], curve, rtol=1e-5)


def test_padding_is_masked():
    x, y = tokens()
    assert set(y) == {0, 1, 2}
    assert 0 < x["attention_mask"].mean() < 1


@pytest.mark.parametrize("microbatch_size", [4, 5])
def test_in_place(microbatch_size):
    model = accumulate(bert(), microbatch_size=microbatch_size)
    assert isinstance(model, transformers.TFBertForSequenceClassification)
    assert_same(trained(model), trained(bert()))


def labelled(kind):
    """Inputs with labels for some tokens. One micro-batch has no label."""
    x, y = tokens()
    if kind == "classes":
        labels = (x["input_ids"] + y[:, None]) % 3
    else:
        labels = x["input_ids"].copy()
    labels[x["attention_mask"] == 0] = -100
    labels[:5] = -100
    labels[6, 2:] = -100
    return x, labels


def gpt():
    tf.keras.utils.set_random_seed(0)
    config = transformers.GPT2Config(
        vocab_size=400,
        n_positions=STEPS,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.TFGPT2LMHeadModel(config)
    model({k: v[:1] for k, v in tokens()[0].items()})
    return model


def among_the_inputs(x, labels):
    return ({**x, "labels": labels},)


@dataclasses.dataclass(frozen=True)
class Own:
    """A model with its own loss.

    Args:
        make: A function that makes the model.
        data: A function that makes its data.
        arguments: Arguments of `compile`.
        full: Whether only `make test-full` runs it, because another one is like it.
    """

    make: Callable
    data: Callable
    arguments: dict = dataclasses.field(default_factory=dict)
    full: bool = False


OWN = {
    "sequences": Own(bert, tokens, {"metrics": ["accuracy"]}),
    "sequences_among_the_inputs": Own(bert, lambda: among_the_inputs(*tokens())),
    "regression": Own(
        lambda: bert(num_labels=1),
        lambda: (tokens()[0], tokens()[1].astype("float32")),
        full=True,  # like "sequences": a value for each example
    ),
    "tokens": Own(
        lambda: bert(transformers.TFBertForTokenClassification),
        lambda: labelled("classes"),
    ),
    "masked_words": Own(
        lambda: bert(transformers.TFBertForMaskedLM),
        lambda: labelled("words"),
    ),
    "next_words": Own(gpt, lambda: among_the_inputs(*labelled("words"))),
    "answers": Own(
        lambda: bert(transformers.TFBertForQuestionAnswering, num_labels=2),
        lambda: (
            tokens()[0],
            {"start_positions": tokens()[1], "end_positions": tokens()[1] + 2},
        ),
        full=True,  # like "sequences" too
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.full] if own.full else [])
        for name, own in OWN.items()
    ],
)
def test_compiled_without_a_loss(name):
    case = OWN[name]
    arguments = {"data": case.data, "loss": None, **case.arguments}
    reference = trained(case.make(), **arguments)
    for batch, settings in (
        (EXAMPLES, {"microbatch_size": 5}),
        (MICROBATCH, {"accum_steps": 3}),
    ):
        model = accumulate(case.make(), **settings)
        own = trained(model, batch, **arguments)
        assert_same(own, reference)


def test_a_loss_of_kerass_for_labels_that_do_not_count():
    """The loss is the one that the error advises."""

    def run(model):
        return trained(
            model,
            data=lambda: labelled("words"),
            loss=lambda: crossentropy(ignore_class=-100),
        )

    kind = transformers.TFBertForMaskedLM
    assert_same(run(accumulate(bert(kind), microbatch_size=5)), run(bert(kind)))


def of_two_sentences():
    x, y = tokens()
    return x, {"labels": labelled("words")[1], "next_sentence_label": y // 2}


NOT_TOLD = {
    "two_means": (
        lambda: bert(transformers.TFBertForPreTraining),
        of_two_sentences,
        r"own loss.* `ignore_class=-100`.* Received: model=",
    ),
    "legacy": (
        lambda: bert(transformers.TFBertForTokenClassification, tf_legacy_loss=True),
        lambda: labelled("classes"),
        r"own loss.* Received: model=",
    ),
    "weights": (
        lambda: bert(transformers.TFBertForTokenClassification),
        lambda: (*labelled("classes"), np.ones(EXAMPLES)),
        r"`sample_weight`.* Received: sample weights of shape",
    ),
    "no_labels": (
        bert,
        lambda: tokens()[:1],
        r"needs labels.* one of \['labels'\].* Received: inputs \['attention_mask'",
    ),
}


@pytest.mark.parametrize("name", NOT_TOLD)
def test_what_its_own_loss_is_divided_by_is_not_told(name):
    make, data, message = NOT_TOLD[name]
    model = accumulate(make(), microbatch_size=MICROBATCH)
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        trained(model, data=data, loss=None)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loss_of_ones_own_is_not_told():
    class Own(transformers.TFBertForSequenceClassification):
        def hf_compute_loss(self, labels, logits):
            return tf.reduce_mean(super().hf_compute_loss(labels, logits))

    with pytest.raises(ValueError, match=r"own loss.* Received: model=.*Own"):
        trained(accumulate(bert(Own), microbatch_size=MICROBATCH), loss=None)


def test_wrapped_as_a_functional_model():
    model = functional(bert())
    wrapped = GradientAccumulateModel(
        accum_steps=EXAMPLES // MICROBATCH, inputs=model.input, outputs=model.output
    )
    assert_same(trained(wrapped, MICROBATCH), trained(functional(bert())))
