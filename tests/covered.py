"""Records which test ran which line, if coverage.py measures (`COVERAGE=yes`).

A context is the word "core" or "all" (whether the test is in the core), and its id.
"""

import contextlib
import json
import os
import re
import sys

# Environment variables: the context of the test that started a process, and those of
# the tests that the process runs itself.
OF_THE_PROCESS, OF_CHECKS = "TEST_CONTEXT", "TEST_CONTEXTS"


def context_of(item):
    is_core = item.get_closest_marker("core") and not item.get_closest_marker("slow")
    kind = "core" if is_core else "all"
    # pytest-xdist appends the group, which is removed here.
    return f"{kind} {re.sub('@[^]]*$', '', item.nodeid)}"


@contextlib.contextmanager
def by(context):
    """Records what runs meanwhile, in this process and its children, in `context`."""
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
    """As `by`, for one test in a process that runs several."""
    contexts = json.loads(os.environ.get(OF_CHECKS, "{}"))
    return by(contexts[name]) if name in contexts else contextlib.nullcontext()


def for_checks(items):
    """The environment of a process that runs several tests: their contexts by name."""
    return {OF_CHECKS: json.dumps({name: context_of(i) for name, i in items.items()})}


def save():
    """Saves the records of this process. Processes of pytest-xdist do not do so."""
    measured = _measured()
    if measured is not None:
        measured.save()


def _measured():
    if "coverage" not in sys.modules:
        return None
    return sys.modules["coverage"].Coverage.current()
