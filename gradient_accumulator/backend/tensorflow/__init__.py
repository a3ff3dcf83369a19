"""Training in micro-batches on TensorFlow."""

from gradient_accumulator.backend.tensorflow import optimizer as optimizer
from gradient_accumulator.backend.tensorflow import replicas as replicas
from gradient_accumulator.backend.tensorflow.gradients import (
    value_and_grad as value_and_grad,
)
from gradient_accumulator.backend.tensorflow.train import after_fit as after_fit
from gradient_accumulator.backend.tensorflow.train import batches as batches
from gradient_accumulator.backend.tensorflow.train import before_epoch as before_epoch
from gradient_accumulator.backend.tensorflow.train import call_once as call_once
from gradient_accumulator.backend.tensorflow.train import epoch_ended as epoch_ended
from gradient_accumulator.backend.tensorflow.train import (
    make_train_function as make_train_function,
)
from gradient_accumulator.backend.tensorflow.train import (
    metrics_result as metrics_result,
)
