"""Sets an attribute of one object of Keras for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def with_attribute(instance: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which an object has an attribute that Keras does not track."""
    own = name in instance.__dict__
    before = instance.__dict__.get(name)
    instance.__dict__[name] = value
    try:
        yield
    finally:
        if own:
            instance.__dict__[name] = before
        else:
            del instance.__dict__[name]
