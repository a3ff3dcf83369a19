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

# How many examples Hypothesis draws: in the core, in all, and for a person who looks
# for more, and for the smallest, which nobody else waits for.
SLOW = {hypothesis.Phase.shrink, hypothesis.Phase.explain}
for profile, examples in (("core", 2), ("all", 6), ("many", 150)):
    hypothesis.settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,  # compiling takes what it takes
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


def pytest_sessionfinish(session):
    covered.save()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with covered.by(covered.context_of(item)):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    """Notes the processors' time beside the clock's, with that of ended processes."""
    before = os.times()
    try:
        return (yield)
    finally:
        seconds = sum(os.times()[:4]) - sum(before[:4])
        item.user_properties.append(("processor", round(seconds, 3)))


def _make_two_devices():
    """For replicas, before TensorFlow begins."""
    import tensorflow as tf

    (processor,) = tf.config.list_physical_devices("CPU")
    device = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(processor, [device, device])


def pytest_report_header():
    return f"keras {keras.__version__}, {keras.backend.backend()}"


@pytest.fixture(autouse=True)
def drawn_in_microbatches(request, monkeypatch):
    """Small arrays too, but in tests that are about those."""
    if not KERAS_2 and "small_arrays" not in request.keywords:
        from gradient_accumulator.compat import keras3_arrays as arrays

        monkeypatch.setattr(arrays, "LARGE", 0)


@pytest.fixture(autouse=True)
def same_seeds():
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session()
    # TensorFlow keeps what it has traced, and every collection would look through it.
    gc.freeze()
