"""Gradient accumulation for any Keras training, exact to the big batch.

`accumulate` makes a model that exists train in pieces, and
`GradientAccumulateModel` is a `keras.Model` that does.
"""

from gradient_accumulator.model import GradientAccumulateModel, accumulate

__all__ = ["GradientAccumulateModel", "accumulate"]
