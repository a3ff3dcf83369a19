"""Training in pieces on JAX."""

from gradient_accumulator.backend.jax import optimizer as optimizer
from gradient_accumulator.backend.jax import replicas as replicas
from gradient_accumulator.backend.jax.gradients import (
    value_and_grad as value_and_grad,
)
from gradient_accumulator.backend.jax.train import (
    KERAS_DRAWS_TO_BUILD as KERAS_DRAWS_TO_BUILD,
)
from gradient_accumulator.backend.jax.train import call_once as call_once
from gradient_accumulator.backend.jax.train import draw_arrays as draw_arrays
from gradient_accumulator.backend.jax.train import epoch_ended as epoch_ended
from gradient_accumulator.backend.jax.train import fitting as fitting
from gradient_accumulator.backend.jax.train import (
    make_train_function as make_train_function,
)
