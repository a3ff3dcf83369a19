"""Every test begins with the same seeds and ends with a cleared Keras session."""

import gc
import os

import covered
import quickly

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if os.environ.get("KERAS_BACKEND") == "jax":
    quickly.jax()

import hypothesis
import pytest
from api import KERAS_2, keras

# Warnings are errors. The exceptions come from third parties, or plain Keras gives them
# for the same model and data too.
LET_THROUGH = (
    # TensorFlow's tensors do not know the keyword of NumPy 2.
    "__array__ implementation doesn't accept a copy keyword",
    # Plain Keras warns about variables without a gradient, which some problems have.
    "Gradients do not exist for variables",
    # JAX warns about weights in float64, in plain Keras too.
    "Explicitly requested dtype float64 requested in ShapeDtypeStruct",
    # PyTorch's compiler calls functions that PyTorch has deprecated.
    "`torch.jit.script_method` is deprecated",
    # PyTorch's compiler also reads the gradients of all tensors in a layer.
    "The .grad attribute of a Tensor that is not a leaf",
)

# The number of examples that Hypothesis draws: in the core, in all tests, and for a
# person who looks for failures. Only that person waits for the smallest example.
SLOW = {hypothesis.Phase.shrink, hypothesis.Phase.explain}
for profile, examples in (("core", 2), ("all", 6), ("many", 150)):
    hypothesis.settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,  # compilation may take long
        derandomize=profile != "many",
        phases=[p for p in hypothesis.Phase if p not in SLOW or profile == "many"],
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.data_too_large,
        ],
        database=None,
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "all"))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    if KERAS_2:  # it was written for older versions of Python and NumPy
        config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")
        # Keras 2 mistakes a sigmoid for a softmax.
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
    # To clear a session collects garbage. This excludes the objects of the imports.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    covered.save()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with covered.by(covered.context_of(item)):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    """Records the processors' time too, with that of processes that have ended."""
    before = os.times()
    try:
        return (yield)
    finally:
        seconds = sum(os.times()[:4]) - sum(before[:4])
        item.user_properties.append(("processor", round(seconds, 3)))


def _make_two_devices():
    """Makes two devices for replicas, which TensorFlow allows only when it begins."""
    import tensorflow as tf

    (processor,) = tf.config.list_physical_devices("CPU")
    device = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(processor, [device, device])


def pytest_report_header():
    return f"keras {keras.__version__}, {keras.backend.backend()}"


@pytest.fixture(autouse=True)
def drawn_in_microbatches(request, monkeypatch):
    """Draws small arrays in micro-batches too, except in tests of small arrays."""
    if not KERAS_2 and "small_arrays" not in request.keywords:
        from gradient_accumulator.compat import keras3_arrays as arrays

        monkeypatch.setattr(arrays, "LARGE", 0)


@pytest.fixture(autouse=True)
def same_seeds():
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session()
    # TensorFlow keeps its traces. Without this, every collection would go through them.
    gc.freeze()
