"""Training in micro-batches on JAX."""

from gradient_accumulator.backend.jax import optimizer as optimizer
from gradient_accumulator.backend.jax import replicas as replicas
from gradient_accumulator.backend.jax.gradients import (
    value_and_grad as value_and_grad,
)
from gradient_accumulator.backend.jax.train import after_fit as after_fit
from gradient_accumulator.backend.jax.train import batches as batches
from gradient_accumulator.backend.jax.train import before_epoch as before_epoch
from gradient_accumulator.backend.jax.train import call_once as call_once
from gradient_accumulator.backend.jax.train import epoch_ended as epoch_ended
from gradient_accumulator.backend.jax.train import (
    make_train_function as make_train_function,
)
from gradient_accumulator.backend.jax.train import metrics_result as metrics_result
