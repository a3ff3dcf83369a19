"""Which branches the core of the tests runs, after `make test-all COVERAGE=yes`.

`compare` prints how many of the package's branches all tests run, and how many the core
runs. It ends with 1 if the core runs many fewer. `choose` lists tests for a new core:
each next test adds the most branches for its time.
"""

import argparse
import heapq
import json
import re
import sqlite3
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import coverage
from each_backend import COVERAGE

POINTS = 5  # the core may run so many fewer branches, in a hundred
# The files that differ between backends, or through which a backend trains. The tests
# of all other files are in the core of one backend only.
OF_EACH = (
    "*/compat/*",
    "*/devices/*",
    "*/engine/*",
    "*/accumulator.py",
    "*/fit.py",
    "*/functional.py",
    "*/statistics.py",
    "*/update.py",
    "*/weights.py",
    "*/losses.py",
    "*/microbatches.py",
)
OF_THE_CORE = (r"(^|\|)core [^|]*$", "^$")  # contexts; that of imports is empty


def noted(*backends):
    """The file of the lines that all processes on these backends ran."""
    if len(backends) == 1:
        file = COVERAGE / backends[0] / "together"
        parts = (COVERAGE / backends[0]).glob("of.*")
    else:
        file = COVERAGE / "together"
        parts = [noted(backend) for backend in backends]
        file.unlink(missing_ok=True)
    if not file.exists():
        combined = coverage.Coverage(data_file=file)
        combined.combine([str(part) for part in parts], keep=True)
        combined.save()
    return file


def branches(file, include=None, contexts=None):
    """For each module: the number of its branches, and of those that ran."""
    read = coverage.Coverage(data_file=file, include=include)
    read.load()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        read.json_report(outfile=str(report), contexts=contexts)
        modules = json.loads(report.read_text())["files"]
    return {
        name: (module["summary"]["num_branches"], module["summary"]["covered_branches"])
        for name, module in modules.items()
    }


def compare(backends):
    """Prints a line for each backend, and one for all code on several of them.

    Returns:
        Whether the core runs enough everywhere.
    """
    enough = True
    together = [backends] if len(backends) > 1 else []
    for here in [*([backend] for backend in backends), *together]:
        file, include = noted(*here), OF_EACH if len(here) == 1 else None
        everything = branches(file, include)
        by_core = branches(file, include, OF_THE_CORE)
        # In the modules of other backends nothing ran.
        modules = [name for name, (_, ran) in everything.items() if ran]
        count = sum(everything[name][0] for name in modules)
        all_of, core_of = (
            100 * sum(found[name][1] for name in modules) / count
            for found in (everything, by_core)
        )
        ok = all_of - core_of <= POINTS
        enough = enough and ok
        print(
            f"{', '.join(here)}: of {count} branches all tests run {all_of:.1f} %, "
            f"the core {core_of:.1f} %" + ("" if ok else f": MORE THAN {POINTS} FEWER")
        )
        if not ok:
            fewer = {n: everything[n][1] - by_core[n][1] for n in modules}
            for name in sorted(fewer, key=fewer.get, reverse=True)[:10]:
                print(f"    {name}: {fewer[name]} fewer")
    return enough


def ran(backend):
    """The steps between lines that each test ran, and the tests of the core."""
    rows = sqlite3.connect(noted(backend)).execute(
        "select context, path, fromno, tono from arc"
        " join context on context.id = context_id join file on file.id = file_id"
    )
    found, core = defaultdict(set), set()
    for context, path, *step in rows:
        if context:
            kind, _, test = context.split("|")[-1].partition(" ")
            found[_unit(test)].add((backend, path, *step))
            if kind == "core":
                core.add(_unit(test))
    return found, core


def seconds(backend):
    """The processors' time of each test."""
    found = defaultdict(float)
    for case in ElementTree.parse(COVERAGE / backend / "tests.xml").iter("testcase"):
        name = re.sub("@[^]]*$", "", case.get("name"))
        test = f"{case.get('classname').replace('.', '/')}.py::{name}"
        for noted in case.iter("property"):
            if noted.get("name") == "processor":
                found[_unit(test)] += float(noted.get("value"))
    return found


def _unit(test):
    """The unit that is chosen: one test, or all checks that one launch runs."""
    return test.partition("[")[0] if "test_devices" in test else test


def choose(backends, budget, beside_core):
    """Chooses tests greedily, until they take `budget` seconds, and prints them."""
    found, took, core = defaultdict(set), defaultdict(float), set()
    for backend in backends:
        steps, of_core = ran(backend)
        core |= of_core
        for test, own in steps.items():
            found[test] |= own
        for test, time in seconds(backend).items():
            took[test] += time
    everything = set().union(*found.values())
    have, spent = set(), 0.0
    if beside_core:
        have = set().union(*(found.pop(test) for test in core))
        spent = sum(took[test] for test in core)
    print(f"{spent:7.1f} s  {100 * len(have) / len(everything):5.1f} %")
    # The largest gain for its time is first. Each chosen test only shrinks the gains.
    queue = [(-float("inf"), test) for test in sorted(found)]
    while queue:
        _, test = heapq.heappop(queue)
        gain, time = len(found[test] - have), took[test] + 0.05 * len(backends)
        if not gain or spent + time > budget:
            continue
        if queue and -gain / time > queue[0][0]:
            heapq.heappush(queue, (-gain / time, test))
            continue
        have |= found[test]
        spent += time
        share = 100 * len(have) / len(everything)
        print(f"{spent:7.1f} s  {share:5.1f} %  {gain:4} for {time:5.1f} s  {test}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    comparing, choosing = (commands.add_parser(name) for name in ("compare", "choose"))
    choosing.add_argument("--seconds", type=float, default=400)
    choosing.add_argument("--beside-core", action="store_true")
    for command in (comparing, choosing):
        command.add_argument("backends", nargs="*")
    arguments = parser.parse_args()
    measured = sorted(file.parent.name for file in COVERAGE.glob("*/tests.xml"))
    backends = arguments.backends or measured
    if not backends:
        sys.exit("Run `make test-all COVERAGE=yes` first.")
    if arguments.command == "compare":
        sys.exit(0 if compare(backends) else 1)
    choose(backends, arguments.seconds, arguments.beside_core)


if __name__ == "__main__":
    main()
