"""The steps that Hugging Face's TensorFlow models add to Keras's `train_step`.

Their `train_step` finds the labels among the inputs, and the output that belongs to
each label. A model that was compiled without a loss is trained on the loss that its
`call` returns from the labels among its inputs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import tensorflow as tf

from gradient_accumulator.compat.attributes import with_attribute
from gradient_accumulator.compat.keras2_names import keras


def is_one(model: Any) -> bool:
    """Whether a model trains by Hugging Face's `train_step`."""
    return (type(model).train_step.__module__ or "").startswith("transformers.")


def has_own_loss(model: Any) -> bool:
    """Whether a model was compiled without a loss, and so trains on its own."""
    return bool(getattr(model, "_using_dummy_loss", False))


def _library(model) -> ModuleType:
    return sys.modules[type(model).train_step.__module__]


# ------------------------------------------------------------------ data and outputs


def unpack(model: Any, data: Any) -> tuple:
    """Returns inputs, targets and sample weights.

    The inputs contain the labels that the model's `call` takes.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    arguments = list(inspect.signature(model.call).parameters)
    labels = _library(model).find_labels(type(model))
    outputs = model.get_label_to_output_name_mapping()
    if has_own_loss(model) and y is not None:
        x = _with_labels(x, y, arguments, labels, outputs)
    if y is None and isinstance(x, dict):
        y = {name: x[name] for name in x if name in labels}
    if isinstance(y, dict) and not y:
        raise ValueError(
            "A Hugging Face model needs labels: give them to `fit` as `y`, or among "
            f"the inputs by the name of an argument of its `call`, one of {labels}. "
            f"Received: inputs {sorted(x)}"
        )
    if isinstance(y, dict):
        y = {outputs.get(name, name): value for name, value in y.items()}
    return x, y, sample_weight


def _with_labels(x, y, arguments, labels, outputs):
    x = dict(x) if isinstance(x, dict) else {arguments[0]: x}
    if not isinstance(y, dict):
        if len(labels) == 1:
            x.setdefault(labels[0], y)
        return x
    of_outputs = {output: label for label, output in outputs.items()}
    for name, value in y.items():
        name = name if name in arguments else of_outputs.get(name)
        if name in arguments:
            x.setdefault(name, value)
    return x


def matched(y: Any, outputs: Any) -> tuple:
    """Returns the targets, and the outputs that belong to them."""
    loss_first = next(iter(outputs)) == "loss"
    others = outputs.to_tuple()[int(loss_first) :]
    if isinstance(y, dict) and len(y) > 1:
        return y, {name: value for name, value in outputs.items() if name in y}
    if isinstance(y, dict):
        ((name, y),) = y.items()
        return y, outputs[name] if name in outputs else others[0]
    if isinstance(y, (tuple, list)):
        return y, others[: len(y)]
    return y, others[0]


# ------------------------------------------------------------------ their own losses


def _counted(model) -> dict[Callable, Callable | None]:
    """Returns the loss functions that are known, each with a function of the labels.

    That function tells which labels count in the mean that the loss is. It is None for
    losses that have a value for each example.
    """
    library = _library(model)

    def of(name):
        return getattr(library, name).hf_compute_loss

    known: dict[Callable, Callable | None] = {
        of("TFSequenceClassificationLoss"): None,
        of("TFMultipleChoiceLoss"): None,
        of("TFQuestionAnsweringLoss"): None,
    }
    # With legacy losses, the values of labels that do not count are missing.
    if not model.config.tf_legacy_loss:
        known[of("TFNextSentencePredictionLoss")] = None
        known[of("TFCausalLanguageModelingLoss")] = lambda labels: labels != -100
        known[of("TFTokenClassificationLoss")] = lambda labels: labels >= 0
    return known


def is_mean_of_labels(model: Any) -> bool:
    """Whether a model's own loss is one number for a batch."""
    return _counted(model)[type(model).hf_compute_loss] is not None


def check_own_loss(model: Any) -> None:
    """Raise unless the denominator of a model's own loss is known."""
    if getattr(type(model), "hf_compute_loss", None) not in _counted(model):
        raise _not_known(model)


def _not_known(model):
    return ValueError(
        "The denominator of this Hugging Face model's own loss is not known. Compile "
        "the model with a loss of Keras for its first output, or with a dict of losses "
        "by the names of its outputs, such as "
        "`tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)`, with "
        "`ignore_class=-100` if some labels do not count, and give `fit` the targets "
        f"beside the inputs. Received: model={model} (of type {type(model).__name__}) "
        "compiled without a loss"
    )


def with_own_loss(model: Any, x: Any, training: bool) -> Any:
    """Call a model, whose own loss becomes values with a mask.

    Their masked mean is the loss. The denominator is then measured as for any loss with
    a mask.
    """
    counted = _counted(model)[type(model).hf_compute_loss]
    compute = model.hf_compute_loss
    made: list = []

    def hf_compute_loss(labels, logits):
        if counted is None:
            made.append((compute(labels, logits), None))
        else:
            mask = counted(labels)
            # The mean of no values is NaN. It has no weight, so that any other will do.
            some = tf.where(tf.reduce_any(mask), labels, tf.zeros_like(labels))
            made.append((compute(some, logits), tf.reshape(mask, [-1])))
        return made[-1][0]

    arguments = inspect.signature(model.call).parameters
    keywords = {"return_loss": True} if "return_loss" in arguments else {}
    with with_attribute(model, "hf_compute_loss", hf_compute_loss):
        outputs = model(x, training=training, **keywords)
    if len(made) != 1 or outputs.loss is not made[0][0]:
        raise _not_known(model)
    value, mask = made[0]
    if mask is not None:
        outputs["loss"] = tf.broadcast_to(tf.reshape(value, []), tf.shape(mask))
        outputs["loss"]._keras_mask = mask
    return outputs


def own_loss(model: Any, outputs: Any, sample_weight: Any) -> tuple:
    """Returns the targets and predictions that the compiled loss is called with."""
    loss = outputs.loss
    if not is_mean_of_labels(model):
        return loss, loss
    if sample_weight is not None:
        raise ValueError(
            "Argument `sample_weight` of `fit` must be left out if a Hugging Face "
            "model's own loss is one number for the batch: compile the model with a "
            "loss of Keras. Received: sample weights of shape "
            f"{tuple(sample_weight.shape)}"
        )
    # Keras weighs a batch by the length of the targets, which is 1 in plain training.
    return loss[:1], loss
