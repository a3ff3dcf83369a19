"""What a new user meets first: errors that say the cause, and the documented loops."""

import importlib.util
import inspect
import re
import typing
from pathlib import Path

import keras
import numpy as np
import problems
import pytest
from helpers import BACKEND, array
from keras import layers, ops

import gradient_accumulator
from gradient_accumulator import (
    AccumBatchNormalization,
    FlushGradients,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    accumulate,
    accumulated_value_and_grad,
    adaptive_clip_grad,
)
from gradient_accumulator.gradients import ValueAndGrad, ValueAuxAndGrad
from gradient_accumulator.received import described

pytestmark = pytest.mark.core
ROOT = Path(__file__).parents[1]
VALUE = 0.123456  # of all tensors here, that no error may print


def variable(shape=(3, 2), value=VALUE):
    return keras.Variable(np.full(shape, value, "float32"), name="kernel")


def value_and_grad(loss, weight=None, **arguments):
    """The function for one variable; `loss(value of it, microbatch)`."""
    weight = variable() if weight is None else weight
    if BACKEND == "jax":
        given = [weight.value]

        def loss_fn(values, microbatch):
            return loss(values[0], microbatch)

    else:
        given = [weight]

        def loss_fn(microbatch):
            return loss(weight.value, microbatch)

    function = accumulated_value_and_grad(loss_fn, microbatch_size=2, **arguments)
    return lambda batch: function(given, batch)


def mean(weight, microbatch):
    return ops.mean(ops.matmul(microbatch, weight))


def examples(count=4):
    return ops.convert_to_tensor(np.full((count, 3), VALUE, "float32"))


# --------------------------------------------------- tensors of another framework


def torch_parameters():
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, VALUE)
    return module.parameters()


def tensorflow_variables():
    tf = pytest.importorskip("tensorflow")
    return (tf.Variable(np.full(shape, VALUE, "float32")) for shape in [(2, 3), (2,)])


def jax_arrays():
    jnp = pytest.importorskip("jax.numpy")
    return (jnp.full(shape, VALUE) for shape in [(2, 3), (2,)])


OTHERS = {
    "torch": (torch_parameters, "parameters of PyTorch's"),
    "tensorflow": (tensorflow_variables, "variables of TensorFlow's"),
    "jax": (jax_arrays, "tensors of JAX's"),
}
CALLS = {
    "accumulated_value_and_grad": lambda given: accumulated_value_and_grad(
        lambda *_: 0.0, microbatch_size=2
    )(given(), examples()),
    "apply": lambda given: GradientAccumulateOptimizer("sgd", 2).apply(
        [ops.ones((2, 3)), ops.ones((2,))], given()
    ),
    "build": lambda given: GradientAccumulateOptimizer("sgd", 2).build(given()),
    "adaptive_clip_grad": lambda given: adaptive_clip_grad(given(), given()),
}


@pytest.mark.parametrize("of", [name for name in OTHERS if name != BACKEND])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [iter, list])
def test_tensors_of_another_framework(call, of, kind):
    make, what = OTHERS[of]
    with pytest.raises(TypeError, match=what) as caught:
        CALLS[call](lambda: kind(list(make())))
    message = str(caught.value)
    assert f"KERAS_BACKEND={of} before Keras is imported" in message
    assert "shape (2, 3)" in message
    sentence, received = message.split(" Received: ")
    assert sentence.count(". ") == 0
    assert "0.12" not in received and "\n" not in message


def test_gradients_of_another_framework():
    of = next(name for name in OTHERS if name != BACKEND)
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    with pytest.raises(TypeError, match=rf"`grads`.*KERAS_BACKEND={of}.*Received: "):
        optimizer.apply(list(OTHERS[of][0]()), [variable((2, 3)), variable((2,))])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="whose variables Keras takes")
