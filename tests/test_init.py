"""The names that the package exports, and its version."""

import re

import pytest

import gradient_accumulator

pytestmark = pytest.mark.core


def test_public_names_and_version():
    assert {*dir(gradient_accumulator)} == {
        *gradient_accumulator.__all__,
        "__version__",
    }
    for name in gradient_accumulator.__all__:
        assert getattr(gradient_accumulator, name) is not None
    assert re.match(r"\d+[.+]\w+", gradient_accumulator.__version__)
    with pytest.raises(AttributeError, match="no attribute 'sys'"):
        gradient_accumulator.sys  # noqa: B018


def test_a_version_that_is_not_installed(monkeypatch):
    from importlib import metadata

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert gradient_accumulator.__version__ == "0+not.installed"
