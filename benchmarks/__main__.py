"""`python -m benchmarks COMMAND`; tables go to `results/`."""

from __future__ import annotations

import argparse
import importlib.util
from types import ModuleType

from . import (
    digits,
    distributed,
    exactness,
    keras2,
    loops,
    memory,
    normalization,
    report,
    speed,
)
from .models import MODELS

BACKENDS = ("tensorflow", "jax", "torch")
MODULES = (
    speed,
    memory,
    exactness,
    loops,
    normalization,
    digits,
    distributed,
    keras2,
)


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in MODULES:
        command = commands.add_parser(
            _name(module), help=module.__doc__.splitlines()[0]
        )
        backends = getattr(module, "BACKENDS", [*BACKENDS, "all"])
        command.add_argument("--backend", choices=backends, default=backends[-1])
        if module not in (exactness, digits):
            models = getattr(module, "DEFAULT", [*MODELS])
            command.add_argument(
                "--models", nargs="+", choices=MODELS, default=models, metavar="MODEL"
            )
        module.add_arguments(command)
        command.set_defaults(module=module)
    commands.add_parser("summary", help="the numbers of the README, from `results/`")
    arguments = parser.parse_args()
    if arguments.command == "summary":
        for module in MODULES:
            for backend in getattr(module, "BACKENDS", BACKENDS):
                saved = report.load(f"{_name(module)}-{backend}")
                print(
                    module.summary(backend, saved)
                    if saved
                    else f"{backend}, {_name(module)}: not measured"
                )
        return
    chosen = BACKENDS if arguments.backend == "all" else [arguments.backend]
    for backend in chosen:
        if importlib.util.find_spec(backend) is None:
            parser.exit(1, f"{backend} is not installed.\n")
        arguments.module.run(backend, arguments)


if __name__ == "__main__":
    main()