@pytest.mark.parametrize("call", ["apply", "build"])
def test_an_optimizer_of_kerass_updates_its_variables_only(call):
    """Plain Keras fails then with "no attribute 'value'", and only in an update."""
    with pytest.raises(TypeError, match=r"accumulated_value_and_grad.*Received: ") as e:
        CALLS[call](OTHERS[BACKEND][0])
    assert "0.12" not in str(e.value)


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere variables are what it takes")
@pytest.mark.parametrize("given", [lambda: [variable()], lambda: model()])
def test_variables_on_jax(given):
    with pytest.raises(TypeError, match=r"\[v.value for v in .*Received: ") as caught:
        accumulated_value_and_grad(lambda *_: 0.0, microbatch_size=2)(
            given(), examples()
        )
    assert "0.12" not in str(caught.value)


@pytest.mark.skipif(BACKEND == "torch", reason="whose own it is")
def test_a_module_of_pytorchs_is_no_list_of_variables():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"(holds objects|a list of var).*Linear"):
        accumulated_value_and_grad(lambda *_: 0.0, microbatch_size=2)(
            torch.nn.Linear(3, 2), examples()
        )


def test_a_module_of_pytorchs_is_no_model():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"accumulated_value_and_grad.*Received: model"):
        accumulate(torch.nn.Linear(3, 2), microbatch_size=2)


# ------------------------------------------------------------ generators of variables


def test_the_function_takes_a_generator():
    weight = variable()
    given = weight.value if BACKEND == "jax" else weight
    loss = (
        (lambda values, microbatch: mean(values[0], microbatch))
        if BACKEND == "jax"
        else lambda microbatch: mean(weight.value, microbatch)
    )
    function = accumulated_value_and_grad(loss, microbatch_size=2)
    expected = function([given], examples())
    for variables in ({"kernel": given}.values(), (v for v in [given]), (given,)):
        value, (gradient,) = function(variables, examples())
        np.testing.assert_array_equal(array(value), array(expected[0]))
        np.testing.assert_array_equal(array(gradient), array(expected[1][0]))


def test_a_generator_that_is_used_up():
    """It would train nothing, and say nothing."""
    given = (v for v in ())
    with pytest.raises(
        ValueError, match=r"gives what it has once.*Received: variables"
    ):
        accumulated_value_and_grad(lambda *_: 0.0, microbatch_size=2)(given, examples())


@pytest.mark.skipif(BACKEND == "jax", reason="where any nested arrays are taken")
@pytest.mark.parametrize("given", ["one", "dict", "module", "names"])
def test_variables_that_are_no_list(given):
    given = {
        "one": variable(),
        "dict": {"kernel": variable()},
        "module": layers.Dense(3),
        "names": ["kernel"],
    }[given]
    with pytest.raises(TypeError, match=r"a list of variables.*Received: ") as caught:
        accumulated_value_and_grad(lambda *_: 0.0, microbatch_size=2)(given, examples())
    assert "0.12" not in str(caught.value)


def test_optimizer_and_clipping_take_generators():
    trained, listed = variable(), variable()
    gradient = ops.ones((3, 2))
    optimizer, other = (
        GradientAccumulateOptimizer(
            keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=None), 1
        )
        for _ in range(2)
    )
    optimizer.build(v for v in [trained])
    other.build([listed])
    optimizer.apply((g for g in [gradient]), (v for v in [trained]))
    other.apply([gradient], [listed])
    if BACKEND == "jax":
        for each, v, kind in (optimizer, trained, iter), (other, listed, list):
            state = [x.value for x in each.variables]
            (new,), state = each.stateless_apply(
                kind(state), kind([gradient]), kind([v.value])
            )
            (new,), _ = each.stateless_flush(kind(state), kind([new]))
            v.assign(new)
    optimizer.finalize_variable_values(v for v in [trained])
    other.finalize_variable_values([listed])
    np.testing.assert_array_equal(array(trained), array(listed))
    assert np.all(array(trained) < VALUE)
    clipped = adaptive_clip_grad(
        (v for v in [trained]), (g for g in [gradient]), clip_factor=0.01
    )
    expected = adaptive_clip_grad([listed], [gradient], clip_factor=0.01)
    np.testing.assert_array_equal(array(clipped[0]), array(expected[0]))


