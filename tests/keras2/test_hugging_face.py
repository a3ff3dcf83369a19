"""A Hugging Face model on Keras 2, in pieces, on text that scikit-learn ships."""

import numpy as np
import pytest
import tensorflow as tf
from api import KERAS_2

if not KERAS_2:
    pytest.skip("of Keras 2 only", allow_module_level=True)

from gradient_accumulator import GradientAccumulateModel, accumulate

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("sklearn.datasets")

STEPS, EXAMPLES, PIECE = 24, 12, 4


def sentences():
    """The first words of the descriptions of scikit-learn's data sets, by data set."""
    loaders = (datasets.load_iris, datasets.load_wine, datasets.load_digits)
    lines = []
    for label, load in enumerate(loaders):
        words = [line.split() for line in load().DESCR.splitlines()]
        words = [line for line in words if len(line) > 3]
        lines += [(line, label) for line in words[: EXAMPLES // 3]]
    return lines


def tokens():
    """Numbers of words, with the mask of what is no padding."""
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


def bert():
    tf.keras.utils.set_random_seed(0)
    config = transformers.BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=STEPS,
        num_labels=3,
        # Pieces draw other random numbers than the full batch.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.TFBertForSequenceClassification(config)
    model({k: v[:1] for k, v in tokens()[0].items()})
    return model


def functional(model):
    """As its users wrap it."""
    inputs = {
        name: tf.keras.Input((STEPS,), dtype="int32", name=name) for name in tokens()[0]
    }
    return tf.keras.Model(inputs, model(inputs).logits)


def trained(model, batch=EXAMPLES):
    before = [w.numpy() for w in model.weights]
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.Adam(3e-2, epsilon=1e-3), loss)
    x, y = tokens()
    history = model.fit(x, y, batch_size=batch, epochs=3, shuffle=False, verbose=0)
    return before, [w.numpy() for w in model.weights], history.history["loss"]


def assert_same(trained, reference):
    _, weights, losses = trained
    before, expected, expected_losses = reference
    moved = [np.abs(b - c).max() for b, c in zip(expected, before)]
    assert max(moved) > 1e-2
    for a, b, m in zip(weights, expected, moved):
        # Softmax does not depend on the key's bias: its gradient is rounding only.
        assert np.abs(a - b).max() <= 1e-5 * m + 1e-6
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)


def test_padding_is_masked():
    x, y = tokens()
    assert set(y) == {0, 1, 2}
    assert 0 < x["attention_mask"].mean() < 1


@pytest.mark.parametrize("microbatch_size", [4, 5])
def test_in_place(microbatch_size):
    model = accumulate(bert(), microbatch_size=microbatch_size)
    assert isinstance(model, transformers.TFBertForSequenceClassification)
    assert_same(trained(model), trained(bert()))


def test_its_own_loss_cannot_be_taken_apart():
    model = bert()
    model.compile(tf.keras.optimizers.Adam(1e-2))
    accumulate(model, microbatch_size=PIECE)
    x, y = tokens()
    with pytest.raises(ValueError, match=r"own loss.* Received: model="):
        model.fit({**x, "labels": y}, batch_size=EXAMPLES, verbose=0)


def test_wrapped_as_a_functional_model():
    model = functional(bert())
    wrapped = GradientAccumulateModel(
        accum_steps=EXAMPLES // PIECE, inputs=model.input, outputs=model.output
    )
    assert_same(trained(wrapped, PIECE), trained(functional(bert())))
