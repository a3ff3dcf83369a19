"""Trains a problem by Keras and in micro-batches, and measures how far they differ."""

import contextlib
import dataclasses
import functools
import gc
import re
import weakref

import numpy as np
import problems
import pytest
from api import KERAS_2, keras, ops
from versions import unless_plain_fails

from gradient_accumulator import GradientAccumulateOptimizer, accumulate
from gradient_accumulator.compat import internals

from .marks import BACKEND

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # a fraction of a variable's movement


class Batches(keras.utils.PyDataset):
    """Gives `fit` the given batches, in order, which may have different sizes."""

    def __init__(self, batches, workers=1):
        super().__init__(**({} if KERAS_2 else {"workers": workers}))
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def array(variable):
    return np.asarray(ops.convert_to_numpy(variable), "float64")


def is_seed(variable):
    """Whether a variable is a seed: it counts forward passes, so that it differs."""
    return "seed_generator" in internals.path(variable)


@dataclasses.dataclass
class Trained:
    """The results of a training, as NumPy arrays, which outlive the model."""

    before: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    history: list[dict[str, list[float]]]


def arrays(variables):
    """The values by number and name, without the numbers that Keras puts in names."""
    return {
        f"{i} {re.sub(r'_[0-9]+', '', v.name)}": array(v)
        for i, v in enumerate(variables)
        if not is_seed(v)
    }


def optimizer_variables(optimizer):
    """The variables that an optimizer has without accumulation."""
    if isinstance(optimizer, GradientAccumulateOptimizer):
        return optimizer_variables(optimizer.inner_optimizer)
    inner = getattr(optimizer, "inner_optimizer", None)
    if KERAS_2:
        return list((inner or optimizer).variables())
    if inner is None:
        return optimizer.variables
    own = len(optimizer.variables) - len(inner.variables)
    return optimizer.variables[:own] + optimizer_variables(inner)


@contextlib.contextmanager
def configured(name, value):
    """A context with one of Keras's settings changed: "floatx" or "dtype_policy"."""
    if KERAS_2:
        module, name = {
            "floatx": (keras.backend, "floatx"),
            "dtype_policy": (keras.mixed_precision, "global_policy"),
        }[name]
    else:
        module = keras.config
    change, before = getattr(module, f"set_{name}"), getattr(module, name)()
    change(value)
    try:
        yield
    finally:
        change(before)


# Each test is traced again, which takes long, so that not all ways are tried.
TRACED = BACKEND == "tensorflow" and not KERAS_2


def marks_of(problem, way, is_left=True):
    """The marks of a case, which say where it runs.

    Args:
        problem: The problem.
        way: One of `problems.problem.WAYS`.
        is_left: Whether only `make test-full` runs the case if each test is traced
            again and other problems are like this one.
    """
    marks = [unless_plain_fails(*problem.since)]
    kind = "optimizer" if way == "optimizer" else "fit"
    if way in problem.core:
        marks.append(pytest.mark.core)
    elif TRACED and is_left and kind in problem.alike:
        marks.append(pytest.mark.full)
    return marks


def named(name):
    return next(p for p in problems.PROBLEMS if p.name == name)


def train(problem, data, prepare=lambda model: model, **overrides):
    """Trains on `data` (one epoch's batches) after `prepare(model)`."""
    with configured("floatx", problem.floatx):
        model = problem.build()
        before = arrays(model.weights)
        history = []
        for number, stage in enumerate(problem.stages):
            if stage is not None:
                stage(model)
            problem.compile(model, **overrides)
            if number == 0:
                model = prepare(model)
            fitted = model.fit(
                Batches(data),
                epochs=problem.epochs,
                shuffle=False,
                verbose=0,
                class_weight=problem.class_weight,
            )
            history.append(fitted.history)
        return Trained(
            before=before,
            weights=arrays(model.weights),
            optimizer=arrays(optimizer_variables(model.optimizer)),
            history=history,
        )


@functools.cache
def plain(name):
    """Plain Keras on the batches of the problem of this name."""
    problem = named(name)
    return train(problem, problem.batches())


def microbatches(problem):
    """One epoch's data for `accum_steps`."""
    updates = [problem.cut(batch) for batch in problem.batches()]
    assert all(len(update) == problem.accum_steps for update in updates[:-1])
    return [microbatch for update in updates for microbatch in update]


def even(problem):
    """The only batch of an epoch, and its micro-batches, which have equal sizes."""
    batch = problem.batches()[0]
    if problem.microbatches:
        return batch, problem.microbatches(batch)
    size = problems.MICROBATCH - 1
    examples = len(keras.tree.flatten(batch)[0])
    batch = problems.cut(batch, examples - examples % size)[0]
    return batch, problems.cut(batch, size)


