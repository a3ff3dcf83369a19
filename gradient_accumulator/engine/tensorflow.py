"""Training in micro-batches on TensorFlow."""

from gradient_accumulator.engine import tensorflow_accumulators
from gradient_accumulator.engine.tensorflow_fit import after_fit as after_fit
from gradient_accumulator.engine.tensorflow_fit import batches as batches
from gradient_accumulator.engine.tensorflow_fit import before_epoch as before_epoch
from gradient_accumulator.engine.tensorflow_fit import epoch_ended as epoch_ended
from gradient_accumulator.engine.tensorflow_fit import (
    make_train_function as make_train_function,
)
from gradient_accumulator.engine.tensorflow_fit import (
    metrics_result as metrics_result,
)
from gradient_accumulator.engine.tensorflow_functional import (
    value_and_grad as value_and_grad,
)

optimizer = tensorflow_accumulators