# -------------------------------------------------------- no error prints a tensor


def tensor():
    return ops.convert_to_tensor(np.full((3, 2), VALUE, "float32"))


def model():
    return problems.mlp()()


PRINTED = {
    "microbatch_size": lambda: accumulate(model(), microbatch_size=tensor()),
    "both_sizes": lambda: accumulate(
        model(), accum_steps=tensor(), microbatch_size=tensor()
    ),
    "accum_dtype": lambda: accumulate(model(), accum_steps=2, accum_dtype=tensor()),
    "model": lambda: accumulate(tensor(), accum_steps=2),
    "model_of_variables": lambda: accumulate([variable()], accum_steps=2),
    "clip_factor": lambda: adaptive_clip_grad([], [], clip_factor=tensor()),
    "agc_exclude": lambda: adaptive_clip_grad(
        [variable()], [tensor()], agc_exclude=[tensor()]
    ),
    "loss_fn": lambda: accumulated_value_and_grad(tensor(), microbatch_size=2),
    "optimizer": lambda: GradientAccumulateOptimizer(tensor()),
    "optimizers": lambda: GradientAccumulateOptimizer([variable()]),
    "reduction": lambda: GradientAccumulateOptimizer("sgd", reduction=tensor()),
    "weight": lambda: GradientAccumulateOptimizer("sgd", 2).apply(
        [tensor()], [variable()], weight=tensor()
    ),
    "unknown": lambda: GradientAccumulateOptimizer("sgd", clipnorm=tensor()),
    "by_position": lambda: accumulate(model(), tensor()),
    "functional": lambda: GradientAccumulateModel(
        inputs=tensor(), outputs=tensor(), other=tensor()
    ),
    "momentum": lambda: AccumBatchNormalization(momentum=tensor()),
    "flush": lambda: FlushGradients([variable()]),
    "loss_of_examples": lambda: value_and_grad(lambda w, x: ops.matmul(x, w))(
        examples()
    ),
    "loss_in_a_list": lambda: value_and_grad(lambda w, x: [mean(w, x)])(examples()),
    "no_aux": lambda: value_and_grad(mean, has_aux=True)(examples()),
    "batch": lambda: value_and_grad(mean)({"x": examples(), "n": ops.mean(examples())}),
}


@pytest.mark.parametrize("what", PRINTED)
def test_no_error_prints_the_values_of_a_tensor(what):
    with pytest.raises((TypeError, ValueError), match="Received: ") as caught:
        PRINTED[what]()
    message = str(caught.value)
    assert not re.search(r"0\.12\d|\d\.\d{4}", message), message
    assert "\n" not in message


def test_what_is_received():
    assert described([1, "a", None, 4.5]) == "[1, 'a', None, ... (4 in all)]"
    assert described({"a": (True,)}) == "{'a': (True)}"
    assert described("x" * 500) == repr("x" * 500)[:117] + "..."
    assert described(np.zeros((2, 3))) == "<ndarray of shape (2, 3), float64>"
    assert described(variable()).endswith("'kernel' of shape (3, 2), float32>")

    class Own:
        def __repr__(self):
            return f"{VALUE}"

    assert described(Own()).endswith(".Own>")
    if BACKEND == "tensorflow":
        import tensorflow as tf

        seen = []
        specs = [tf.TensorSpec(None, "float32")]
        tf.function(lambda x: seen.append(described(x)), specs).get_concrete_function()
        assert "of shape unknown, float32" in seen[0]


# ----------------------------------------------------------- the function: its losses


def ignored_means(weight, microbatch):
    """A mean over the examples that are not 0."""
    kept = ops.cast(microbatch[:, 0] != 0, "float32")
    return ops.sum(ops.matmul(microbatch, weight)[:, 0] * kept) / ops.sum(kept)


