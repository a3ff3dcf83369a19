"""The checks of a script, of which its arguments name those that run.

A process says which have passed, so that each is a test of its own although one launch
runs all that are selected. One that fails ends the process, for others wait for it.
"""

import covered

CHECKS = {}


def check(function=None, **_):
    """The function is a check of its script, called without arguments.

    Keywords are fields that `launch.checks` reads: `four_replicas=True` runs it on
    four too.
    """
    if function is None:
        return check
    CHECKS[function.__name__] = function
    return function


def run(names, one=lambda name: CHECKS[name]()):
    """Calls `one(name)` for each; what it returns is said to the test."""
    for name in names:
        print(f"begins\t{name}", flush=True)  # the last one, if a process hangs
        with covered.by_check(name):
            said = one(name)
        print(f"passed\t{name}\t{said or ''}", flush=True)
