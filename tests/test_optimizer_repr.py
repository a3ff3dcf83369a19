"""The `repr` of a `GradientAccumulateOptimizer`."""

import keras
import pytest
from helpers.functional import VALUE, variable

from gradient_accumulator import GradientAccumulateOptimizer

pytestmark = pytest.mark.core


def test_repr_of_an_optimizer():
    optimizer = GradientAccumulateOptimizer(keras.optimizers.Adam(VALUE), 4)
    expected = "<GradientAccumulateOptimizer optimizer=Adam, accum_steps=4>"
    assert repr(optimizer) == expected
    optimizer.build([variable()])
    assert repr(optimizer) == str(optimizer) == expected
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    assert repr(GradientAccumulateOptimizer(scaled, 2, "SUM")) == (
        "<GradientAccumulateOptimizer optimizer=LossScaleOptimizer(SGD), "
        "accum_steps=2, reduction=SUM>"
    )


def test_repr_while_it_is_made():
    made = GradientAccumulateOptimizer.__new__(GradientAccumulateOptimizer)
    assert repr(made) == "<GradientAccumulateOptimizer>"
