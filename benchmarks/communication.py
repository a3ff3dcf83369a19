"""What reductions of gradients cost on paper: `python -m benchmarks.communication`.

The time of a ring all-reduce is that of Patarasuk and Yuan, "Bandwidth optimal
all-reduce algorithms for clusters of workstations", Journal of Parallel and Distributed
Computing 69 (2009): each of N devices sends and receives 2 (N - 1) / N of the data, in
2 (N - 1) steps. Assumed are links that are all alike and nobody else's, a reduction
that begins when its backward pass has ended, and micro-batches that take all devices as
long."""

from __future__ import annotations

from . import report

GRADIENTS = {"100 MB": 1e8, "1.4 GB": 1.4e9, "28 GB": 28e9}  # bytes
BANDWIDTHS = {"12.5 GB/s": 12.5e9, "50 GB/s": 50e9, "450 GB/s": 450e9}  # of a device
DEVICES = (2, 8, 64, 1024)
MICROBATCHES = (1, 8, 32)
LATENCY = 10e-6  # seconds a step
MICROBATCH = 0.1  # seconds


def all_reduce(
    size: float, devices: int, bandwidth: float, latency: float = LATENCY
) -> float:
    """Seconds of a ring all-reduce.

    Args:
        size: Bytes that each device has, and gets the sum of.
        devices: Their number.
        bandwidth: Bytes that a device sends in a second, while it receives as many.
        latency: Seconds that a message takes before its first byte.
    """
    others = devices - 1
    return 2 * others / devices * size / bandwidth + 2 * others * latency


def once_an_update(microbatches: int, microbatch: float, reduction: float) -> float:
    """Seconds of an update that reduces the sum of its micro-batches' gradients."""
    return microbatches * microbatch + reduction


def every_microbatch(microbatches: int, microbatch: float, reduction: float) -> float:
    """Seconds of as many micro-batches where each one's gradients are reduced."""
    return microbatches * (microbatch + reduction)


def main() -> None:
    rows = []
    for gradient, size in GRADIENTS.items():
        for bandwidth, rate in BANDWIDTHS.items():
            times = [all_reduce(size, devices, rate) for devices in DEVICES]
            ratios = [
                once_an_update(microbatches, MICROBATCH, times[-1])
                / every_microbatch(microbatches, MICROBATCH, times[-1])
                for microbatches in MICROBATCHES
            ]
            rows.append(
                [
                    f"{gradient}, {bandwidth}",
                    *[report.number(time * 1e3) for time in times],
                    *map(report.ratio, ratios),
                ]
            )
    heads = [f"N = {n:,}" for n in DEVICES] + [f"K = {k}" for k in MICROBATCHES]
    print(report.table(["G, B", *heads], rows))


if __name__ == "__main__":
    main()
