"""`accumulated_value_and_grad`: accumulation as a function, with no counter."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload

from gradient_accumulator import engine
from gradient_accumulator.arguments import names_arguments
from gradient_accumulator.compat.api import keras, ops
from gradient_accumulator.engine.engine_base import Carry, Sums, times
from gradient_accumulator.received import described
from gradient_accumulator.settings import check_float_dtype, positive_int


class ValueAndGrad(Protocol):
    """What `accumulated_value_and_grad` returns."""

    def __call__(
        self, variables: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Returns the loss, and gradients nested as `variables`."""


class ValueAuxAndGrad(Protocol):
    """What `accumulated_value_and_grad` returns with `has_aux=True`."""

    def __call__(
        self, variables: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, Any], Any]:
        """Returns the pair of loss and `aux`, and gradients nested as `variables`."""


@dataclass(frozen=True)
class LossFunction:
    """A user's function that computes the loss of a micro-batch, and its settings.

    Args:
        function: The user's function.
        microbatch_size: Number of examples in a micro-batch.
        has_aux: Whether the function returns more than the loss.
        accum_dtype: Dtype in which gradients are summed.
        module: The module that reduces the gradients over processes, or None.
    """

    function: Callable
    microbatch_size: int
    has_aux: bool
    accum_dtype: str
    module: Any = None

    def __call__(self, *args, **kwargs) -> tuple[Any, Any, Any]:
        """Returns the numerator, the denominator (None for a mean), and `aux`."""
        result = self.function(*args, **kwargs)
        aux = None
        if self.has_aux:
            if not isinstance(result, tuple) or len(result) != 2:
                raise ValueError(
                    "With `has_aux=True`, `loss_fn` must return a pair of the loss "
                    "and the other results. "
                    f"Received: {described(result)}"
                )
            result, aux = result
        pair = result if isinstance(result, tuple) else (result, None)
        if (
            len(pair) != 2
            or not _is_scalar(pair[0])
            or not (pair[1] is None or _is_scalar(pair[1]))
        ):
            besides = (
                " To return more than the loss, return a pair of the loss and the "
                "rest, with `has_aux=True`."
            )
            raise ValueError(
                "`loss_fn` must return a scalar, the mean over a micro-batch's "
                "examples, or a pair of scalars, a numerator and its denominator."
                f"{besides if _has_more(result) and not self.has_aux else ''} "
                f"Received: {described(result)}"
            )
        return *pair, aux

    def accumulator_dtype(self, dtype: Any) -> str:
        dtype = keras.backend.standardize_dtype(dtype)
        return "float64" if dtype == "float64" else self.accum_dtype


class Accumulation:
    """The loss and the gradients of one batch, added up micro-batch by micro-batch.

    Args:
        sums: The sums of the gradients.
        value_and_grad: The engine's function of that name.
        size: The batch's number of examples.
    """

    def __init__(self, sums: Sums, value_and_grad: Callable, size: Any):
        self.sums = sums
        self.value_and_grad = value_and_grad
        self.size = size
        self.has_pairs = False  # whether some loss was a numerator and a denominator
        self.has_means = False  # whether some loss was a mean over examples

    def zeros(self) -> Carry:
        """The carry for the first micro-batch."""
        dtype = "float64" if "float64" in self.sums.dtypes else "float32"
        loss, denominator = ops.zeros((), dtype), ops.zeros((), dtype)
        return Carry(self.sums.zeros(), loss, denominator, {})

    def add(
        self, carry: Carry, loss: Callable[[Any], tuple], variables: list, examples: Any
    ) -> tuple[Carry, Any]:
        """Add a micro-batch; returns the new carry, and the `aux` of `loss_fn`.

        Args:
            carry: The carry that the previous micro-batch returned.
            loss: A function of the variables that returns the micro-batch's numerator,
                its denominator or None, and `aux`.
            variables: The variables, or the values that `value_and_grad` takes instead.
            examples: The micro-batch's number of examples.
        """

        def part_of_batch(variables):
            numerator, denominator, aux = loss(variables)
            numerator = ops.convert_to_tensor(numerator)
            share = 1 / self.size
            if denominator is None:
                self.has_means = True
                denominator, share = examples, examples / self.size
            else:
                self.has_pairs = True
            part = times(numerator, share)
            return part, (part, denominator, aux)

        gradients, (part, denominator, aux) = self.value_and_grad(
            part_of_batch, variables
        )
        if not isinstance(denominator, int):
            # The caller may differentiate the loss, but not the denominator.
            denominator = ops.stop_gradient(ops.convert_to_tensor(denominator))
            denominator = ops.cast(denominator, carry.denominator.dtype)
        sums = self.sums.add(carry.sums, gradients)
        part = carry.loss + ops.cast(part, carry.loss.dtype)
        return Carry(sums, part, carry.denominator + denominator, {}), aux

    def finish(self, carry: Carry) -> tuple[Any, list]:
        """The loss and the gradients, after the last micro-batch."""
        if not self.has_pairs:  # the numbers of examples add up to the batch's
            return carry.loss, self.sums.finish(carry.sums, None)
        scale = ops.divide_no_nan(
            ops.cast(self.size, carry.loss.dtype), carry.denominator
        )
        return carry.loss * scale, self.sums.finish(carry.sums, scale)


