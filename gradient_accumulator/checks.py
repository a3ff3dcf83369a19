"""Checks that raise for models that cannot train in micro-batches, with advice."""

from __future__ import annotations

import os
from typing import Any

from gradient_accumulator.accumulator import check_not_accumulating
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import KERAS_2, keras
from gradient_accumulator.received import described


def check_backend() -> None:
    """Raise if `KERAS_BACKEND` names another backend than Keras runs on."""
    if KERAS_2:  # which runs on TensorFlow only
        return
    wanted = os.environ.get("KERAS_BACKEND")
    running = keras.backend.backend()
    if wanted and wanted != running:
        raise ValueError(
            "The environment variable KERAS_BACKEND was changed after Keras was "
            "imported, which has no effect: set it before, in a new process. "
            f"Received: KERAS_BACKEND={wanted!r}, keras.backend.backend()={running!r}"
        )


def check_is_model(model: Any) -> None:
    """Raise unless `model` is a model of the Keras that is in use."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Argument `model` must be {trainer.A_MODEL}.{_of_the_other(model)} "
            f"Received: model={described(model)} (of type {type(model)})"
        )


def _of_the_other(model):
    """Returns a sentence on a model of another framework, or of another Keras."""
    modules = [cls.__module__ + "." for cls in type(model).__mro__]

    def is_of(*packages):
        return any(module.startswith(packages) for module in modules)

    if KERAS_2 and is_of("keras."):
        return (
            " This is a model of Keras 3's, and TF_USE_LEGACY_KERAS selects Keras 2 in "
            "this process: unset it, or build the model with `import tf_keras`."
        )
    if not KERAS_2 and is_of("tf_keras.", "tensorflow.python.keras."):
        return (
            " This is a Keras 2 model (tf_keras): set TF_USE_LEGACY_KERAS=1 before "
            "TensorFlow is imported, in a new process, or build it with `import keras`."
        )
    if is_of("torch.") and not isinstance(model, keras.layers.Layer):
        return (
            " This is a module of PyTorch's: in its training loop, take the gradients "
            "from `accumulated_value_and_grad`, under KERAS_BACKEND=torch."
        )
    return ""


def check_model(model: Any) -> None:
    """Raise unless `model` is a model whose train step is known."""
    check_is_model(model)
    for name, is_known in (
        (
            "train_step",
            trainer.has_known_train_step(model) and "train_step" not in model.__dict__,
        ),
        (
            "make_train_function",
            _makes_known_train_function(type(model)),
        ),
    ):
        if not is_known:
            raise ValueError(
                f"A model with its own `{name}` cannot train in micro-batches: what it "
                "does with a batch is not known. Override `compute_loss` and "
                "`compute_metrics` instead, or accumulate in it: take its gradients "
                "from `accumulated_value_and_grad(loss_fn, microbatch_size=...)`, or "
                "give it a `GradientAccumulateOptimizer(optimizer, accum_steps=...)`. "
                f"Received: model={model} (of type {type(model)})"
            )
    check_layers(model)


def _makes_known_train_function(cls: type) -> bool:
    """Whether no class of a user overrides `make_train_function`."""
    own = next(c for c in cls.__mro__ if "make_train_function" in vars(c))
    return own.__module__.partition(".")[0] in _KNOWN_PACKAGES


_KNOWN_PACKAGES = ("keras", "tf_keras", "gradient_accumulator")


def check_layers(model: keras.Model) -> None:
    """Raise if a layer keeps a state for each example of a batch."""
    for layer in trainer.layers_of(model):
        if getattr(layer, "stateful", False) and isinstance(
            layer, (keras.layers.RNN, keras.layers.Bidirectional)
        ):
            raise ValueError(
                "A stateful RNN cannot train in micro-batches: the state that it "
                "keeps for each example of the batch would go from one micro-batch's "
                "examples to the next micro-batch's. Use `stateful=False`. Received: "
                f"layer={layer}"
            )


def check_optimizer(model: keras.Model) -> None:
    """Raise if the model's optimizer accumulates by itself."""
    check_not_accumulating(
        getattr(model, "optimizer", None),
        "The model accumulates, and so does its optimizer.",
    )
