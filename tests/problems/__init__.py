"""The list of models, losses and data that every test of exactness uses.

A problem is a user's code: a model, the arguments of `compile`, and batches, from each
of which one weight update is computed. Nothing here knows about accumulation.
`benchmarks/` makes its table of exactness from this list too.

Every problem has a last micro-batch that is smaller (12 examples in micro-batches of 5)
and a last update with fewer micro-batches (7 examples). Learning rates are high, so
that the weights move much further than float32 rounds."""

# The import of a topic adds its problems to the list.
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
