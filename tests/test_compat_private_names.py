"""Every private name that the package uses is in the list and in docs/design.md, and
the installed version has it.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import keras
import private_names
import pytest
from helpers import BACKEND, core_on
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from versions import is_before

from gradient_accumulator import (
    AccumBatchNormalization,
    FlushGradients,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
)
from gradient_accumulator.compat import keras3_data as data
from gradient_accumulator.fit import Accumulating

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


def trained():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(*[keras.ops.ones((2, n)) for n in (2, 1)], verbose=0)
    return model


def optimizer():
    model = trained()
    return model.optimizer


def scaler():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())


def trainer():
    """The module with the class that has `fit`, on this backend."""
    return importlib.import_module(f"keras.src.backend.{BACKEND}.trainer")


def strategy():
    import tensorflow as tf

    return tf.distribute.get_strategy().extended


def graph():
    import tensorflow as tf

    return tf.Graph()


def torch():
    return importlib.import_module("torch")


def built_with_averages():
    made = keras.optimizers.SGD(use_ema=True)
    made.build(trained().trainable_variables)
    return made


@dataclasses.dataclass(frozen=True)
class Name:
    """Where a private name is found.

    Args:
        owner: A function that makes the object that has the name.
        read_by: The method that reads the name, if objects have it only during `fit`.
        backend: The only backend on which it is used; None if there are several.
        since: The first version of Keras that has the name.
    """

    owner: Callable
    read_by: str | None = None
    backend: str | None = None
    since: str = "3.0"

    def is_here(self):
        return self.backend in (None, BACKEND) and not is_before(self.since)


NAMES = {
    "_add_control_dependencies": Name(graph, backend="tensorflow"),
    "_call_has_training_arg": Name(trained),
    "_common_apply": Name(scaler),
    "_compile_loss": Name(trained),
    "_compile_metrics": Name(trained),
    "_compute_loss": Name(trained),
    "_flat_losses": Name(lambda: trained()._compile_loss),
    "_flatten_layers": Name(trained),
    "_foreach_add_": Name(torch, backend="torch"),
    "_foreach_mul": Name(torch, backend="torch"),
    "_get_iterator": Name(lambda: trainer().JAXEpochIterator, backend="jax"),
    "_get_variable_index": Name(optimizer),
    "_in_multi_worker_mode": Name(strategy, backend="tensorflow"),
    "_inputs": Name(lambda: ArrayDataAdapter(keras.ops.ones((2, 1)))),
    "_jax_state": Name(
        lambda: trainer().JAXTrainer, read_by="jax_state_sync", backend="jax"
    ),
    "_keras_history": Name(lambda: trained().inputs[0]),
    "_layout": Name(lambda: trained().weights[0], since="3.10"),
    "_loss_tracker": Name(trained),
    "_losses_override": Name(trained),
    "_maybe_symbolic_build": Name(
        lambda: trainer().TensorFlowTrainer, backend="tensorflow"
    ),
    "_model_variables_moving_average": Name(built_with_averages),
    "_moments": Name(lambda: keras.layers.BatchNormalization),
    "_output_shape": Name(lambda: keras.layers.Lambda(abs)),
    "_post_build": Name(trained),
    "_symbolic_build": Name(trained),
    "_tf_apply": Name(scaler),
    "_trainable_variables": Name(optimizer),
    "_trainable_variables_indices": Name(optimizer),
    "_var_key": Name(optimizer),
    "_variables": Name(optimizer),
}
OF_OBJECTS = [name for name, each in NAMES.items() if each.read_by is None]
OF_METHODS = [name for name, each in NAMES.items() if each.read_by is not None]


@core_on("tensorflow")
def test_the_names_are_known():
    ours = private_names.overridden(
        Accumulating,
        GradientAccumulateModel,
        GradientAccumulateOptimizer,
        AccumBatchNormalization,
        FlushGradients,
        data.Updates,
    )
    used = private_names.attributes(keras_2=False) | ours
    known = {*NAMES}
    # Each optimizer has that one as an attribute, which its class does not show.
    assert used | {"_model_variables_moving_average"} == known


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(OF_OBJECTS))
def test_an_object_has_it(name):
    if not NAMES[name].is_here():
        pytest.skip("nothing asks for it on this backend, or in this version")
    assert hasattr(NAMES[name].owner(), name)


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(OF_METHODS))
def test_a_method_reads_it(name):
    if not NAMES[name].is_here():
        pytest.skip("nothing asks for it on this backend, or in this version")
    method = getattr(NAMES[name].owner(), NAMES[name].read_by)
    assert name in inspect.getsource(method)


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(private_names.imports()))
def test_it_can_be_imported(name):
    of_backend = re.match(r"keras\.src\.backend\.(jax|tensorflow|torch)\.", name)
    if of_backend and of_backend[1] != BACKEND:
        pytest.skip(f"it is used on {of_backend[1]} only")
    found, rest = keras, name.split(".")[1:]
    while rest:
        part, *rest = rest
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)


@core_on("tensorflow")
@pytest.mark.parametrize(
    "name", sorted({*NAMES, *private_names.attributes(keras_2=True)})
)
def test_the_design_has_it(name):
    assert f"`{name}`" in DESIGN.read_text()
