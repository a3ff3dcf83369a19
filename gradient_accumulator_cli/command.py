"""The command line: `gradient-accumulator demo`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")
PICTURES = (".png", ".pdf", ".svg")
DEMO_PACKAGES = ("nilearn", "matplotlib", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # the error shows the usage of the subcommand
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # A signal that ends this process must end the process that trains too.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _exit_on_signal)
    try:
        return demo(options)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="gradient-accumulator",
        description="Gradient accumulation for Keras 3 that equals the batch.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the version and exit"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train on a real brain and on sentences, in batches and in micro-batches",
        description=(
            "Trains a small 3D U-Net to find grey and white matter in the MNI152 T1 "
            "brain that the nilearn package ships, and a small transformer on made-up "
            "sentences of many lengths with a learning-rate schedule. Each is trained "
            "four times from the same weights: on the batch, on the batch in "
            "micro-batches, with Keras's own gradient accumulation, and on the batch "
            "in another order, which shows the effect of rounding. Prints tables, and "
            "draws a picture of the distances from the weights of the batch."
        ),
    )
    demo.set_defaults(parser=demo)
    demo.add_argument(
        "--backend",
        choices=BACKENDS,
        default=_default_backend(),
        help="the backend that Keras runs on (KERAS_BACKEND if set, or tensorflow)",
    )
    demo.add_argument(
        "--size",
        choices=("full", "small"),
        default="full",
        help="small takes one minute or a few, and shows less (full)",
    )
    demo.add_argument(
        "--epochs",
        type=_positive,
        help="epochs of the brain (6; 2 with --size small, or without TensorFlow)",
    )
    demo.add_argument(
        "--output",
        type=_picture,
        default="gradient-accumulator-demo.png",
        help="the picture: .png, .pdf or .svg (gradient-accumulator-demo.png)",
    )
    return parser


def demo(options: argparse.Namespace) -> int:
    """Runs the demonstration, or says what to install for it."""
    if advice := missing(options.backend):
        print(f"error: {advice}", file=sys.stderr)
        return 1
    # Printed first, because the imports take seconds.
    print(
        "A 3D U-Net learns the tissues of a brain, and a transformer learns "
        f"sentences, on {options.backend} ({options.size} size). Each trains four "
        "times from the same weights.",
        flush=True,
    )
    from gradient_accumulator_cli.demo import sentences
    from gradient_accumulator_cli.demo.data import SIZES
    from gradient_accumulator_cli.demo.run import run_demo

    size = SIZES[options.size]
    epochs = size.epochs
    if options.backend != "tensorflow":
        epochs = min(epochs, 2)  # 3D convolutions of JAX and PyTorch are slow on CPUs
    run_demo(
        options.backend,
        size,
        sentences.SIZES[options.size],
        options.epochs or epochs,
        options.output,
    )
    return 0


def missing(backend: str) -> str | None:
    """Returns which packages are missing and how to install them, or None."""
    lacking = [name for name in (*DEMO_PACKAGES, backend) if not _installed(name)]
    if not lacking:
        return None
    return (
        f"the demonstration needs {', '.join(lacking)}. Install with: "
        f"pip install {' '.join(lacking)}"
    )


def _default_backend() -> str:
    name = os.environ.get("KERAS_BACKEND")
    return name if name in BACKENDS else "tensorflow"


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"Expected a positive int. Received: {text!r}")
    return int(text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"Expected a file name that ends in {', '.join(PICTURES)}. "
            f"Received: {text!r}"
        )
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"Expected a file in a folder that exists. Received: {text!r}"
        )
    if path.is_dir():
        raise argparse.ArgumentTypeError(
            f"Expected a file, not a folder. Received: {text!r}"
        )
    return path


class _Version(argparse.Action):
    """The action of `--version`, which looks the version up only when it is given."""

    def __call__(self, parser, *_):
        print(_version())
        parser.exit()


def _version() -> str:
    """Returns the version from the metadata, because the library imports Keras."""
    try:
        return metadata.version("gradient-accumulator")
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "0+not.installed"


def _exit_on_signal(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
