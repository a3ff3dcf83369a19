"""Training in micro-batches on JAX."""

from gradient_accumulator.engine import jax_accumulators
from gradient_accumulator.engine.jax_fit import after_fit as after_fit
from gradient_accumulator.engine.jax_fit import batches as batches
from gradient_accumulator.engine.jax_fit import before_epoch as before_epoch
from gradient_accumulator.engine.jax_fit import epoch_ended as epoch_ended
from gradient_accumulator.engine.jax_fit import (
    make_train_function as make_train_function,
)
from gradient_accumulator.engine.jax_fit import metrics_result as metrics_result
from gradient_accumulator.engine.jax_functional import (
    value_and_grad as value_and_grad,
)

optimizer = jax_accumulators