def ignored_pairs(weight, microbatch):
    kept = ops.cast(microbatch[:, 0] != 0, "float32")
    return ops.sum(ops.matmul(microbatch, weight)[:, 0] * kept), ops.sum(kept)


def test_the_mean_over_nothing_warns_and_names_the_pair():
    batch = np.full((6, 3), 0.5, "float32")
    batch[2:4] = 0  # the second micro-batch
    batch = ops.convert_to_tensor(batch)
    with pytest.warns(UserWarning, match="return a pair") as caught:
        value, _ = value_and_grad(ignored_means)(batch)
    assert [Path(each.filename).name for each in caught] == [Path(__file__).name]
    assert np.isnan(array(value))
    # Warnings are errors here: a pair says nothing, and is right.
    value, (gradient,) = value_and_grad(ignored_pairs)(batch)
    np.testing.assert_allclose(array(value), 3 * 0.5 * VALUE, rtol=1e-5)
    assert np.all(np.isfinite(array(gradient)))
    # Nor does one that is not a number by other causes name what it is already.
    value, _ = value_and_grad(lambda w, x: (mean(w, x) * np.nan, ops.sum(x)))(batch)
    assert np.isnan(array(value))


def test_the_mean_over_nothing_in_a_later_update_warns():
    function = value_and_grad(ignored_means)
    batch = np.full((4, 3), 0.5, "float32")
    for _ in range(3):
        function(ops.convert_to_tensor(batch))
    batch[:2] = 0
    with pytest.warns(UserWarning, match="return a pair"):
        for _ in range(3):  # JAX says it when it knows
            value, _ = function(ops.convert_to_tensor(batch))
            array(value)


@pytest.mark.skipif(BACKEND == "torch", reason="which compiles nothing here")
def test_compiled_functions_do_not_look():
    """As the docstring says: values are not known there."""
    batch = ops.zeros((4, 3))
    if BACKEND == "jax":
        import jax

        function = jax.jit(
            accumulated_value_and_grad(
                lambda values, microbatch: ignored_means(values[0], microbatch),
                microbatch_size=2,
            )
        )
        value, _ = function([variable().value], batch)
    else:
        import tensorflow as tf

        value, _ = tf.function(value_and_grad(ignored_means))(batch)
    assert np.isnan(array(value))


@pytest.mark.skipif(BACKEND != "jax", reason="who donates arrays")
def test_a_loss_that_was_donated():
    function = value_and_grad(mean)
    for _ in range(3):
        value, _ = function(examples())
        value.delete()
    function(examples())


class Named(typing.NamedTuple):
    x: typing.Any
    name: typing.Any


@pytest.mark.parametrize(
    "more, place, error",
    [
        ("abc", r"batch['more']='abc' (of type str)", TypeError),
        (4, r"batch['more']=4 (of type int)", TypeError),
        (["a", "b"], r"batch['more'][0]='a' (of type str)", TypeError),
        ({"deep": (None, 2.5)}, r"batch['more']['deep'][1]=2.5", TypeError),
        (np.float32(3), r"batch['more']=<float32 of shape (), float32>", ValueError),
    ],
)
def test_what_is_no_array_in_a_batch_is_named(more, place, error):
    with pytest.raises(error, match=re.escape(f"Received: {place}")) as caught:
        value_and_grad(mean)({"x": examples(), "more": more})
    assert "further argument" in str(caught.value)


def test_a_batch_that_is_no_array():
    with pytest.raises(TypeError, match=re.escape("Received: batch=4 ")):
        value_and_grad(mean)(4)
    with pytest.raises(TypeError, match=re.escape("Received: batch[1]='a' ")):
        value_and_grad(mean)(Named(examples(), "a"))


@pytest.mark.parametrize(
    "more",
    [
        lambda loss, x: {"loss": loss},
        lambda loss, x: (loss, x),
        lambda loss, x: (loss, {"x": x}),
        lambda loss, x: (loss, 1.0, x),
        lambda loss, x: [loss, x],
    ],
)
def test_more_than_a_loss_names_has_aux(more):
    with pytest.raises(ValueError, match=r"`has_aux=True`.*Received: "):
        value_and_grad(lambda w, x: more(mean(w, x), x))(examples())


