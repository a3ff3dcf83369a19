"""Arguments that do not exist: errors name the right ones."""

import inspect

import keras
import pytest
from helpers.functional import examples, model

from gradient_accumulator import (
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    accumulate,
    accumulated_value_and_grad,
)

pytestmark = pytest.mark.core


def functional(**arguments):
    made = model()
    return GradientAccumulateModel(inputs=made.input, outputs=made.output, **arguments)


MEANT = {
    "accumulate": (lambda **a: accumulate(model(), **a), "microbatch_size accum_steps"),
    "functional": (functional, "microbatch_size accum_steps"),
    "subclass": (GradientAccumulateModel, "microbatch_size accum_steps"),
    "optimizer": (
        lambda **a: GradientAccumulateOptimizer("sgd", **a),
        "accum_steps accum_steps",
    ),
    "function": (
        lambda **a: accumulated_value_and_grad(lambda *_: 0.0, **a),
        "microbatch_size microbatch_size",
    ),
}


@pytest.mark.parametrize("of", MEANT)
def test_other_names_of_the_sizes(of):
    call, meant = MEANT[of]
    size, steps = meant.split()
    for name, right in {
        "micro_batch_size": size,
        "mini_batch_size": size,
        "minibatch_size": size,
        "microbatch": size,
        "batch_size": size,
        "accumulation_steps": steps,
        "accumulate_grad_batches": steps,
        "gradient_accumulation_steps": steps,
        "accum_step": steps,
        "num_microbatches": steps,
        "num_micro_batches": steps,
        "micro_batches": steps,
    }.items():
        with pytest.raises(
            TypeError,
            match=rf"no argument `{name}`: use `{right}` .*Received: {name}=4$",
        ):
            call(**{name: 4})


def test_the_other_size():
    for call, given, right in (
        (MEANT["optimizer"][0], "microbatch_size", "accum_steps"),
        (MEANT["function"][0], "accum_steps", "microbatch_size"),
    ):
        with pytest.raises(TypeError, match=f"no argument `{given}`: use `{right}`"):
            call(**{given: 4})


def test_sizes_by_position():
    message = r"takes `model` by position.*`accum_steps` \(.*`microbatch_size` \(.*: 4 "
    with pytest.raises(TypeError, match=message):
        accumulate(model(), 4)
    message = r"takes `loss_fn` by position.*: `microbatch_size` \(.*Received: 4 "
    with pytest.raises(TypeError, match=message):
        accumulated_value_and_grad(lambda *_: 0.0, 4)
    with pytest.raises(TypeError, match=r"`experimental_distributed_support` by pos"):
        GradientAccumulateModel(1, False, False, 0.01, 1e-3, False, 8)
    with pytest.raises(TypeError, match=r"`name` by position.*Received: 'float32' "):
        GradientAccumulateOptimizer("sgd", 2, "MEAN", "name", "float32")


def test_an_argument_that_is_given_twice():
    """A user may give a model to the model's class, as if the class wrapped it."""
    message = r"takes `accum_steps` \(.* by position or by name\. Received: <Func"
    with pytest.raises(TypeError, match=message):
        GradientAccumulateModel(model(), accum_steps=4)
    with pytest.raises(TypeError, match=r"Received: 2 by position, accum_steps=4$"):
        GradientAccumulateOptimizer("sgd", 2, accum_steps=4)


def test_names_that_are_alike_or_not():
    with pytest.raises(TypeError, match="no argument `clipfactor`: use `clip_factor`"):
        accumulate(model(), accum_steps=2, clipfactor=0.1)
    with pytest.raises(TypeError, match="no argument `zzz`: it has `optimizer`, `acc"):
        GradientAccumulateOptimizer("sgd", 2, zzz=1)
    with pytest.raises(TypeError, match="no argument `dtype`: use `accum_dtype`"):
        accumulate(model(), accum_steps=2, dtype="float64")
    # Keras itself checks its own arguments.
    assert GradientAccumulateModel(accum_steps=2, dtype="float64").dtype == "float64"


def test_arguments_that_fit_does_not_have():
    """The error is Keras's own."""
    made = accumulate(model(), microbatch_size=2)
    with pytest.raises(TypeError, match=r"fit\(\) got an unexpected .*'batchsize'"):
        made.fit(examples(), batchsize=2)


def test_signatures_are_as_they_are_written():
    for function, first in (
        (accumulate, "model"),
        (accumulated_value_and_grad, "loss_fn"),
        (GradientAccumulateOptimizer, "optimizer"),
        (GradientAccumulateModel, "accum_steps"),
    ):
        assert next(iter(inspect.signature(function).parameters)) == first
        assert inspect.getdoc(function)
    spec = inspect.getfullargspec(GradientAccumulateModel.__init__)
    assert spec.args[:2] == ["self", "accum_steps"] and spec.varkw == "kwargs"


@pytest.mark.parametrize(
    "name, advice",
    [
        ("clipnorm", r"Adam\(clipnorm=...\)"),
        ("clipvalue", r"Adam\(clipvalue=...\)"),
        ("learning_rate", r"Adam\(learning_rate=...\)"),
        ("lr", "`learning_rate`"),
        ("decay", "schedule"),
        ("step", "`iterations`"),
        ("gradients", "`pending`"),
    ],
)
def test_what_version_0_5_took(name, advice):
    """The errors name the new arguments, as docs/migration.md promises."""
    with pytest.raises(TypeError, match=f"`{name}`: .*{advice}.*Received: {name}=0.5$"):
        GradientAccumulateOptimizer("sgd", 2, **{name: 0.5})
    if name in ("step", "gradients"):
        with pytest.raises(AttributeError, match=advice):
            getattr(GradientAccumulateOptimizer("sgd", 2), name)


class OwnStep(keras.Model):
    def train_step(self, *args):
        raise NotImplementedError


def test_a_train_step_of_ones_own_names_both_ways():
    with pytest.raises(
        ValueError,
        match=r"accumulated_value_and_grad.*GradientAccumulateOptimizer.*Received: ",
    ):
        accumulate(OwnStep(), accum_steps=2)