def in_microbatches(problem, way, microbatch=problems.MICROBATCH, **settings):
    """Trains a problem in micro-batches.

    Args:
        problem: The problem.
        way: "microbatch_size" or "accum_steps".
        microbatch: The number of examples in a micro-batch, for "microbatch_size".
        **settings: Further arguments of `accumulate`.
    """
    if way == "microbatch_size":
        data, size = problem.batches(), microbatch
    else:
        data, size = microbatches(problem), problem.accum_steps
    return train(
        problem,
        data,
        lambda model: accumulate(model, **{way: size}, **settings),
    )


def differences(trained, reference, dtype="float32"):
    """The differences that are larger than rounding, as a list of sentences.

    A variable may differ by 1e-5 of its movement, plus the spacing of float32 at its
    own size, because every update rounds to this spacing.
    """
    found = []

    def compare(what, a, b, start):
        moved = np.max(np.abs(b - start), initial=0)
        spacing = np.finfo(dtype).eps * np.max(np.abs(b), initial=0)
        off = np.max(np.abs(a - b), initial=0)
        if not off <= TOLERANCE[dtype] * moved + spacing:
            found.append(f"{what}: off by {off:.2e}, moved by {moved:.2e}")

    assert trained.weights.keys() == reference.weights.keys()
    assert len(trained.optimizer) == len(reference.optimizer)
    for name, b in reference.weights.items():
        compare(name, trained.weights[name], b, reference.before[name])
    pairs = zip(trained.optimizer.values(), reference.optimizer.items(), strict=True)
    for a, (name, b) in pairs:
        compare(f"optimizer {name}", a, b, 0)
    for a, b in zip(trained.history, reference.history, strict=True):
        if a.keys() != b.keys():
            found.append(f"History has {[*a]}, plain Keras {[*b]}")
            continue
        for name, values in b.items():
            if not np.allclose(a[name], values, rtol=TOLERANCE[dtype], atol=1e-7):
                found.append(f"History {name}: {a[name]}, plain Keras {values}")
    return found


def moved(trained):
    """The largest movement of a weight."""
    return max(
        np.max(np.abs(b - trained.before[name]), initial=0)
        for name, b in trained.weights.items()
    )


def assert_same(trained, reference, dtype="float32"):
    found = differences(trained, reference, dtype)
    assert not found, "\n".join(found)


def assert_alike(problem, trained, reference):
    """Asserts that two trainings of a problem have equal results."""
    if KERAS_2 and problem.rounds_loss:
        # Half precision rounds the loss of each micro-batch.
        (logs,), (expected,) = trained.history, reference.history
        np.testing.assert_allclose(logs.pop("loss"), expected["loss"], atol=2e-3)
        reference = dataclasses.replace(
            reference, history=[{k: expected[k] for k in expected if k != "loss"}]
        )
    assert_same(trained, reference, problem.floatx)


def assert_close(got, expected):
    """Asserts that arrays in two dictionaries differ by rounding only."""
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        scale = np.max(np.abs(values), initial=0)
        np.testing.assert_allclose(
            got[name], values, rtol=0, atol=1e-5 * scale, err_msg=name
        )


def with_optimizer(problem, change):
    """The problem with `change(its optimizer)`."""

    def optimizer(**overrides):
        return change(problem.optimizer(**overrides))

    return dataclasses.replace(problem, optimizer=optimizer)


@contextlib.contextmanager
def collector(**thresholds):
    """A context in which Python's collector has these thresholds."""
    before = gc.get_threshold()
    after = dict(zip(("young", "older", "oldest"), before), **thresholds)
    gc.collect()
    gc.set_threshold(*after.values())
    try:
        yield
    finally:
        gc.set_threshold(*before)


def counting_activations(alive, training_only=True):
    """A model that counts the activations of earlier calls that are still in memory.

    On PyTorch, `Add` leaves its inputs in a reference cycle.
    """
    seen = []

    class Watch(keras.layers.Layer):
        def call(self, x, training=False):
            # Keras finds shapes by calls on the "meta" device.
            if (training or not training_only) and x.device.type != "meta":
                alive.append(sum(reference() is not None for reference in seen))
                seen.append(weakref.ref(x))
            return x

    keras.utils.set_random_seed(0)
    x = keras.Input((problems.FEATURES,))
    branches = [keras.layers.Dense(problems.CLASSES)(x) for _ in range(2)]
    return keras.Model(x, keras.layers.Add()([Watch()(branches[0]), branches[1]]))