@pytest.mark.parametrize("returned", [None, "loss", lambda: 0])
def test_a_loss_that_is_none(returned):
    with pytest.raises(ValueError, match=r"must return a scalar.*Received: ") as caught:
        value_and_grad(lambda w, x: returned)(examples())
    assert "has_aux" not in str(caught.value)


@pytest.mark.skipif(BACKEND != "torch", reason="others convert what they are given")
def test_a_loss_of_arrays_that_are_not_pytorchs():
    function = accumulated_value_and_grad(
        lambda microbatch: microbatch.mean(), microbatch_size=2
    )
    with pytest.raises(TypeError, match=r"tensor of PyTorch's.*Received: <float32"):
        function([variable()], np.ones((4, 3), "float32"))


def test_types_say_what_is_returned():
    returned = typing.get_type_hints(accumulated_value_and_grad)["return"]
    assert set(typing.get_args(returned)) == {ValueAndGrad, ValueAuxAndGrad}
    hints = typing.get_type_hints(ValueAndGrad.__call__)
    assert hints["return"] == tuple[typing.Any, typing.Any]
    hints = typing.get_type_hints(ValueAuxAndGrad.__call__)
    inner = tuple[typing.Any, typing.Any]
    assert hints["return"] == tuple[inner, typing.Any]
    function = accumulated_value_and_grad(lambda *_: 0.0, microbatch_size=2)
    names = [*inspect.signature(function).parameters]
    assert ["self", *names] == [*inspect.signature(ValueAndGrad.__call__).parameters]


# ------------------------------------------------------------ arguments that are none


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
    """As by who takes the model's class for a wrapper of a model."""
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
    # Of Keras's own arguments Keras decides.
    assert GradientAccumulateModel(accum_steps=2, dtype="float64").dtype == "float64"


def test_arguments_that_fit_does_not_have():
    """As Keras says it."""
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
    """As docs/migration.md promises."""
    with pytest.raises(TypeError, match=f"`{name}`: .*{advice}.*Received: {name}=0.5$"):
        GradientAccumulateOptimizer("sgd", 2, **{name: 0.5})
    if name in ("step", "gradients"):
        with pytest.raises(AttributeError, match=advice):
            getattr(GradientAccumulateOptimizer("sgd", 2), name)


# -------------------------------------------------------------------- what it is


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


def test_public_names_and_version():
    assert {*dir(gradient_accumulator)} == {
        *gradient_accumulator.__all__,
        "__version__",
    }
    for name in gradient_accumulator.__all__:
        assert getattr(gradient_accumulator, name) is not None
    assert re.match(r"\d+[.+]\w+", gradient_accumulator.__version__)
    with pytest.raises(AttributeError, match="no attribute 'sys'"):
        gradient_accumulator.sys  # noqa: B018


def test_a_version_that_is_not_installed(monkeypatch):
    from importlib import metadata

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert gradient_accumulator.__version__ == "0+not.installed"


class OwnStep(keras.Model):
    def train_step(self, *args):
        raise NotImplementedError


def test_a_train_step_of_ones_own_names_both_ways():
    with pytest.raises(
        ValueError,
        match=r"accumulated_value_and_grad.*GradientAccumulateOptimizer.*Received: ",
    ):
        accumulate(OwnStep(), accum_steps=2)


# ----------------------------------------------------------------- documented loops


def code_of_readme(containing):
    text = (ROOT / "README.md").read_text()
    (code,) = [
        code
        for code in re.findall(
            r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
        )
        if containing in code
    ]
    return code


