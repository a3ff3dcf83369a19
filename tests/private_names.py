"""The private names of others that the package uses, read from its source.

A name is private if it begins with an underscore, or is imported from `keras.src`.
"""

import ast
import re
from pathlib import Path

import gradient_accumulator

PACKAGE = Path(gradient_accumulator.__file__).parent
PRIVATE = re.compile(r"_[a-z][a-z0-9_]*")
# Names of named tuples, and names that the package itself puts in namespaces and files.
NOT_THEIRS = {
    "_gradient_accumulation",
    "_gradient_accumulation_of",
    "_gradient_accumulator",
    "_devices",
    "_made_for",
    "_module",
    "_replace",
    "_settings",
}


def attributes(*, keras_2):
    """The private attributes of others' objects that some files use.

    Args:
        keras_2: Whether to look in the files for Keras 2, or in all other files.
    """
    trees = _trees()
    own = {name for tree in trees.values() for name in _own(tree)}
    found = {
        name
        for path, tree in trees.items()
        if path.name == "model_base.py"  # of both
        or path.name.startswith("keras2_") == keras_2
        for name in _used(tree, own)
    }
    return found - NOT_THEIRS


def imports():
    """The names imported from `keras.src`, and the names used of its modules."""
    found = set()
    for tree in _trees().values():
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and _is_private(node.module):
                for each in node.names:
                    full = f"{node.module}.{each.name}"
                    modules[each.asname or each.name] = full
        taken = {
            f"{modules[node.value.id]}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
        }
        whole = {name.rpartition(".")[0] for name in taken}
        found |= taken | {name for name in modules.values() if name not in whole}
    return found


def overridden(*classes):
    """The private names of Keras's classes that the package's subclasses define."""
    return {
        name
        for cls in classes
        for each in cls.__mro__
        if _is_ours(each)
        for name in vars(each)
        if PRIVATE.fullmatch(name)
        and any(name in vars(base) for base in cls.__mro__ if _is_keras(base))
    }


def _trees():
    return {
        path.relative_to(PACKAGE): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
    }


def _is_private(module):
    return module is not None and (module + ".").startswith("keras.src.")


def _is_ours(cls):
    return cls.__module__.startswith("gradient_accumulator.")


def _is_keras(cls):
    return cls.__module__.partition(".")[0] in ("keras", "tf_keras")


def _own(tree):
    """The attributes that the classes of the package define."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.FunctionDef):
                    yield each.name
                elif isinstance(each, ast.Assign):
                    yield from (t.id for t in each.targets if isinstance(t, ast.Name))
                elif isinstance(each, ast.AnnAssign) and each.value is not None:
                    yield each.target.id  # without a value another class defines it
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node.attr


def _used(tree, own):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            if node.attr not in own or _is_super(node.value):
                yield node.attr
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and PRIVATE.fullmatch(node.value)
            and node.value not in own
        ):
            yield node.value
        elif (
            isinstance(node, ast.AnnAssign)  # a declaration: the base class defines it
            and node.value is None
            and isinstance(node.target, ast.Name)
            and PRIVATE.fullmatch(node.target.id)
        ):
            yield node.target.id


def _is_super(node):
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"
