"""Measures the peak memory of this process, or of its CUDA device if it has one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import keras


def watch_peak() -> Callable[[], float]:
    """Returns a function that returns by how many MB the peak has grown since now.

    Libraries, data and weights that are in memory now do not count.
    """
    peak = _device_peak() or _host_peak()
    start = peak()
    return lambda: (peak() - start) / 1e6


def _device_peak() -> Callable[[], float] | None:
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            tf.config.experimental.reset_memory_stats("GPU:0")
            return lambda: tf.config.experimental.get_memory_info("GPU:0")["peak"]
    elif backend == "jax":
        import jax

        device = jax.devices()[0]
        if device.platform == "gpu":
            # The peak cannot be reset, but nothing large has run yet.
            return lambda: (device.memory_stats() or {})["peak_bytes_in_use"]
    elif backend == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.max_memory_allocated
    return None


def _host_peak() -> Callable[[], float]:
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where `ru_maxrss` begins at the parent's
        try:  # Reset the peak, which importing the libraries has raised.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            warnings.warn(
                "The peak of memory could not be reset before training, so that a "
                f"lower peak of training is not seen: {error}",
                stacklevel=2,
            )
        return lambda: _kilobytes(status.read_text(), "VmHWM:") * 1024
    try:
        import resource
    except ImportError:  # Windows
        return lambda: float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _kilobytes(status: str, name: str) -> float:
    values = [line.split()[1] for line in status.splitlines() if line.startswith(name)]
    return float(values[0]) if values else float("nan")
