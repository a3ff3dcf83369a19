"""What XLA is told before it starts, in the variable that it reads."""

import os
import subprocess
import sys

# Most of the tests' time on JAX is spent compiling, for programs that run a few times.
QUICKLY_COMPILED = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def add_flags(*flags):
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])


def compile_quickly():
    """Flags for it, where the installed JAX knows them and the caller set none."""
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ:
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    for flag in QUICKLY_COMPILED:
        # A process with a flag that XLA does not know ends where it starts.
        tried = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env={**os.environ, "XLA_FLAGS": flag},
            capture_output=True,
        )
        if tried.returncode == 0:
            add_flags(flag)
