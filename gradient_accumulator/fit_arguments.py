"""The arguments of a call of `fit`, which may be a model's own."""

from __future__ import annotations

import inspect
from typing import Any

from gradient_accumulator.backend.api import keras

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


class FitArguments:
    """Reads and writes them by the names that they have in `keras.Model.fit`.

    A `fit` that overrides Keras's may name some of them, and take the others as
    `*args` and `**kwargs`, which it hands on.

    Args:
        model: The model whose class has that `fit`.
        args: The positional ones of the call.
        kwargs: The others.

    Raises:
        TypeError: If `fit` does not take them, as calling it would.
    """

    def __init__(self, model: keras.Model, args: tuple, kwargs: dict):
        self._model = model
        self._signature = inspect.signature(type(model).fit)
        self._signature.bind(model, *args, **kwargs)
        self.args, self.kwargs = list(args), dict(kwargs)
        parameters = self._signature.parameters.values()
        self._kinds = {parameter.kind for parameter in parameters}
        _, *self._positional = [p.name for p in parameters if p.kind in _POSITIONAL]
        if inspect.Parameter.VAR_POSITIONAL in self._kinds:
            named = len(self._positional)
            _, *keras_own = inspect.signature(keras.Model.fit).parameters
            self._positional += keras_own[named:]

    def get(self, name: str) -> Any:
        """What the call gives, or else the parameter's default, or None."""
        if name in self.kwargs:
            return self.kwargs[name]
        position = self._position(name)
        if position is not None:
            return self.args[position]
        parameter = self._signature.parameters.get(name)
        if parameter is None or parameter.default is inspect.Parameter.empty:
            return None
        return parameter.default

    def set(self, name: str, value: Any) -> None:
        """Let the call give this.

        Raises:
            ValueError: If the model's own `fit` takes no such argument.
        """
        position = self._position(name)
        if position is not None:
            self.args[position] = value
            return
        if (
            name not in self._signature.parameters
            and inspect.Parameter.VAR_KEYWORD not in self._kinds
        ):
            raise ValueError(
                f"A model whose own `fit` does not take `{name}` cannot train in "
                f"pieces. Let it take `{name}`, or `**kwargs`, and hand them on to "
                f"`super().fit`. Received: fit{self._signature}"
            )
        self.kwargs[name] = value

    def _position(self, name):
        """Where the call gives the argument by its place."""
        place = self._positional.index(name) if name in self._positional else None
        return None if place is None or place >= len(self.args) else place

    def call(self) -> Any:
        return type(self._model).fit(self._model, *self.args, **self.kwargs)
