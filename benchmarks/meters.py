"""Memory and machine: what a process can read about itself without extra packages."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def _field(name: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is none (macOS)."""
    if not _STATUS.exists():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def resident() -> int:
    """Bytes that this process holds now, without those that are pages of files.

    How much of the libraries' code is in memory at one time is up to the system.
    """
    held = _field("VmRSS")
    return peak() if held is None else held - _files()


def peak() -> int:
    """The most bytes that this process held since `reset_peak`, without files'."""
    most = _field("VmHWM")
    if most is None:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if platform.system() == "Darwin" else most * 1024
    return most - _files()


def _files() -> int:
    return (_field("RssFile") or 0) + (_field("RssShmem") or 0)


def reset_peak(backend: str) -> None:
    """Give what is free back to the system, then forget the peaks so far."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError) as error:  # not Linux
        print(f"The peak counts from the process's start: {error}", file=sys.stderr)
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    elif backend == "tensorflow":
        import tensorflow as tf

        for gpu in tf.config.list_logical_devices("GPU")[:1]:
            tf.config.experimental.reset_memory_stats(gpu.name)


def device_peak(backend: str) -> int | None:
    """The backend's own count of the GPU's peak, in bytes; None without a GPU.

    JAX's counter cannot be reset: its peak counts from the start of the process.
    """
    if backend == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    if backend == "tensorflow":
        import tensorflow as tf

        for gpu in tf.config.list_logical_devices("GPU"):
            return tf.config.experimental.get_memory_info(gpu.name)["peak"]
        return None
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def temporaries(backend: str) -> int | None:
    """JAX: the temporaries of the largest compiled step, from its memory analysis."""
    if backend != "jax":
        return None
    import jax

    compiled = jax.devices()[0].client.live_executables()
    return max(e.get_compiled_memory_stats().temp_size_in_bytes for e in compiled)


def device(backend: str) -> str:
    """The GPU that the backend uses, or the processor."""
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    elif backend == "tensorflow":
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            details = tf.config.experimental.get_device_details(gpu)
            return details.get("device_name", "GPU")
    else:
        import jax

        if jax.default_backend() != "cpu":
            return jax.devices()[0].device_kind
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        name = found[1].strip() if found else name
    return f"{name}, {cores()} cores"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions(backend: str) -> str:
    found = {
        d.metadata["Name"].lower().replace("_", "-"): d.version
        for d in importlib.metadata.distributions()
        if d.metadata["Name"]
    }
    names = ["keras", "jax"] if backend == "jax" else ["keras", backend]
    parts = [f"Python {platform.python_version()}"]
    for name in names:
        version = next((v for n, v in found.items() if n.split("-")[0] == name), "?")
        parts.append(f"{name} {found.get(name, version)}")
    return ", ".join(parts)
