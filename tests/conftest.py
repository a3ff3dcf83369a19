"""Every test begins with the same seeds and ends with a cleared Keras session."""

import gc
import os

import quickly

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if os.environ.get("KERAS_BACKEND") == "jax":
    quickly.jax()

import pytest
from api import KERAS_2, keras

# Warnings are errors. What is let through comes from third parties, or is what plain
# Keras says about the same model and data too.
LET_THROUGH = (
    # TensorFlow's tensors do not know the keyword of NumPy 2.
    "__array__ implementation doesn't accept a copy keyword",
    # Plain Keras says so of variables without a gradient, which some problems have.
    "Gradients do not exist for variables",
    # JAX says so of weights in float64, in plain Keras too.
    "Explicitly requested dtype float64 requested in ShapeDtypeStruct",
    # PyTorch's compiler calls what PyTorch deprecated.
    "`torch.jit.script_method` is deprecated",
    # It also looks at the gradients of all tensors that it meets in a layer.
    "The .grad attribute of a Tensor that is not a leaf",
)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    if KERAS_2:  # was written for older versions of Python and NumPy
        config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")
        # It takes a sigmoid for a softmax.
        config.addinivalue_line(
            "filterwarnings", "ignore:.*received `from_logits=True`"
        )
    for message in LET_THROUGH:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_sessionstart(session):
    if KERAS_2:
        _make_two_devices()
    if keras.backend.backend() == "tensorflow":
        quickly.tensorflow()
    # Clearing a session collects garbage: not among what importing has made.
    gc.collect()
    gc.freeze()


def _make_two_devices():
    """For replicas, before TensorFlow begins."""
    import tensorflow as tf

    (processor,) = tf.config.list_physical_devices("CPU")
    device = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(processor, [device, device])


def pytest_report_header():
    return f"keras {keras.__version__}, {keras.backend.backend()}"


@pytest.fixture(autouse=True)
def drawn_in_pieces(request, monkeypatch):
    """Small arrays too, but in tests that are about those."""
    if not KERAS_2 and "small_arrays" not in request.keywords:
        from gradient_accumulator.backend.keras3 import arrays

        monkeypatch.setattr(arrays, "LARGE", 0)


@pytest.fixture(autouse=True)
def same_seeds():
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session()
    # TensorFlow keeps what it has traced, and every collection would look through it.
    gc.freeze()
