"""The command line: its errors, its advice, and how Ctrl-C ends it.

Each test starts the command in a new process, so that one backend is enough.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest

import gradient_accumulator
from gradient_accumulator_cli import command

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="the same on every backend"
    ),
]
SECONDS = 120  # the longest time of a process
FIRST_LINE = (
    "A 3D U-Net learns the tissues of a brain, and a transformer learns sentences, on "
    "{} (small size). "
)
# Runs the command as the installed script does, and pretends that some packages are
# installed and others are not.
COMMAND = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
sys.modules.update({name: types.SimpleNamespace(__spec__=name) for name in %r})
sys.modules.update(dict.fromkeys(%r))
from gradient_accumulator_cli.command import main
sys.exit(main())
"""


def start(arguments, folder, present=(), absent=(), **environment):
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND % (present, absent), *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(gradient_accumulator.__file__).parents[1]),
            "COLUMNS": "200",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(arguments, folder, **settings):
    """Runs the command; returns its exit status, stdout and stderr."""
    with start(arguments, folder, **settings) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    return process.returncode, out, err


def test_help(tmp_path):
    code, out, err = run(["demo", "--help"], tmp_path)
    assert (code, err) == (0, "")
    for option in ("--backend", "--size", "--epochs", "--output"):
        assert option in out


def test_help_knows_the_backend_of_the_environment(tmp_path):
    options = command.build_parser().parse_args(["demo"])
    assert options.backend == "tensorflow"
    code, _, err = run(["demo"], tmp_path, absent=("jax",), KERAS_BACKEND="jax")
    assert code == 1
    assert "jax" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND"),
        (["train"], "'train'"),
        (["demo", "--backend", "numpy"], "'numpy'"),
        (["demo", "--size", "huge"], "'huge'"),
        (["demo", "--epochs", "0"], "Expected a positive int. Received: '0'"),
        (["demo", "--output", "a.txt"], "ends in .png, .pdf, .svg. Received: 'a.txt'"),
        (
            ["demo", "--output", "missing/a.png"],
            "Expected a file in a folder that exists. Received: 'missing/a.png'",
        ),
        (
            ["demo", "--output", "folder.png"],
            "Expected a file, not a folder. Received: 'folder.png'",
        ),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    (tmp_path / "folder.png").mkdir()
    code, out, err = run(arguments, tmp_path)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "absent",
    [("jax",), ("nilearn", "matplotlib", "rich"), ("rich",), ("matplotlib", "jax")],
)
def test_what_is_not_installed_is_advised(absent, tmp_path):
    """The advice has the packages' own names: PyPI has another project of our name."""
    present = {*command.DEMO_PACKAGES, "jax"} - {*absent}
    code, out, err = run(
        ["demo", "--backend", "jax"], tmp_path, present=(*present,), absent=absent
    )
    assert (code, out) == (1, "")
    assert err == (
        f"error: the demonstration needs {', '.join(absent)}. "
        f"Install with: pip install {' '.join(absent)}\n"
    )


@pytest.mark.parametrize(
    "arguments", [["demo", "--sizes"], ["demo", "small"], ["--sise", "demo"]]
)
def test_a_wrong_option_shows_the_usage_of_its_command(arguments, tmp_path):
    code, out, err = run(arguments, tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("usage: gradient-accumulator demo ")
    (wrong,) = {*arguments} - {"demo"}
    assert err.splitlines()[-1].endswith(f"unrecognized arguments: {wrong}")


def test_the_first_line_comes_before_what_takes_long(tmp_path):
    """The packages are found, and fail when they are imported."""
    code, out, err = run(
        ["demo", "--size", "small", "--backend", "jax"],
        tmp_path,
        present=(*command.DEMO_PACKAGES, "jax"),
    )
    assert code == 1 and "rich" in err.splitlines()[-1]
    assert out.startswith(FIRST_LINE.format("jax"))


@pytest.mark.parametrize(
    "module", ["gradient_accumulator_cli", "gradient_accumulator_cli.command"]
)
@pytest.mark.parametrize("option", ["-m {}", "-m{}", "-W error -m {}"])
def test_as_a_module(option, module, tmp_path):
    """It must not import Keras, because the command chooses the backend first."""
    (tmp_path / "keras.py").write_text("raise ImportError('Keras is imported')")
    done = subprocess.run(
        [sys.executable, *option.format(module).split(), "demo", "--help"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(gradient_accumulator.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: gradient-accumulator demo ")


def test_the_version(tmp_path):
    code, out, err = run(["--version"], tmp_path)
    assert (code, err) == (0, "")
    assert out.strip() == gradient_accumulator.__version__


@pytest.mark.parametrize("colour", [True, False])
def test_no_color_leaves_no_escape_codes(colour, monkeypatch, capsys):
    """The output is a terminal. An empty `NO_COLOR=` has no effect (no-color.org)."""
    pytest.importorskip("rich")
    from gradient_accumulator_cli.demo.run import console

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    for line in (lambda c: c.rule("[bold]title"), lambda c: c.print("a", style="dim")):
        line(console())
    assert ("\x1b" in capsys.readouterr().out) == colour


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.skipif(
    command.missing("tensorflow") is not None, reason=str(command.missing("tensorflow"))
)
@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    arguments = ["demo", "--size", "small", "--backend", "tensorflow"]
    with start(arguments, tmp_path, TMPDIR=str(temporary)) as process:
        try:
            training = wait_for_child(process)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Interrupted." in err
    assert "Traceback" not in err
    assert not Path(f"/proc/{training}").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def wait_for_child(process):
    """Waits until the training process imports Keras; returns this process."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        for child in children.read_text().split():
            if "tensorflow" in Path(f"/proc/{child}/maps").read_text():
                return child
        time.sleep(0.05)
    raise AssertionError(f"nothing trains; exit status {process.poll()}")
