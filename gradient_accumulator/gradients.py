"""`accumulated_value_and_grad`: accumulation as a function, with no counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradient_accumulator import backend
from gradient_accumulator.backend.api import keras
from gradient_accumulator.pieces import check_float_dtype, check_positive_int


@dataclass(frozen=True)
class LossFunction:
    """A user's function that computes a piece's loss, and how its pieces join.

    Args:
        function: What the user gave.
        microbatch_size: Number of examples in a piece.
        has_aux: Whether the function returns more than the loss.
        accum_dtype: Dtype in which gradients are summed.
        module: What reduces the gradients over processes, or None.
    """

    function: Callable
    microbatch_size: int
    has_aux: bool
    accum_dtype: str
    module: Any = None

    def __call__(self, *args, **kwargs) -> tuple[Any, Any, Any]:
        """The numerator, its denominator or None if it is a mean, and what is more."""
        result = self.function(*args, **kwargs)
        aux = None
        if self.has_aux:
            if not isinstance(result, tuple) or len(result) != 2:
                raise ValueError(
                    "With `has_aux=True`, `loss_fn` must return a pair of the loss "
                    f"and what is to be returned besides. Received: {result}"
                )
            result, aux = result
        pair = result if isinstance(result, tuple) else (result, None)
        if len(pair) != 2 or any(
            part is not None and tuple(getattr(part, "shape", ())) != ()
            for part in pair
        ):
            raise ValueError(
                "`loss_fn` must return a scalar, the mean over a piece's examples, or "
                "a pair of scalars, a numerator and its denominator. "
                f"Received: {result}"
            )
        return *pair, aux

    def accumulator_dtype(self, dtype: Any) -> str:
        dtype = keras.backend.standardize_dtype(dtype)
        return "float64" if dtype == "float64" else self.accum_dtype


def accumulated_value_and_grad(
    loss_fn: Callable,
    *,
    microbatch_size: int,
    has_aux: bool = False,
    accum_dtype: str = "float32",
    module: Any = None,
) -> Callable:
    """A function that computes a full batch's loss and gradients piece by piece.

    Only one piece's activations are in memory at a time. It is the loop for training
    steps of your own, where one call is one update: no counter, nothing left over.

    ```
    for each piece k:  numerator_k, denominator_k = loss_fn(piece k)
    loss     = sum_k numerator_k / sum_k denominator_k
    gradient = sum_k d numerator_k / sum_k denominator_k
    ```

    On JAX a random key among `args` is the same for every piece, and so would be the
    dropout masks drawn from it: put keys into `batch`, one for each example.

    Args:
        loss_fn: A function that computes a piece's loss. On TensorFlow and PyTorch it
            is called as `loss_fn(piece, *args, **kwargs)`; on JAX, whose functions are
            pure, as `loss_fn(variables, piece, *args, **kwargs)`. It returns the mean
            over the piece's examples, or, where pieces are worth more than their
            number of examples says (tokens under a mask), a tuple of a numerator and
            its denominator, both scalars. No gradient is taken of the denominator.
        microbatch_size: Positive int, the number of examples in a piece. The last
            piece may be smaller.
        has_aux: Whether `loss_fn` returns a tuple of the loss and something more, a
            nested structure of tensors.
        accum_dtype: Name of the float dtype that gradients are summed in (float64
            variables always sum in float64).
        module: On PyTorch, the `DistributedDataParallel` or the FSDP2 module (what
            `fully_shard` returns) that `loss_fn` calls. Its processes reduce their
            gradients once, with the last piece's, and each gets the loss and the
            gradients of all their examples: each is given its share of the full
            batch, of any number of pieces. It does the summing, in its own dtype.

    Returns:
        A function `(variables, batch, *args, **kwargs)`. `variables` are those to
        differentiate by: a list of variables or parameters on TensorFlow and PyTorch,
        any nested arrays on JAX. `batch` is nested tensors that agree in their first
        axis; `args` and `kwargs` go to `loss_fn` with every piece. As that of
        `jax.value_and_grad`, it returns `(loss, gradients)`, or
        `((loss, aux), gradients)`: gradients are nested as `variables`, in their
        dtypes, and None where there is none (zeros on JAX). Of `aux`, tensors are
        joined along their first axis, and scalars become vectors with an entry for
        each piece. Where all denominators are 0, loss and gradients are.

        On JAX it is pure and can be jitted; there the loop is a `jax.lax.scan`, in
        which XLA runs convolutions slowly on CPUs. Called outside of `jax.jit` it
        compiles the work on one piece itself, and loops on the host: there arrays and
        floats among `args` and `kwargs` are traced, as `jax.jit` does, and for each
        other int, bool, string or function it compiles anew. On TensorFlow it
        works inside and outside of `tf.function`. On PyTorch it calls `backward`,
        and leaves the parameters' `grad` as it was.

    Raises:
        TypeError, ValueError: If an argument is unfit; when called, if the batch's
            tensors have different numbers of examples, or `loss_fn` returns no scalar.

    Example:

    ```python
    value_and_grad = accumulated_value_and_grad(loss_fn, microbatch_size=8)

    def loss_fn(params, piece):  # JAX
        tokens, labels = piece
        losses = cross_entropy(apply(params, tokens), labels)
        mask = labels != PAD
        return (losses * mask).sum(), mask.sum()

    loss, gradients = value_and_grad(params, batch)
    ```

    With dropout on JAX, whatever the size of the pieces:

    ```python
    def loss_fn(params, piece):
        x, y, keys = piece
        predictions = jax.vmap(apply, (None, 0, 0))(params, x, keys)  # each its key
        return ((predictions - y) ** 2).mean()

    keys = jax.random.split(key, len(x))
    loss, gradients = value_and_grad(params, (x, y, keys))
    ```
    """
    if not callable(loss_fn):
        raise TypeError(
            "Argument `loss_fn` must be a function. "
            f"Received: loss_fn={loss_fn!r} (of type {type(loss_fn).__name__})"
        )
    check_positive_int("microbatch_size", microbatch_size)
    check_float_dtype(accum_dtype)
    if module is not None and keras.backend.backend() != "torch":
        raise ValueError(
            "Argument `module` is for PyTorch's `torch.distributed`. Received: "
            f"module={module!r} on {keras.backend.backend()}"
        )
    return backend.active().value_and_grad(
        LossFunction(loss_fn, microbatch_size, has_aux, accum_dtype, module)
    )
