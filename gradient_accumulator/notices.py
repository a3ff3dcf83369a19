"""Tells users how a model accumulates: each fact once, until settings change."""

from __future__ import annotations

import inspect
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gradient_accumulator import devices
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import keras
from gradient_accumulator.compat.attributes import with_attribute
from gradient_accumulator.coupling import couples, is_known, keras_own, name_of
from gradient_accumulator.layers import AccumBatchNormalization
from gradient_accumulator.microbatches import Epoch, leaves
from gradient_accumulator.settings import Accumulation
from gradient_accumulator.statistics import normalizations


class AccumulationWarning(UserWarning):
    """A model's updates differ from those on the batch, or nothing is accumulated.

    A model warns once, and again when it accumulates otherwise or is compiled with
    another loss. `accumulate(model, ..., warn=False)` silences the warnings of one
    model; this line silences those of all models:

    ```python
    warnings.filterwarnings("ignore", category=AccumulationWarning)
    ```
    """


class Notices:
    """Warnings and messages about one model, each of which is given once.

    Args:
        accumulation: How the model accumulates.
    """

    def __init__(self, accumulation: Accumulation):
        self.accumulation = accumulation
        self.said: set[str] = set()
        self.announced = False
        self.epoch_ended = False
        # The number of examples that `fit` draws at a time; None if it is not known.
        self.handed: int | None = None

    def warn(self, model: keras.Model, message: str) -> None:
        """Warn once, and in the first process only."""
        if not self.accumulation.warn or message in self.said or not _is_first(model):
            return
        self.said.add(message)
        warnings.warn(
            f"Model {model.name!r} {message} (`warn=False` silences this.)",
            AccumulationWarning,
            stacklevel=_level_of_user(),
        )

    def before_fit(self, model: keras.Model, arguments: dict) -> None:
        """Print how updates are made, if `fit` shows its progress."""
        self.handed, examples = _sizes(arguments)
        verbose = arguments.get("verbose")
        shows = sys.stdout.isatty() if verbose in (None, "auto") else verbose == 1
        if self.announced or not shows or not _is_first(model):
            return
        self.announced = True
        steps = arguments.get("steps_per_epoch")
        if _several(model):
            sentence = self._on_each_device()
        elif self.handed is None:
            sentence = self._of_unknown(steps)
        else:
            sentence = self._of_known(self.handed, examples, steps)
        trainer.print_message(f"updates from {sentence}")

    def _on_each_device(self):
        size = self.accumulation.size
        if self.accumulation.mode == "accum_steps":
            return f"{size} micro-batches"
        return f"one batch each: micro-batches of {size} on each device"

    def _of_unknown(self, steps):
        size = self.accumulation.size
        if self.accumulation.mode == "accum_steps":
            return _number(min(size, steps or size), "micro-batch")
        return f"one batch each: micro-batches of {size}"

    def _of_known(self, handed, examples, steps):
        """Returns the message for data of which `fit` draws a known number of examples.

        Args:
            handed: The number of examples that `fit` draws at a time.
            examples: The number of all examples, or None if it is not known.
            steps: `steps_per_epoch`, or None.
        """
        size = self.accumulation.size
        if self.accumulation.mode == "accum_steps":
            size, handed = handed, handed * min(size, steps or size)
        handed = min(handed, examples or handed)
        size = min(size, handed)
        count = _number(math.ceil(handed / size), "micro-batch")
        of = "of at most" if handed % size else "of"
        return f"{_number(handed, 'example')}: {count} {of} {size}"

    def tell(
        self,
        model: keras.Model,
        denominators: list,
        seen: list,
        scope: Callable[[], Any] = trainer.StatelessScope,
    ) -> None:
        """Warn of losses and layers that make updates differ from those on the batch.

        Args:
            model: The model.
            denominators: The denominators of its compiled losses, which
                `losses.inspect` returns.
            seen: The list that `watching` yields.
            scope: Function that returns a scope in which the model's variables have
                values.
        """
        for denominator in denominators:
            self.warn_of_loss(model, denominator, scope)
        self.warn_of_normalization(model, seen)

    def warn_of_loss(self, model: keras.Model, denominator: Any, scope: Any) -> None:
        """Warn if the values of a compiled loss differ in micro-batches."""
        loss = denominator.loss
        if not self.accumulation.warn or is_known(loss):
            return
        if denominator.hides_weights:
            self.warn(
                model,
                f"has the loss `{name_of(loss)}`, whose class overrides `__call__`: "
                "its denominator under masks or sample weights is not known, and "
                "micro-batches weigh by their examples. Override `call` instead.",
            )
            return
        y_true, y_pred = denominator.arguments
        found = couples(loss, y_true, y_pred, scope)
        if found:
            self.warn(
                model,
                f"has the loss `{name_of(loss)}`, which couples the examples of a "
                "batch: each micro-batch is trained on its own value of it, and "
                "updates differ from those on the batch. "
                f"{_instead_of(loss, y_pred)}",
            )
        elif found is None and denominator.rank == 0:
            self.warn(
                model,
                f"has the loss `{name_of(loss)}`, which gives one number for a batch: "
                "unless that is a mean over the examples, updates differ from those on "
                "the batch. A loss that gives a value for each example is exact.",
            )

    def warn_of_normalization(self, model: keras.Model, seen: list) -> None:
        """Warn of layers that normalize by the statistics of a micro-batch."""
        # The number of examples in a micro-batch, where the shape does not tell it.
        examples = self.accumulation.microbatch_size or self.handed
        constant, own = [], []
        for layer, shape in seen:
            if _normalizes_to_constant(model, layer, shape, examples):
                constant.append(layer.name)
            elif not isinstance(layer, AccumBatchNormalization):
                own.append(layer.name)
        if constant:
            self.warn(
                model,
                "has batch normalization that sees one value a channel in a "
                "micro-batch of one example, and returns a constant: "
                f"{_few(constant)}. Take larger micro-batches, or "
                "`AccumBatchNormalization(renorm=True)`.",
            )
        if own:
            self.warn(
                model,
                "normalizes each micro-batch by its own statistics, and not by those "
                f"of the batch: batch normalization in {_few(own)}. "
                "`replace_batchnorm_layers(model)` makes at least the moving "
                "statistics those of the batch.",
            )

    def after_epoch(self, model: keras.Model, epoch: Epoch) -> None:
        """Warn after the first epoch, if nothing was accumulated."""
        if self.epoch_ended:
            return
        self.epoch_ended = True
        size = self.accumulation.size
        if self.accumulation.mode == "accum_steps":
            if epoch.seen < size:
                self.warn(
                    model,
                    f"has too few micro-batches for `accum_steps={size}`: the first "
                    f"epoch had {epoch.seen}, and was one update. Take a smaller "
                    "`accum_steps`, or smaller micro-batches.",
                )
        elif epoch.most_microbatches == 1:
            examples = _number(epoch.most_examples, "example")
            where = " on a device" if _several(model) else ""
            self.warn(
                model,
                f"accumulates nothing with `microbatch_size={size}`: the largest batch "
                f"of the first epoch had {examples}{where}, and was not cut. Give "
                "`fit` larger batches, or take a smaller `microbatch_size`.",
            )


