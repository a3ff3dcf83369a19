"""`Accumulation`: the settings by which a model accumulates, checked."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from gradient_accumulator.agc import AdaptiveClipping
from gradient_accumulator.received import described


@dataclass(frozen=True)
class Accumulation:
    """The settings by which a model accumulates.

    One of `accum_steps` and `microbatch_size` is set, and the other is None.

    Args:
        accum_steps: Number of micro-batches in an update, if `fit` is given
            micro-batches.
        microbatch_size: Number of examples in a micro-batch, if `fit` is given batches.
        accum_dtype: Dtype in which gradients are summed.
        clipping: The settings of adaptive clipping, or None.
        warn: Whether to warn if updates differ from those on the batch, or if nothing
            is accumulated.
    """

    accum_steps: int | None = None
    microbatch_size: int | None = None
    accum_dtype: str = "float32"
    clipping: AdaptiveClipping | None = None
    warn: bool = True

    def __post_init__(self):
        if (self.accum_steps is None) == (self.microbatch_size is None):
            raise ValueError(
                "Exactly one of `accum_steps` and `microbatch_size` must be given. "
                f"Received: accum_steps={described(self.accum_steps)}, "
                f"microbatch_size={described(self.microbatch_size)}"
            )
        for name in ("accum_steps", "microbatch_size"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, positive_int(name, value))
        check_float_dtype(self.accum_dtype)
        if not isinstance(self.warn, bool):
            raise TypeError(
                "Argument `warn` must be a bool. "
                f"Received: warn={described(self.warn)} "
                f"(of type {type(self.warn).__name__})"
            )

    def __repr__(self) -> str:
        values = {
            self.mode: self.size,
            "accum_dtype": self.accum_dtype,
            "clipping": self.clipping,
            **({} if self.warn else {"warn": False}),
        }
        inside = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f"{type(self).__name__}({inside})"

    @property
    def mode(self) -> str:
        """Which of the two sizes is set: "accum_steps" or "microbatch_size"."""
        return "microbatch_size" if self.accum_steps is None else "accum_steps"

    @property
    def size(self) -> int:
        """The size that is set."""
        return getattr(self, self.mode)

    @property
    def is_plain(self) -> bool:
        """Whether an update is one of plain training."""
        return self.accum_steps == 1 and self.clipping is None

    def get_config(self, variables: list) -> dict:
        """Returns a config for a saved model whose variables have the same names."""
        config: dict[str, Any] = {
            "accum_steps": self.accum_steps,
            "microbatch_size": self.microbatch_size,
            "accum_dtype": self.accum_dtype,
            "warn": self.warn,
        }
        if self.clipping is not None:
            config["clipping"] = self.clipping.get_config(variables)
        return config

    @classmethod
    def from_config(cls, config: dict) -> Accumulation:
        config = dict(config)
        clipping = config.pop("clipping", None)
        return cls(**config, clipping=clipping and AdaptiveClipping(**clipping))


def positive_int(name: str, value: Any) -> int:
    """Returns a size as an `int`.

    Args:
        name: Name of the argument, for errors.
        value: Any object that Python accepts as an integer, such as NumPy's integers.

    Raises:
        TypeError: If `value` is no integer.
        ValueError: If `value` is not positive.
    """
    # `operator.index` accepts bools, and tensors of a bool, which are no sizes.
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    try:
        size = None if is_bool else operator.index(value)
    except TypeError:
        size = None
    if size is None:
        raise TypeError(
            f"Argument `{name}` must be a positive int. "
            f"Received: {name}={described(value)} (of type {type(value).__name__})"
        )
    if size < 1:
        raise ValueError(
            f"Argument `{name}` must be a positive int. Received: {name}={size}"
        )
    return size


def check_float_dtype(dtype: Any) -> None:
    """Raise unless `dtype` is the name of a float dtype."""
    if not isinstance(dtype, str):
        raise TypeError(
            "Argument `accum_dtype` must be the name of a float dtype. "
            f"Received: accum_dtype={described(dtype)} (of type {type(dtype).__name__})"
        )
    if dtype not in ("bfloat16", "float16", "float32", "float64"):
        raise ValueError(
            "Argument `accum_dtype` must be the name of a float dtype. "
            f"Received: accum_dtype={dtype!r}"
        )
