"""Every private name of others that the package uses is known, is in docs/design.md,
and is one of the installed version.
"""

import importlib
import inspect
from pathlib import Path

import keras
import private_names
import pytest
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from marks import core_on
from versions import is_before

from gradient_accumulator import (
    AccumBatchNormalization,
    FlushGradients,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
)
from gradient_accumulator.compat import keras3_data as data
from gradient_accumulator.fit import Accumulating

BACKEND = keras.backend.backend()
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
    """The class that `fit` is of, on this backend."""
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


# What has each: function without arguments.
OWNERS = {
    "_add_control_dependencies": graph,
    "_call_has_training_arg": trained,
    "_common_apply": scaler,
    "_compile_loss": trained,
    "_compile_metrics": trained,
    "_compute_loss": trained,
    "_flat_losses": lambda: trained()._compile_loss,
    "_flatten_layers": trained,
    "_foreach_add_": torch,
    "_foreach_mul": torch,
    "_get_iterator": lambda: trainer().JAXEpochIterator,
    "_get_variable_index": optimizer,
    "_in_multi_worker_mode": strategy,
    "_inputs": lambda: ArrayDataAdapter(keras.ops.ones((2, 1))),
    "_keras_history": lambda: trained().inputs[0],
    "_layout": lambda: trained().weights[0],
    "_loss_tracker": trained,
    "_losses_override": trained,
    "_maybe_symbolic_build": lambda: trainer().TensorFlowTrainer,
    "_model_variables_moving_average": built_with_averages,
    "_moments": lambda: keras.layers.BatchNormalization,
    "_output_shape": lambda: keras.layers.Lambda(abs),
    "_post_build": trained,
    "_symbolic_build": trained,
    "_tf_apply": scaler,
    "_trainable_variables": optimizer,
    "_trainable_variables_indices": optimizer,
    "_var_key": optimizer,
    "_variables": optimizer,
}
# Read by a method of a trainer, and of no object between calls of `fit`.
READ = {"_jax_state": ("JAXTrainer", "jax_state_sync")}
OF_BACKEND = {
    "_add_control_dependencies": "tensorflow",
    "_foreach_add_": "torch",
    "_foreach_mul": "torch",
    "_get_iterator": "jax",
    "_in_multi_worker_mode": "tensorflow",
    "_jax_state": "jax",
    "_maybe_symbolic_build": "tensorflow",
    "keras.src.backend.jax.trainer.JAXEpochIterator": "jax",
}
# Asked for where there is one.
SINCE = {"_layout": "3.10"}


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
    known = {*OWNERS, *READ}
    # That one is an attribute of each optimizer, which a class cannot be seen to have.
    assert used | {"_model_variables_moving_average"} == known


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(OWNERS))
def test_an_object_has_it(name):
    _skip_elsewhere(name)
    if is_before(SINCE.get(name, "3.0")):
        pytest.skip("it is asked for where there is one")
    assert hasattr(OWNERS[name](), name)


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(READ))
def test_a_method_reads_it(name):
    _skip_elsewhere(name)
    cls, method = READ[name]
    assert name in inspect.getsource(getattr(getattr(trainer(), cls), method))


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(private_names.imports()))
def test_it_can_be_imported(name):
    _skip_elsewhere(name)
    found, rest = keras, name.split(".")[1:]
    while rest:
        part, *rest = rest
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)


@core_on("tensorflow")
@pytest.mark.parametrize(
    "name", sorted({*OWNERS, *READ, *private_names.attributes(keras_2=True)})
)
def test_the_design_has_it(name):
    assert f"`{name}`" in DESIGN.read_text()


def _skip_elsewhere(name):
    backend = OF_BACKEND.get(name, BACKEND)
    if backend != BACKEND:
        pytest.skip(f"it is used on {backend} only")
