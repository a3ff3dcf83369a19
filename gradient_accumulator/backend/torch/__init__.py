"""Training in micro-batches on PyTorch."""

from gradient_accumulator.backend.torch import optimizer as optimizer
from gradient_accumulator.backend.torch import replicas as replicas
from gradient_accumulator.backend.torch.gradients import (
    value_and_grad as value_and_grad,
)
from gradient_accumulator.backend.torch.train import after_fit as after_fit
from gradient_accumulator.backend.torch.train import batches as batches
from gradient_accumulator.backend.torch.train import before_epoch as before_epoch
from gradient_accumulator.backend.torch.train import call_once as call_once
from gradient_accumulator.backend.torch.train import epoch_ended as epoch_ended
from gradient_accumulator.backend.torch.train import (
    make_train_function as make_train_function,
)
from gradient_accumulator.backend.torch.train import metrics_result as metrics_result
