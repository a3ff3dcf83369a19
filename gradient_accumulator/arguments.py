"""Errors for arguments that a function does not have: they name the right ones."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from gradient_accumulator.received import described

Function = TypeVar("Function", bound=Callable)

SIZES = {
    "accum_steps": "the number of micro-batches in an update",
    "microbatch_size": "the number of examples in a micro-batch",
}
# The names that other libraries give to arguments, or that users may remember. They are
# lowercase, and without underscores.
OTHER_NAMES = {
    "accum_steps": (
        "accum accumiter accumstep accumsteps accumulategradbatches accumulatesteps "
        "accumulationsteps everykschedule gradaccumsteps gradaccumulationsteps "
        "gradientaccumulationsteps microbatches naccum nmicrobatches numaccumsteps "
        "numchunks nummicrobatches numminibatches numpieces numsteps steps"
    ),
    "microbatch_size": (
        "batchsize chunksize microbatch microbatchsize minibatch minibatchsize "
        "perdevicebatchsize piecesize"
    ),
    "accum_dtype": "accumulationdtype dtype",
    "agc_exclude": "exclude",
    "loss_fn": "fn function loss lossfunction",
    "optimizer": "baseoptimizer inneroptimizer opt",
    "use_agc": "adaptiveclipping agc",
}
MEANT = {other: name for name, text in OTHER_NAMES.items() for other in text.split()}


def names_arguments(**elsewhere: str) -> Callable[[Function], Function]:
    """Decorate a function: an unknown argument raises an error with the right name.

    Args:
        **elsewhere: Advice for arguments that belong to something else, by their names.
    """

    def decorator(function: Function) -> Function:
        signature = inspect.signature(function)
        of_class, _, _ = function.__qualname__.rpartition(".__init__")
        name = of_class or function.__name__

        @functools.wraps(function)
        def checked(*args, **kwargs):
            _check(name, signature, elsewhere, args, kwargs)
            return function(*args, **kwargs)

        # Keras reads the signature, and does not look through `functools.wraps`.
        cast(Any, checked).__signature__ = signature
        return cast(Function, checked)

    return decorator


def _check(function, signature, elsewhere, args, kwargs):
    parameters = signature.parameters.values()
    kinds = inspect.Parameter
    names = [p.name for p in parameters if p.kind is not kinds.VAR_KEYWORD]
    first = [p.name for p in parameters if p.kind is kinds.POSITIONAL_OR_KEYWORD]
    if len(args) > len(first):
        by_position = ", ".join(f"`{n}`" for n in first if n != "self")
        by_name = ", ".join(_meaning(n) for n in names if n not in first)
        others = ", ".join(described(value) for value in args[len(first) :])
        raise TypeError(
            f"`{function}` takes {by_position} by position, and only by name: "
            f"{by_name}. Received: {others} by position"
        )
    for name, value in zip(first, args):
        if name in kwargs:
            raise TypeError(
                f"`{function}` takes {_meaning(name)} by position or by name. "
                f"Received: {described(value)} by position, "
                f"{name}={described(kwargs[name])}"
            )
    takes_others = len(names) < len(parameters)
    for name, value in kwargs.items():
        if name in names:
            continue
        if advice := _advice(name, names, elsewhere, takes_others):
            raise TypeError(
                f"`{function}` has no argument `{name}`: {advice}. "
                f"Received: {name}={described(value)}"
            )


def _advice(name, names, elsewhere, takes_others) -> str | None:
    """Returns what to do instead, or None if the function may pass the argument on."""
    if name in elsewhere:
        return elsewhere[name]
    meant = name if name in SIZES else MEANT.get(name.lower().replace("_", ""), "")
    if meant in SIZES and meant not in names:
        # The function has only the other one of the two.
        meant = next((size for size in SIZES if size in names), "")
    if meant in names and (meant in SIZES or not takes_others):
        return f"use {_meaning(meant)}"
    if takes_others:
        return None
    alike = difflib.get_close_matches(name, names, n=1)
    if alike:
        return f"use {_meaning(alike[0])}"
    own = ", ".join(f"`{n}`" for n in names if n != "self")
    return f"it has {own}"


def _meaning(name: str) -> str:
    """Returns an argument's name, with its meaning if it is a size."""
    return f"`{name}` ({SIZES[name]})" if name in SIZES else f"`{name}`"