@pytest.mark.skipif(BACKEND != "torch", reason="a loop of PyTorch's")
def test_the_pytorch_loop_of_the_readme():
    import torch

    code = code_of_readme("optimizer.step()")
    plain, count = re.subn(
        r"    loss, gradients = .*?\n    optimizer.step",
        "    loss_fn(batch).backward()\n    optimizer.step",
        code,
        flags=re.DOTALL,
    )
    assert count == 1

    def trained(code):
        torch.manual_seed(0)
        names = {}
        exec(code, names)
        assert all(p.grad is None for p in names["module"].parameters())
        return [p.detach().numpy() for p in names["module"].parameters()]

    begun = plain.replace("optimizer.step()", "pass")
    for ours, reference, before in zip(*map(trained, (code, plain, begun))):
        moved = np.abs(reference - before).max()
        assert moved > 1e-3
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * moved)


def example_gan():
    spec = importlib.util.spec_from_file_location("gan", ROOT / "examples/gan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained_gan(wrap, size, flush=lambda *optimizers: []):
    example = example_gan()
    r = np.random.default_rng(0)
    real, noise = problems.normal(r, 20, 2), problems.normal(r, 20, 4)
    keras.utils.set_random_seed(1)
    g_optimizer, d_optimizer = (
        wrap(keras.optimizers.Adam(0.05, epsilon=1e-2, global_clipnorm=0.3))
        for _ in range(2)
    )
    gan = example.GAN(*example.networks(), g_optimizer, d_optimizer)
    gan.compile()
    before = [array(v) for v in gan.trainable_variables]
    gan.fit(
        (real, noise),
        batch_size=size,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=flush(g_optimizer, d_optimizer),
    )
    optimizers = g_optimizer, d_optimizer
    return before, [array(v) for v in gan.trainable_variables], optimizers


def test_the_gan_of_the_examples():
    """Batches of 8, 8 and 4; two optimizers that the model holds."""
    before, reference, plain = trained_gan(lambda optimizer: optimizer, 8)
    _, ours, optimizers = trained_gan(
        lambda optimizer: GradientAccumulateOptimizer(optimizer, 4),
        2,
        lambda *optimizers: [FlushGradients(*optimizers)],
    )
    for a, b, start in zip(ours, reference, before, strict=True):
        moved = np.abs(b - start).max()
        assert moved > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * moved + 1e-7)
    for optimizer, other in zip(optimizers, plain):
        assert optimizer.pending == 0
        assert int(array(optimizer.iterations)) == int(array(other.iterations)) == 6


def test_without_flushing_the_gan_waits():
    _, _, optimizers = trained_gan(
        lambda optimizer: GradientAccumulateOptimizer(optimizer, 4), 2
    )
    assert [int(array(o.iterations)) for o in optimizers] == [5, 5]


def test_flush_gradients_of_a_gan_without_being_told():
    with pytest.raises(
        ValueError, match=r"FlushGradients\(g_optimizer, d_optimizer\).*Received: opt"
    ):
        trained_gan(
            lambda optimizer: GradientAccumulateOptimizer(optimizer, 4),
            2,
            lambda *_: [FlushGradients()],
        )


def test_flush_gradients_takes_one_around():
    inner = GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 4)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    made = problems.mlp()()
    made.compile(outer, "mse")
    x = np.ones((6, problems.FEATURES), "float32")
    flush = FlushGradients(outer)
    made.fit(x, x[:, :3], batch_size=2, verbose=0, callbacks=[flush])
    assert inner.pending == 0 and int(array(inner.iterations)) == 1
    # As with none, of the one that it is compiled with.
    made.fit(x, x[:, :3], batch_size=2, verbose=0, callbacks=[FlushGradients()])
    assert inner.pending == 0 and int(array(inner.iterations)) == 2


@pytest.mark.parametrize(
    "given, error",
    [
        (lambda: keras.optimizers.SGD(0.1), ValueError),
        (lambda: "sgd", TypeError),
        (lambda: None, TypeError),
        (lambda: [GradientAccumulateOptimizer("sgd", 2)], TypeError),
    ],
)
def test_flush_gradients_of_what_does_not_accumulate(given, error):
    with pytest.raises(error, match=r"takes optimizers.*Received: "):
        FlushGradients(GradientAccumulateOptimizer("sgd", 2), given())
