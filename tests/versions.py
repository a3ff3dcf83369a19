"""What older versions of Keras, and of a backend that they need, cannot do themselves.

There is nothing to compare pieces with then.
"""

import pytest
from api import keras

VERSION = tuple(map(int, keras.__version__.split(".")[:2]))

# The backend, the first version of Keras that can, and why older ones cannot.
_SINCE = {
    ("torch", (3, 14), "a mask changes weights in place that a gradient needs"): (
        "outputs_one_of_two_masked",
        "outputs_loss_weights",
        "outputs_sum_and_mean_with_sample_weight",
        "outputs_mean_with_sample_weight_and_sum_over_batch_size",
        "outputs_metrics_of_each",
        "outputs_only_one_has_a_loss",
        "outputs_drawn",
    ),
    ("torch", (3, 14), "the gradient of a mean over no weight is NaN"): (
        "weights_zero_in_a_full_batch_mean_with_sample_weight",
        "fully_masked_full_batch_mean_with_sample_weight",
    ),
    ("torch", (3, 10), "metrics are built on a device without data"): ("metrics",),
    ("torch", (3, 12), "the compiler fails on Keras's code"): ("jit_compile",),
    ("jax", (3, 13), "batches are drawn ahead, and fail an update early"): (
        "data_that_fails",
    ),
    ("jax", (3, 10), "JAX 0.4 goes on when a callback fails"): ("exceptions",),
    ("jax", (3, 10), "optax needs a newer JAX than Keras knows"): ("optax",),
}


def unless_plain_fails(name):
    """The mark for a test of what `name` is about."""
    reasons = [
        f"Plain Keras {keras.__version__} fails on {backend}: {why}"
        for (backend, version, why), names in _SINCE.items()
        if name in names and backend == keras.backend.backend() and version > VERSION
    ]
    return pytest.mark.skipif(bool(reasons), reason=" ".join(reasons))
