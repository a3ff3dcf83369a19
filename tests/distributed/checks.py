"""The checks of a script. The script's arguments name the checks that run.

A process prints which checks have passed, so that each check is a test, although one
launch runs several. A check that fails ends its process, because others wait for it.
"""

import covered

CHECKS = {}


def check(function=None, **_):
    """Makes a function without arguments a check of its script.

    Keywords are fields that `launch.checks` reads: with `four_replicas=True` it also
    runs on four replicas.
    """
    if function is None:
        return check
    CHECKS[function.__name__] = function
    return function


def run(names, one=lambda name: CHECKS[name]()):
    """Calls `one(name)` for each name, and prints its result for the test."""
    for name in names:
        print(f"begins\t{name}", flush=True)  # if it hangs, the test sees where
        with covered.by_check(name):
            said = one(name)
        print(f"passed\t{name}\t{said or ''}", flush=True)
