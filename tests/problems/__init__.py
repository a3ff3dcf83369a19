"""The list of models, losses and data that every exactness test is parametrized over.

A problem is what a user would write: a model, what it is compiled with, and
batches, each of which one weight update is computed from. Nothing here knows about
accumulation; `benchmarks/` makes its table of what is exact from the same list.

Sizes are chosen so that every problem has a last micro-batch that is smaller (12
examples in micro-batches of 5) and a last update with fewer micro-batches (7 examples).
Learning rates are high, so that what is compared is far above float32's rounding."""

# Importing a topic adds its problems to the list.
from . import layers, lengths, masks, optimizers
from .additional_losses import MeanOverExamples
from .data import (
    CLASSES,
    FEATURES,
    STEPS,
    TOKENS,
    each_size,
    normal,
    random,
    tokens,
    uneven,
)
from .losses import CLASS_WEIGHT, LossByCall
from .models import (
    Written,
    classifier,
    dense_steps,
    mlp,
    of_tokens,
    seeded,
    tagger,
    written,
)
from .outputs import tagger_and_classifier, two_losses
from .problem import MICROBATCH, PROBLEMS, WAYS_OF_FIT, Problem, cut, here
from .reductions import REDUCTIONS, TO_A_NUMBER
from .subclasses import nested_batches, of_named_inputs
from .variables import CountsExamples, shared_layer

__all__ = [
    "CLASSES",
    "CLASS_WEIGHT",
    "FEATURES",
    "MICROBATCH",
    "PROBLEMS",
    "REDUCTIONS",
    "STEPS",
    "TOKENS",
    "TO_A_NUMBER",
    "WAYS_OF_FIT",
    "CountsExamples",
    "LossByCall",
    "MeanOverExamples",
    "Problem",
    "Written",
    "classifier",
    "cut",
    "dense_steps",
    "each_size",
    "here",
    "layers",
    "lengths",
    "masks",
    "mlp",
    "nested_batches",
    "normal",
    "of_named_inputs",
    "of_tokens",
    "optimizers",
    "random",
    "seeded",
    "shared_layer",
    "tagger",
    "tagger_and_classifier",
    "tokens",
    "two_losses",
    "uneven",
    "written",
]
