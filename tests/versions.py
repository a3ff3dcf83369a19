"""What older versions of Keras, or of the backends that they need, cannot do.

Plain Keras then gives no result to compare micro-batches with.
"""

import dataclasses

import pytest
from api import keras


def is_before(version):
    """Whether Keras is older than `version`, such as "3.14"."""
    here, other = (
        tuple(map(int, v.split(".")[:2])) for v in (keras.__version__, version)
    )
    return here < other


@dataclasses.dataclass(frozen=True)
class Since:
    """The first version of Keras that passes on a backend, and why older ones fail."""

    backend: str
    version: str
    why: str

    def plain_fails(self):
        return self.backend == keras.backend.backend() and is_before(self.version)


MASKS_IN_PLACE = Since(
    "torch", "3.14", "a mask changes weights in place that a gradient needs"
)
MEAN_OVER_NO_WEIGHT = Since(
    "torch", "3.14", "the gradient of a mean over no weight is NaN"
)
METRICS = Since("torch", "3.10", "metrics are built on a device without data")
JIT_COMPILE = Since("torch", "3.12", "the compiler fails on Keras's code")
DATA_THAT_FAILS = Since(
    "jax", "3.13", "batches are drawn ahead, and fail an update early"
)
EXCEPTIONS = Since("jax", "3.10", "JAX 0.4 goes on when a callback fails")
OPTAX = Since("jax", "3.10", "optax needs a newer JAX than Keras knows")


def unless_plain_fails(*since):
    """The mark of a test that plain Keras passes only since these versions."""
    reasons = [
        f"Plain Keras {keras.__version__} fails on {each.backend}: {each.why}"
        for each in since
        if each.plain_fails()
    ]
    return pytest.mark.skipif(bool(reasons), reason=" ".join(reasons))