def _is_scalar(part: Any) -> bool:
    shape = getattr(part, "shape", None)
    if shape is None:
        return isinstance(part, numbers.Number)
    # TensorFlow does not always know it.
    return getattr(shape, "rank", 0) is None or tuple(shape) == ()


def _has_more(result: Any) -> bool:
    """Whether a function returned a loss and other results."""
    if isinstance(result, Mapping):
        return True
    return isinstance(result, (tuple, list)) and bool(result) and _is_scalar(result[0])


def listed(variables: Any) -> list:
    """The list of the variables in an iterable.

    Raises:
        TypeError: If they are nested, or if it is a single variable.
        ValueError: If there are none.
    """
    if (
        isinstance(variables, (Mapping, str))
        or hasattr(variables, "shape")
        or not isinstance(variables, Iterable)
    ):
        raise TypeError(
            "Argument `variables` must be a list of variables, such as "
            "`model.trainable_variables`, or `module.parameters()` of PyTorch. "
            f"Received: variables={described(variables)}"
        )
    made = list(variables)
    if not made:
        used_up = (
            ": a generator, such as `module.parameters()`, gives its variables only "
            "once, so make a new one for each update, or make a list of it"
            if isinstance(variables, Iterator)
            else ""
        )
        raise ValueError(
            f"Argument `variables` must hold variables{used_up}. "
            f"Received: variables={described(variables)}, which holds none"
        )
    return made


def check_leaves(batch: Any, leaves: list) -> None:
    """Raise, and name the entry, unless a batch consists of arrays of examples.

    Args:
        batch: Nested arrays.
        leaves: The leaves that the backend's framework finds in the batch.
    """
    if all(tuple(getattr(leaf, "shape", ())) for leaf in leaves):
        return
    for place, leaf in _places(batch, "batch"):
        if leaf is None or tuple(getattr(leaf, "shape", ())):
            continue
        error = ValueError if hasattr(leaf, "shape") else TypeError
        raise error(
            f"`{place}` must be an array, with the same number of examples in its "
            "first axis as every array of the batch. Give data that all examples share "
            "as a further argument of `loss_fn`: `value_and_grad(variables, batch, "
            "more)`."
            f" Received: {place}={described(leaf)} (of type {type(leaf).__name__})"
        )


