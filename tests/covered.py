"""Notes which test covered what, where coverage.py measures (`COVERAGE=yes`).

A context is "core" or "all", for whether the test is in the core, and its id.
"""

import contextlib
import json
import os
import re
import sys

# Of the test that a process was started by, and of those that it runs itself.
OF_THE_PROCESS, OF_CHECKS = "TEST_CONTEXT", "TEST_CONTEXTS"


def context_of(item):
    is_core = item.get_closest_marker("core") and not item.get_closest_marker("slow")
    kind = "core" if is_core else "all"
    # Without what pytest-xdist appends: the group.
    return f"{kind} {re.sub('@[^]]*$', '', item.nodeid)}"


@contextlib.contextmanager
def by(context):
    """Notes what runs meanwhile, in processes that are started too, under `context`."""
    measured = _measured()
    if measured is None:
        yield
        return
    os.environ[OF_THE_PROCESS] = context
    measured.switch_context(context)
    try:
        yield
    finally:
        measured.switch_context("")
        del os.environ[OF_THE_PROCESS]


def by_check(name):
    """The same in a process of several tests."""
    contexts = json.loads(os.environ.get(OF_CHECKS, "{}"))
    return by(contexts[name]) if name in contexts else contextlib.nullcontext()


def for_checks(items):
    """What the environment of such a process says: the tests by their names."""
    return {OF_CHECKS: json.dumps({name: context_of(i) for name, i in items.items()})}


def save():
    """What this process noted: those of pytest-xdist do not end as others do."""
    measured = _measured()
    if measured is not None:
        measured.save()


def _measured():
    if "coverage" not in sys.modules:
        return None
    return sys.modules["coverage"].Coverage.current()