@contextmanager
def watching(model: keras.Model, training: bool = True) -> Iterator[list]:
    """A context of a forward pass, which records the calls of batch normalization.

    Args:
        model: The model.
        training: Whether the forward pass is one in training. If not, every trainable
            layer is taken to normalize by the statistics of its inputs.

    Yields:
        A list of the layers that normalize by a micro-batch's statistics, each with the
        shape of its inputs.
    """
    seen: list = []

    def recording(layer, call):
        def recorded(*args, **kwargs):
            in_training = kwargs.get("training", args[1] if len(args) > 1 else None)
            if layer.trainable and (in_training or not training):
                seen.append((layer, tuple(args[0].shape)))
            return call(*args, **kwargs)

        return recorded

    with ExitStack() as stack:
        for layer in normalizations(model):
            call = recording(layer, layer.call)
            stack.enter_context(with_attribute(layer, "call", call))
        yield seen


def _is_first(model):
    """Whether this process is the first, which alone warns and prints."""
    return devices.active().is_first(model)


def _several(model):
    """Whether several devices, or processes, each have a share of the batch."""
    return devices.active().several(model)


def _level_of_user():
    """Returns the `stacklevel` with which a warning shows the line of the user."""
    frames = traceback.walk_stack(inspect.currentframe())
    for level, (frame, _) in enumerate(frames):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if level and package not in _LIBRARIES:
            return level
    return 2


# The packages whose functions are called between the user's line and the warning.
_LIBRARIES = (
    "gradient_accumulator",
    "keras",
    "tf_keras",
    "tensorflow",
    "jax",
    "torch",
    "contextlib",
    "threading",
)


def _sizes(arguments):
    """Returns how many examples `fit` draws at a time, and how many there are.

    A number that is not known is None.
    """
    data = arguments.get("x")
    if hasattr(data, "batch_sampler"):  # a PyTorch `DataLoader`
        return data.batch_size, None
    if hasattr(data, "element_spec"):  # a `tf.data.Dataset`
        # The specs of None, and of tensors that differ by replica, have no shape.
        shapes = (s.shape for s in leaves(data.element_spec) if hasattr(s, "shape"))
        shape = next(shapes, None)
        return (shape[0] if shape is not None and shape.rank else None), None
    arrays = leaves(data)
    if not arrays or not all(len(getattr(array, "shape", ())) for array in arrays):
        return None, None
    examples = arrays[0].shape[0]
    split = arguments.get("validation_split")
    if split and arguments.get("validation_data") is None:
        examples = math.floor(examples * (1 - split))  # rounded as Keras rounds
    return arguments.get("batch_size") or 32, max(examples, 0)


def _number(count, what):
    return f"{count} {what}" + ("" if count == 1 else "es" if what[-1] == "h" else "s")


def _few(names):
    """Returns a list of names as text, cut after the third."""
    names = [f"`{name}`" for name in dict.fromkeys(names)]
    others = len(names) - 3
    return ", ".join(names[:3]) + (f" and {others} more" if others > 0 else "")


def _instead_of(loss, y_pred):
    """Returns a sentence on how to mend a loss that couples examples."""
    name = keras_own(loss)
    if name is None:
        return "If it has a value for each example, let it return these."
    inner = range(1, len(y_pred.shape))
    if name == "circle" or not inner:
        return "Larger micro-batches come nearer."
    axis = _positive(getattr(loss, "axis", None), len(y_pred.shape))
    axis = tuple(each for each in inner if each in axis) or tuple(inner)
    return f"With `axis={axis}` it has a value for each example, and is exact."


def _positive(axis, rank):
    """Returns the set of axes that Keras means by `axis`, counted from the first.

    None means all axes.
    """
    if axis is None:
        return {*range(rank)}
    return {each % rank for each in (axis if isinstance(axis, Iterable) else [axis])}


def _normalizes_to_constant(model, layer, shape, examples):
    """Whether a layer sees one value for each feature, and so returns a constant."""
    if getattr(layer, "renorm", False):
        return False
    if getattr(layer, "synchronized", False) and _several(model):
        return False
    features = _positive(layer.axis, len(shape))
    shape = (examples if shape[0] is None else shape[0], *shape[1:])
    return all(n == 1 for i, n in enumerate(shape) if i not in features)
