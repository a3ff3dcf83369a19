"""Compiles programs faster, without optimizations, because each runs only a few times.

With `OPTIMIZED=1` (`make test-full`) programs are compiled as for users.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

# The parts of XLA on processors that take most of its time.
FLAGS = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
WANTED = not os.environ.get("OPTIMIZED")


def jax():
    """Sets flags before JAX starts, also for the processes that this one starts."""
    if not WANTED or "PYTEST_XDIST_WORKER" in os.environ:
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    known = FLAGS if _are_known(*FLAGS) else [f for f in FLAGS if _are_known(f)]
    add_flags(*known)


def _are_known(*flags):
    """Whether XLA knows these flags: otherwise a process ends when it starts."""
    tried = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "XLA_FLAGS": " ".join(flags)},
        capture_output=True,
    )
    return tried.returncode == 0


def add_flags(*flags):
    """Adds flags of XLA to those that are set."""
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])


def tensorflow():
    _optimize_graphs(not WANTED)


@contextmanager
def optimized_graphs():
    """A context in which TensorFlow optimizes graphs, and drops their unused parts."""
    _optimize_graphs(True)
    try:
        yield
    finally:
        tensorflow()


def _optimize_graphs(yes):
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not yes})
