"""The private names of Keras 2 that the package uses are listed, and exist."""

import pytest
from api import KERAS_2, keras

if not KERAS_2:
    pytest.skip("of Keras 2 only", allow_module_level=True)

import private_names
import tensorflow as tf

pytestmark = pytest.mark.core


def model():
    made = keras.Sequential([keras.layers.Dense(1, input_shape=(2,))])
    made.compile("adam", "mse")
    made.fit(tf.ones((2, 2)), tf.ones((2, 1)), verbose=0)
    return made


def layer():
    return keras.layers.BatchNormalization()


def optimizer():
    return model().optimizer


OWNERS = {
    "_assert_compile_was_called": model,
    "_build_index_dict": optimizer,
    "_create_all_weights": lambda: keras.optimizers.legacy.SGD(),
    "_delete_tracking": layer,
    "_flatten_layers": model,
    "_index_dict": optimizer,
    "_keras_history": lambda: model().inputs[0],
    "_keras_mask": lambda: keras.layers.Masking()(tf.ones((1, 1, 1))),
    "_name": layer,
    "_optimizer": lambda: keras.mixed_precision.LossScaleOptimizer(optimizer()),
    "_steps_per_execution": model,
    "_train_counter": model,
    "_validate_target_and_loss": model,
    "_var_key": optimizer,
    "_variables": optimizer,
}
# Names of models of `transformers`, and of this package's optimizer.
OTHERS = {"_trainable_variables", "_trainable_variables_indices", "_using_dummy_loss"}


def test_the_names_are_known():
    assert private_names.attributes(keras_2=True) - OTHERS == {*OWNERS}


@pytest.mark.parametrize("name", sorted(OWNERS))
def test_an_object_has_it(name):
    assert hasattr(OWNERS[name](), name)
