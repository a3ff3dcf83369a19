"""What several devices cost: the time of an update, and the bytes that it reduces."""

from __future__ import annotations

import argparse
import contextlib
import math
import socket
import statistics
import sys

from . import meters, report
from .processes import Failed, Process
from .speed import add_timing_arguments
from .variants import VARIANTS, Spec

DEFAULT = ["transformer"]
DEVICES = (1, 2, 4)
UPDATES = 2  # an epoch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # A micro-batch's examples are those of all devices together.
    add_timing_arguments(parser, rounds=3)


def ways(backend: str) -> tuple[str, str]:
    """Plain training and ours; Keras 3.15's `fit` reduces nothing on PyTorch."""
    return ("replicated" if backend == "torch" else "microbatches"), "split"


class Group:
    """What trains on so many devices: on PyTorch a process for each, else one."""

    def __init__(self, backend: str, model: str, way: str, devices: int, arguments):
        count = devices if backend == "torch" else 1
        spec = Spec(
            backend,
            model,
            way,
            size=arguments.size // devices,
            microbatches=arguments.microbatches,
            updates=UPDATES,
            replicas=devices // count,
        )
        # Virtual devices are processors, whatever else the machine has.
        extra = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
        if backend == "jax":
            extra["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
            # Devices wait for each other in threads, which are as many as processors.
            extra["NPROC"] = str(4 * devices)
        if backend == "torch":
            threads = str(max(1, meters.cores() // devices))
            extra |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
            extra |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            extra |= {"WORLD_SIZE": str(count)}
        self._processes = [
            Process(spec, "devices", RANK=str(rank), LOCAL_RANK=str(rank), **extra)
            for rank in range(count)
        ]

    def wait(self) -> dict:
        first, *_ = [process.wait().ready for process in self._processes]
        return first

    def ask(self, command: str = "") -> dict:
        for process in self._processes:
            process.ask(command)
        first, *_ = [process.answer() for process in self._processes]
        return first

    def end(self) -> None:
        for process in self._processes:
            process.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(backend: str, arguments: argparse.Namespace) -> None:
    if arguments.size % max(DEVICES):
        raise SystemExit(f"--size must be a multiple of {max(DEVICES)}.")
    measured, about = {}, {}
    for model in arguments.models:
        measured[model] = {"times": {}, "bytes": {}}
        for way in ways(backend):
            ready = _measure(backend, model, way, arguments, measured[model])
            measured[model]["gradients"] = ready["gradients"]
            about = {key: ready[key] for key in ("device", "versions")}
        print(f"{backend}, {model}: {measured[model]}", file=sys.stderr)
    report.save(
        f"distributed-{backend}",
        f"Several devices on {backend}",
        about,
        _text(backend, measured, arguments),
        {"microbatches": arguments.microbatches, "models": measured},
    )


def _measure(backend, model, way, arguments, measured: dict) -> dict:
    """Add what one way to train takes; all numbers of devices, round about."""
    found: dict[str, list[float]] = {str(devices): [] for devices in DEVICES}
    with contextlib.ExitStack() as stack:
        groups = {}
        for devices in DEVICES:
            group = Group(backend, model, way, devices, arguments)
            stack.callback(group.end)
            try:
                ready = group.wait()
            except Failed as failure:
                raise SystemExit(f"{model}, {way} failed:\n{failure}") from failure
            groups[str(devices)] = group
        for _ in range(arguments.rounds):
            for devices, group in groups.items():
                found[devices].append(statistics.median(group.ask()["seconds"]))
        measured["bytes"][way] = groups[str(max(DEVICES))].ask("count")["bytes"]
    measured["times"][way] = {devices: min(times) for devices, times in found.items()}
    return ready


def scaling(times: dict[str, float], devices: int) -> float:
    """The time of an update to that on one device."""
    return times.get(str(devices), math.nan) / times.get("1", math.nan)


def _text(backend: str, measured: dict, arguments: argparse.Namespace) -> str:
    both = ways(backend)
    names = {both[0]: VARIANTS[both[0]], both[1]: f"ours, K = {arguments.microbatches}"}
    rows = [
        [
            f"{model}, {names[way]}",
            *[report.number(found["times"][way][str(n)] * 1e3) for n in DEVICES],
            *[report.ratio(scaling(found["times"][way], n)) for n in DEVICES[1:]],
        ]
        for model, found in measured.items()
        for way in both
    ]
    heads = [f"{n} device{'s' * (n > 1)}" for n in DEVICES]
    sent = [
        [
            model,
            *[
                f"{number:,.0f}"
                for number in (
                    found["gradients"],
                    *[found["bytes"][way] for way in both],
                )
            ],
            f"{found['bytes'][both[1]] / found['bytes'][both[0]]:.3f}",
        ]
        for model, found in measured.items()
    ]
    examples = arguments.microbatches * arguments.size
    parts = [
        f"Milliseconds for {examples} examples, on all devices together, in "
        f"{arguments.microbatches} micro-batches; Adam. Plain training makes an update "
        f"after each micro-batch, ours one. {HOW[backend]} Of {arguments.rounds} "
        "rounds, interleaved over the numbers of devices, the best, of each round the "
        f"median. All devices share the {meters.cores()} cores: the ratios, to one "
        "device's time, show what more devices cost, and no speed-up. Below 1 one "
        "device left a core idle.",
        report.table(["", *heads, *[f"{n} / 1" for n in DEVICES[1:]]], rows),
        f"Bytes that each of {max(DEVICES)} devices hands to reductions for these "
        f"{examples} examples, {COUNTED[backend]}; 1 / K is "
        f"{1 / arguments.microbatches:.3f}:",
        report.table(
            ["model", "gradient", names[both[0]], names[both[1]], "ratio"], sent
        ),
    ]
    if backend == "tensorflow" and "transformer" in measured:
        parts.append(
            "The transformer's embedding has sparse gradients there: slices, which are "
            "as many in an update as its micro-batches have together."
        )
    return "\n\n".join(parts)


HOW = {
    "tensorflow": "Logical processors and a `MirroredStrategy`, in one process.",
    "jax": "Devices of `--xla_force_host_platform_device_count` and `DataParallel`, in "
    "one process.",
    "torch": "A process for each device, with gloo; Keras 3.15's `fit` reduces nothing "
    "on PyTorch, so plain training is a loop by hand, with Keras's optimizer.",
}
COUNTED = {
    "tensorflow": "counted in the graphs while they run",
    "jax": "by the programs that XLA compiled",
    "torch": "by the profiler's `gloo:all_reduce` events",
}


def summary(backend: str, saved: dict) -> str:
    """A few lines for the README."""
    plain, ours = ways(backend)
    lines = [f"{backend}, several devices ({saved['device']}):"]
    for model, found in saved["models"].items():
        most = max(DEVICES)
        lines.append(
            f"  {model}: {most} devices / 1: "
            f"{VARIANTS[plain]} {report.ratio(scaling(found['times'][plain], most))}, "
            f"ours {report.ratio(scaling(found['times'][ours], most))}; bytes "
            f"{found['bytes'][ours] / found['bytes'][plain]:.3f} of plain training's"
        )
    return "\n".join(lines)