def _places(data: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested data, each with the expression that gets it."""
    entries: Iterable
    if isinstance(data, Mapping):
        entries = data.items()
    elif isinstance(data, (list, tuple)):
        entries = enumerate(data)
    else:
        yield place, data
        return
    for key, value in entries:
        yield from _places(value, f"{place}[{key!r}]")


def warn_of_nan(is_nan: bool) -> None:
    """Warn if the mean loss of an update is not a number."""
    if is_nan:
        warnings.warn(
            "The mean loss of a micro-batch is not a number. If it is a mean over "
            "nothing, because all targets of the micro-batch are ignored or masked, "
            "let `loss_fn` return a pair instead: the sum, and the number of values "
            "in it. Such a micro-batch then adds nothing.",
            stacklevel=3,
        )


@overload
def accumulated_value_and_grad(
    loss_fn: Callable,
    *,
    microbatch_size: int,
    has_aux: Literal[False] = False,
    accum_dtype: str = "float32",
    module: Any = None,
) -> ValueAndGrad: ...


@overload
def accumulated_value_and_grad(
    loss_fn: Callable,
    *,
    microbatch_size: int,
    has_aux: Literal[True],
    accum_dtype: str = "float32",
    module: Any = None,
) -> ValueAuxAndGrad: ...


@overload
def accumulated_value_and_grad(
    loss_fn: Callable,
    *,
    microbatch_size: int,
    has_aux: bool,
    accum_dtype: str = "float32",
    module: Any = None,
) -> ValueAndGrad | ValueAuxAndGrad: ...


@names_arguments()
def accumulated_value_and_grad(
    loss_fn: Callable,
    *,
    microbatch_size: int,
    has_aux: bool = False,
    accum_dtype: str = "float32",
    module: Any = None,
) -> ValueAndGrad | ValueAuxAndGrad:
    """Returns a function that computes the loss and the gradients of a batch.

    The function computes them micro-batch by micro-batch, so that only one
    micro-batch's activations are in memory at a time. It is for training steps of your
    own: one call is one update. There is no counter, and no micro-batch is left over.

    ```
    for each micro-batch k:  numerator_k, denominator_k = loss_fn(micro-batch k)
    loss     = sum_k numerator_k / sum_k denominator_k
    gradient = sum_k d numerator_k / sum_k denominator_k
    ```

    If all micro-batches used one random key from `args` on JAX, they would draw equal
    dropout masks. Put keys into `batch` instead, one for each example.

    Args:
        loss_fn: A function that computes a micro-batch's loss. On TensorFlow and
            PyTorch the call is `loss_fn(microbatch, *args, **kwargs)`. On JAX, whose
            functions are pure, it is `loss_fn(variables, microbatch, *args, **kwargs)`.
            It returns the mean over the micro-batch's examples. If examples have
            different weights (tokens under a mask), it returns a tuple of a numerator
            and its denominator instead, both scalars. The denominator has no gradient.
            Return this tuple too if the labels of a micro-batch may all be ignored: a
            mean over nothing is NaN, and would make the whole update NaN. There is a
            warning about such a mean, but not in `jax.jit` or a `tf.function`, which do
            not know values while they trace.
        microbatch_size: Positive int, the number of examples in a micro-batch. The last
            micro-batch may be smaller.
        has_aux: Whether `loss_fn` returns a tuple `(loss, aux)`. `aux` is a nested
            structure of tensors.
        accum_dtype: Name of the float dtype in which gradients are summed. float64
            variables always sum in float64.
        module: On PyTorch, the module that `loss_fn` calls, if it is a
            `DistributedDataParallel` or an FSDP2 module (the result of `fully_shard`).
            Give each process its share of the batch, in any number of micro-batches
            (equally many for FSDP2). The processes reduce their gradients once, with
            the last micro-batch, and all get the loss and the gradients of the whole
            batch. The module sums gradients in its own dtype.

    Returns:
        A function `(variables, batch, *args, **kwargs)`, which returns `(loss,
        gradients)`, or `((loss, aux), gradients)` with `has_aux`, as that of
        `jax.value_and_grad` does.

        - `variables` are the variables to differentiate by. On TensorFlow and PyTorch
          they are a list, or a generator, of variables or parameters. On JAX they are
          any nested arrays.
        - `batch` is nested tensors with equal first axes. `args` and `kwargs` go to
          `loss_fn` with every micro-batch.
        - The gradients are nested as `variables`, in their dtypes, and None for a
          variable without a gradient (zeros on JAX). If all denominators are 0, the
          loss and the gradients are 0.
        - The tensors of `aux` are joined along their first axis. Its scalars become
          vectors with an entry for each micro-batch.

        On JAX the function is pure and can be jitted. The loop is then a
        `jax.lax.scan`, in which XLA runs convolutions slowly on CPUs. Outside of
        `jax.jit` the function compiles the work on one micro-batch, and loops on the
        host. Arrays and floats among `args` and `kwargs` are then traced, and the work
        is compiled again for each new int, bool, string or function. On TensorFlow the
        function works inside and outside of `tf.function`. On PyTorch it calls
        `backward`, and leaves the parameters' `grad` as it was.

    Raises:
        TypeError, ValueError: If an argument is wrong. The function raises them if
            variables are of another framework than Keras's backend, if the batch's
            tensors have different numbers of examples, or if `loss_fn` returns no
            scalar.

    Example:

    ```python
    value_and_grad = accumulated_value_and_grad(loss_fn, microbatch_size=8)

    def loss_fn(params, microbatch):  # JAX
        tokens, labels = microbatch
        losses = cross_entropy(apply(params, tokens), labels)
        mask = labels != PAD
        return (losses * mask).sum(), mask.sum()

    loss, gradients = value_and_grad(params, batch)
    ```

    With dropout on JAX, for micro-batches of any size:

    ```python
    def loss_fn(params, microbatch):
        x, y, keys = microbatch
        predictions = jax.vmap(apply, (None, 0, 0))(params, x, keys)  # a key for each
        return ((predictions - y) ** 2).mean()

    keys = jax.random.split(key, len(x))
    loss, gradients = value_and_grad(params, (x, y, keys))
    ```
    """
    if not callable(loss_fn):
        raise TypeError(
            "Argument `loss_fn` must be a function. "
            f"Received: loss_fn={described(loss_fn)} (of type {type(loss_fn).__name__})"
        )
    microbatch_size = positive_int("microbatch_size", microbatch_size)
    check_float_dtype(accum_dtype)
    if module is not None and keras.backend.backend() != "torch":
        raise ValueError(
            "Argument `module` is for PyTorch's `torch.distributed`: set the "
            "environment variable KERAS_BACKEND=torch before Keras is imported. "
            f"Received: module={described(module)} on {keras.backend.backend()}"
        )
    return engine.new_engine().accumulated(
        LossFunction(loss_fn, microbatch_size, has_aux, accum_dtype, module)
    )
