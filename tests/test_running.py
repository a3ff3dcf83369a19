"""How the tests run: several checks in one launch, and backends one after another."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import each_backend
import pytest
from helpers import core_on

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import launch

pytestmark = core_on("torch")
SCRIPT = """
import sys
from checks import check, run

@check
def first():
    print("a line of its own")

@check
def fails():
    raise ValueError("the reason")

@check
def says():
    return "what it says"

@check
def ends():
    sys.exit(0)

if __name__ == "__main__":
    run(sys.argv[1:])
"""


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def test_a_check_that_fails_leaves_the_others(script):
    names = launch.checks(script)
    assert names == ["first", "fails", "says", "ends"]
    found = launch.outcomes(partial(launch.processes, script), names)
    assert (found["first"], found["says"]) == ((None, ""), (None, "what it says"))
    assert "ValueError: the reason" in found["fails"][0]
    assert "process 0 ended with 0" in found["ends"][0]


def test_a_check_passes_if_it_does_in_all_processes(script):
    def start(*names):
        # The second process runs another check, and the first one does not wait for it.
        return [launch.start(script, *names), launch.start(script, "says")]

    found = launch.outcomes(start, ["first", "says"])
    assert "a line of its own" in found["first"][0]
    assert found["says"] == (None, "what it says")


def ran(monkeypatch, capsys, codes):
    """The exit code and the last lines, if the backends' tests end with these codes."""

    def run(command, env):
        code = codes[env["KERAS_BACKEND"]]
        (argument,) = (a for a in command if a.startswith("--junitxml="))
        if code is not None:
            counts = {
                "tests": "7",
                "failures": str(code),
                "errors": "0",
                "skipped": "2",
            }
            suites = ElementTree.Element("testsuites")
            ElementTree.SubElement(suites, "testsuite", counts)
            ElementTree.ElementTree(suites).write(argument.partition("=")[2])
        return subprocess.CompletedProcess(command, 137 if code is None else code)

    monkeypatch.setattr(each_backend.subprocess, "run", run)
    ended = each_backend.main([*codes, "--", "-m", "core"])
    lines = capsys.readouterr().out.splitlines()[-len(codes) :]
    return ended, [line.rpartition(" (")[0] for line in lines]


def test_all_backends_run_also_after_one_failed(monkeypatch, capsys):
    ended, lines = ran(monkeypatch, capsys, {"tensorflow": 1, "jax": None, "torch": 0})
    assert ended == 1
    assert lines == [
        "tensorflow: 4 passed, 1 failed, 2 skipped, FAILED with 1",
        "jax: did not end as pytest does, FAILED with 137",
        "torch: 5 passed, 2 skipped",
    ]


def test_what_passes_on_all_backends_passes(monkeypatch, capsys):
    assert ran(monkeypatch, capsys, {"jax": 0, "torch": 0})[0] == 0
