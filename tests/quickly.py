"""Compiles less well, and sooner: most of the tests' time would go to programs that run
a few times. `OPTIMIZED=1` (`make test-full`) has them compiled as users' programs are.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

# Of XLA on processors: what it spends most of its time on.
FLAGS = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
WANTED = not os.environ.get("OPTIMIZED")


def jax():
    """Before JAX starts; the processes that this one starts do it too."""
    if not WANTED or "PYTEST_XDIST_WORKER" in os.environ:
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    known = FLAGS if _are_known(*FLAGS) else [f for f in FLAGS if _are_known(f)]
    add_flags(*known)


def _are_known(*flags):
    """A process with a flag that XLA does not know ends where it starts."""
    tried = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "XLA_FLAGS": " ".join(flags)},
        capture_output=True,
    )
    return tried.returncode == 0


def add_flags(*flags):
    """Flags of XLA's besides those that are set."""
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])


def tensorflow():
    _optimize_graphs(not WANTED)


@contextmanager
def optimized_graphs():
    """TensorFlow as users have it, which drops what nothing needs."""
    _optimize_graphs(True)
    try:
        yield
    finally:
        tensorflow()


def _optimize_graphs(yes):
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not yes})
