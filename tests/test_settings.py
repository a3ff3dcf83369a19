"""`model.accumulation`: how a model accumulates."""

import keras
import pytest
from helpers import compiled, core_on, data, fit
from keras import layers

from gradient_accumulator import GradientAccumulateModel, accumulate

pytestmark = core_on("torch")


def test_the_attribute_of_a_model_that_accumulates():
    model = accumulate(compiled(), microbatch_size=8)
    assert (model.accumulation.mode, model.accumulation.size) == ("microbatch_size", 8)
    assert model.accumulation.accum_dtype == "float32"
    assert model.accumulation.clipping is None
    assert repr(model.accumulation) == (
        "Accumulation(microbatch_size=8, accum_dtype='float32', clipping=None)"
    )
    accumulate(model, accum_steps=4, accum_dtype="bfloat16", use_agc=True)
    assert (model.accumulation.mode, model.accumulation.size) == ("accum_steps", 4)
    assert model.accumulation.clipping.clip_factor == 0.01
    assert repr(model.accumulation) == (
        "Accumulation(accum_steps=4, accum_dtype='bfloat16', "
        "clipping=AdaptiveClipping(clip_factor=0.01, eps=0.001, agc_exclude=()))"
    )
    accumulate(model, accum_steps=1)
    assert not hasattr(model, "accumulation")


class WithCall(GradientAccumulateModel):
    def call(self, x):
        return x


def test_the_attribute_of_a_gradient_accumulate_model():
    plain = compiled()
    for made in (
        GradientAccumulateModel(2, inputs=plain.input, outputs=plain.output),
        WithCall(accum_steps=2),
    ):
        assert made.accumulation.accum_steps == 2
        accumulate(made, accum_steps=1)
        assert made.accumulation is None
        accumulate(made, microbatch_size=3)
        assert made.accumulation.size == 3


@pytest.mark.core
def test_an_attribute_of_ones_own_stays():
    class WithLayer(keras.Model):
        def __init__(self):
            super().__init__()
            self.accumulation = layers.Dense(3)

        def call(self, x):
            return self.accumulation(x)

    model = WithLayer()
    model.compile("sgd", "mse")
    accumulate(model, accum_steps=2)
    fit(model, *data(), batch_size=4)
    assert int(model.optimizer.iterations) == 3
    accumulate(model, accum_steps=1)
    assert isinstance(model.accumulation, layers.Dense)
