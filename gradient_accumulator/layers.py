"""`AccumBatchNormalization`: batch normalization that knows what an update is."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradient_accumulator import devices
from gradient_accumulator.compat import trainer
from gradient_accumulator.compat.api import KERAS_2, keras, ops
from gradient_accumulator.received import described
from gradient_accumulator.settings import positive_int


@keras.saving.register_keras_serializable("gradient_accumulator")
class AccumBatchNormalization(trainer.Normalization):
    """Batch normalization whose moving statistics move once an update.

    In training, each micro-batch is normalized by its own mean and variance ("ghost"
    batch normalization, Hoffer, Hubara and Soudry 2017, "Train longer, generalize
    better", arXiv:1705.08741). The moving statistics, which inference uses, take the
    mean and variance of all examples of the update, pooled from its micro-batches:

        mean     = sum_k n_k mean_k / sum_k n_k
        variance = sum_k n_k (variance_k + (mean_k - mean)^2) / sum_k n_k
        moving   = momentum * moving + (1 - momentum) * pooled

    with n_k the number of (unmasked) values of micro-batch k: the law of total
    variance, computed micro-batch by micro-batch as Chan, Golub and LeVeque 1979 do
    ("Updating formulae and a pairwise algorithm for computing sample variances"), in
    float32 or float64. Weights do not change within an update, so for the first
    normalization of a network these are the numbers that
    `keras.layers.BatchNormalization` has after the same update on the batch.

    In a model that trains in micro-batches (`accumulate`, `GradientAccumulateModel`)
    the train step says where an update ends, and the layer ignores `accum_steps`. An
    update that fails, or that a `LossScaleOptimizer` skips, leaves the statistics as
    they were.

    With `GradientAccumulateOptimizer`, or in a loop of your own, the layer counts its
    calls in training: `accum_steps` of them are an update. `finish_update` ends an
    update that has fewer. With `accum_steps=1` the layer does what Keras's layer does.
    If a `GradientAccumulateOptimizer` trains the layer's `gamma` or `beta`, and its
    update fails or is skipped, then the layer restores the statistics. It cannot do so
    on JAX, or in loops of your own with another optimizer, because it does not learn
    there what became of the gradients: it leaves out only statistics that are not
    finite. The optimizer's `flush` and `reset` also end and forget the layer's update.
    A model that is saved in the middle of an update loses the statistics that the layer
    has pooled in it (except in a checkpoint of Keras 2). If the model is loaded with
    that optimizer, the layer ends the update where the optimizer does.

    A layer that is called several times in a forward pass (shared, or in a
    `TimeDistributed`) pools all of these calls, whereas Keras's layer moves its
    statistics at each call. If the layer counts its calls, `accum_steps` is the number
    of micro-batches times the number of calls in a forward pass.

    Micro-batches of 1 to 4 examples have statistics too noisy to normalize by. With
    `renorm=True` the layer corrects them to the moving ones, within bounds ("batch
    renormalization", Ioffe 2017, arXiv:1702.03275):

        r = clip(std_k / moving_std, 1 / rmax, rmax)
        d = clip((mean_k - moving_mean) / moving_std, -dmax, dmax)
        output = ((x - mean_k) / std_k * r + d) * gamma + beta

    No gradient goes through r and d. The moving statistics must then follow the
    network: take a `momentum` that forgets within some ten updates, such as 0.9. The
    default bounds are wider than the 3 and 5 that Ioffe ends with, because they must
    serve tiny micro-batches: 2 normal values have a standard deviation below a third of
    the true one every third time.

    Args:
        accum_steps: Positive int, the number of calls in training that make an update.
            A model that trains in micro-batches ignores it.
        momentum: Float, the part of the moving statistics that an update keeps.
        epsilon: Float, added to variances.
        trainable: Whether the layer learns; if not, it normalizes by its moving
            statistics, in training too.
        axis: Int, the axis of features (1 for channels first).
        center: Whether to add `beta`.
        scale: Whether to multiply by `gamma`.
        synchronized: Whether the replicas of a `tf.distribute` strategy, or the
            processes of `torch.distributed`, normalize by the statistics of all
            replicas. JAX's sharded arrays always do.
        renorm: Whether to correct the micro-batches' statistics to the moving ones.
        rmax: Float of at least 1, the bound of r, which corrects the scale.
        dmax: Float of at least 0, the bound of d, which corrects the mean.
        **kwargs: The initializers, regularizers and constraints of
            `keras.layers.BatchNormalization`, `dtype` and `name`.

    Call arguments:
        inputs: Tensor of rank 2 to 5 and a float dtype.
        training: Whether to normalize by the micro-batch's statistics and pool them.
        mask: Bool tensor, of one rank less than the inputs: which steps of the examples
            count.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a number is out of its range.

    Example:

    ```python
    model = keras.Sequential(
        [
            keras.layers.Conv2D(16, 3),
            AccumBatchNormalization(),
            keras.layers.ReLU(),
        ]
    )
    accumulate(model, microbatch_size=8)
    ```
    """

    def __init__(
        self,
        accum_steps: int = 1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        trainable: bool = True,
        *,
        axis: int = -1,
        center: bool = True,
        scale: bool = True,
        synchronized: bool = False,
        renorm: bool = False,
        rmax: float = 10.0,
        dmax: float = 10.0,
        **kwargs,
    ):
        accum_steps = positive_int("accum_steps", accum_steps)
        _check_range("momentum", momentum, 0, 1)
        if not isinstance(renorm, bool):
            raise TypeError(
                "Argument `renorm` must be a bool. "
                f"Received: renorm={described(renorm)} (of type {type(renorm)})"
            )
        _check_range("rmax", rmax, 1, math.inf)
        _check_range("dmax", dmax, 0, math.inf)
        super().__init__(
            momentum=momentum,
            epsilon=epsilon,
            trainable=trainable,
            axis=axis,
            center=center,
            scale=scale,
            **kwargs,
        )
        # Keras's own layer knows this argument on TensorFlow only.
        self.synchronized = synchronized
        self._set_up(accum_steps, renorm, rmax, dmax)

    def _set_up(self, accum_steps, renorm=False, rmax=10.0, dmax=10.0):
        self.accum_steps = accum_steps
        self.renorm = renorm
        self.rmax = float(rmax)
        self.dmax = float(dmax)
        self._pool: Any = None  # made with the other variables
        self._within = 0  # the number of `within_update` contexts that are open

    @classmethod
    def take_over(cls, layer: Any, *settings: Any) -> None:
        """Turn a built layer of Keras into a layer of this class, in place.

        The layer keeps its weights.

        Args:
            layer: A `keras.layers.BatchNormalization`.
            *settings: The arguments of `_set_up`.
        """
        layer.__class__ = cls
        layer._set_up(*settings)
        with keras.name_scope(layer.name):
            layer._build_pool()

    @property
    def settings(self) -> tuple:
        """The settings that Keras's layer does not have."""
        return self.accum_steps, self.renorm, self.rmax, self.dmax

    def hand_over(self) -> None:
        """Turn this layer into Keras's `BatchNormalization`, in place."""
        trainer.forget(self)
        for name in ("accum_steps", "rmax", "dmax", "_pool", "_within"):
            delattr(self, name)
        self.renorm = False
        self.synchronized &= keras.backend.backend() == "tensorflow"
        self.__class__ = keras.layers.BatchNormalization

    def build(self, input_shape):
        # Newer Keras has a `renorm` of its own, with variables that are not needed.
        renorm, self.renorm = self.renorm, False
        super().build(input_shape)
        self.renorm = renorm
        self._build_pool()

    def _build_pool(self):
        moving = self.moving_mean
        self._pool = Pool(moving.shape, moving.dtype, counts=self.accum_steps > 1)
        for name in ("gamma", "beta"):
            variable = getattr(self, name, None)
            if variable is not None:
                _OWNERS[id(variable)] = self

    @property
    def variables(self):
        # The pool is state, as seeds are, and no weight: Keras neither saves nor counts
        # it. To Keras 2 all variables are weights.
        own = super().variables
        if self._pool is None or KERAS_2:
            return own
        return [*own, *self._pool.variables, *self._pool.before]

    def call(self, inputs, training=None, mask=None):
        if not (training and self.trainable):
            return super().call(inputs, training=False, mask=mask)
        _check_mask(inputs, mask)
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        x = ops.cast(inputs, dtype)
        axis = trainer.feature_axis(self)
        mean, variance, count = _statistics(
            x, axis, mask, devices.active().total, self.synchronized
        )
        beta = ops.cast(self.beta, dtype) if self.center else None
        gamma = ops.cast(self.gamma, dtype) if self.scale else None
        if self.renorm:
            gamma, beta = self._corrected(mean, variance, gamma, beta)
        outputs = ops.batch_normalization(
            x, mean, variance, axis, beta, gamma, self.epsilon
        )
        self._observe(*map(ops.stop_gradient, (mean, variance, count)))
        return ops.cast(outputs, self.compute_dtype)

    def _corrected(self, mean, variance, gamma, beta):
        """Returns `gamma` and `beta` with the corrections of batch renormalization."""
        moving_mean = ops.cast(self.moving_mean, mean.dtype)
        moving_variance = ops.cast(self.moving_variance, mean.dtype)
        moving_std = ops.sqrt(moving_variance + self.epsilon)
        r = ops.sqrt(variance + self.epsilon) / moving_std
        r = ops.stop_gradient(ops.clip(r, 1 / self.rmax, self.rmax))
        d = (mean - moving_mean) / moving_std
        d = ops.stop_gradient(ops.clip(d, -self.dmax, self.dmax))
        if gamma is not None:
            r, d = r * gamma, d * gamma
        return r, d if beta is None else d + beta

    def _observe(self, mean, variance, count):
        if self.accum_steps == 1 and not self._within:
            self._move(mean, variance, count)
            return
        self._pool.add(mean, variance, count)
        if not self._within:
            self._finish_if(trainer.value(self._pool.calls) >= self.accum_steps)

    @property
    def pending(self) -> int:
        """The number of calls pooled since the moving statistics last moved."""
        if self._pool is None:
            return 0
        return int(ops.convert_to_numpy(self._pool.calls))

    def finish_update(self) -> None:
        """Move the moving statistics by the calls pooled since they last moved.

        If no call was pooled, nothing happens. Only a loop of your own needs to call
        this method, after an update of fewer than `accum_steps` micro-batches.
        """
        if self._pool is not None:
            self._finish_if(trainer.value(self._pool.calls) > 0)

    def reset(self) -> None:
        """Forget the calls pooled since the moving statistics last moved."""
        if self._pool is not None:
            self._pool.keep(False)

    def resume(self, done: float) -> None:
        """Continue an update whose statistics so far are lost.

        Args:
            done: The part of the update's micro-batches that is done, from 0 to 1.
        """
        self.reset()
        if self._pool is not None:
            self._pool.calls.assign(round(done * self.accum_steps))

    def _finish_if(self, done):
        # A branch would cost more time than it would save.
        mean, variance, count = self._pool.values()
        if not self.synchronized:
            mean, variance, count = _over_replicas(
                mean, variance, count, devices.active().total
            )
        for before, moving in zip(self._pool.before, self._moving):
            before.assign(ops.where(done, trainer.value(moving), trainer.value(before)))
        self._move(mean, variance, ops.where(done, count, 0))
        self._pool.keep(ops.logical_not(done))

    @property
    def _moving(self):
        return self.moving_mean, self.moving_variance

    def take_back(self, condition: Any) -> None:
        """Undo the last move of the moving statistics, if no call was pooled since.

        Args:
            condition: Scalar bool tensor. If it is false, nothing happens.
        """
        undone = ops.logical_and(
            condition, ops.equal(trainer.value(self._pool.calls), 0)
        )
        for before, moving in zip(self._pool.before, self._moving):
            moving.assign(
                ops.where(undone, trainer.value(before), trainer.value(moving))
            )

    def _move(self, mean, variance, count):
        # One value that is not finite would stay in the moving statistics for good.
        moves = (count > 0) & ops.isfinite(mean) & ops.isfinite(variance)
        variance = trainer.variance_to_move_by(self, variance, count)
        for moving, new in zip(self._moving, (mean, variance)):
            # In the new value's dtype, because that of half-precision weights rounds.
            old = ops.cast(moving, new.dtype)
            moved = old * self.momentum + new * (1 - self.momentum)
            moving.assign(ops.where(moves, moved, old))

    @contextmanager
    def within_update(self) -> Iterator[None]:
        """A context of calls whose update the caller ends with `finish_update`."""
        self._within += 1  # a number, because replicas take turns in this context
        try:
            yield
        finally:
            self._within -= 1

    def get_config(self):
        config = super().get_config()
        for name in ("renorm_clipping", "renorm_momentum"):
            config.pop(name, None)
        return {
            **config,
            "accum_steps": self.accum_steps,
            "synchronized": self.synchronized,
            "renorm": self.renorm,
            "rmax": self.rmax,
            "dmax": self.dmax,
        }


# The layers that are still in memory, by the `id` of their trained variables.
_OWNERS: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def owners(variables: list) -> list[AccumBatchNormalization]:
    """Returns the layers, each once, that own some of the trained variables."""
    found = {id(x): x for v in variables if (x := _OWNERS.get(id(v)))}
    return [x for x in found.values() if isinstance(x, AccumBatchNormalization)]


def _state(name: str, shape: tuple, dtype: str) -> keras.Variable:
    """Returns a variable of zeros that is state, and no weight."""
    return keras.Variable(
        "zeros", shape, dtype, trainable=False, autocast=False, name=name
    )


class Pool(trainer.State):
    """The pooled statistics of an update's micro-batches so far.

    Its variables are weights of no layer.

    Args:
        shape: Shape of the statistics.
        dtype: Dtype of the moving statistics.
        counts: Whether the layer counts its calls. It then also holds the moving
            statistics from before their last move, in `before`.
    """

    def __init__(self, shape: tuple, dtype: str, counts: bool):
        names = ("mean", "variance") if counts else ()
        self.before = [_state(f"unmoved_{name}", shape, dtype) for name in names]
        dtype = keras.backend.result_type(dtype, "float32")

        self.count = _state("pooled_count", shape, dtype)
        self.mean = _state("pooled_mean", shape, dtype)
        self.variance = _state("pooled_variance", shape, dtype)
        self.calls = _state("pooled_calls", (), "int32")

    @property
    def variables(self) -> list:
        return [self.count, self.mean, self.variance, self.calls]

    def values(self) -> tuple:
        return tuple(map(trainer.value, (self.mean, self.variance, self.count)))

    def add(self, mean, variance, count):
        dtype = self.mean.dtype
        mean, variance = ops.cast(mean, dtype), ops.cast(variance, dtype)
        count = ops.cast(count, dtype)
        total = trainer.value(self.count) + count
        share = ops.divide_no_nan(count, total)
        old_mean = trainer.value(self.mean)
        off = mean - old_mean
        between = share * (1 - share) * ops.square(off)
        old = trainer.value(self.variance)
        self.variance.assign(old + share * (variance - old) + between)
        self.mean.assign(old_mean + share * off)
        self.count.assign(total)
        self.calls.assign_add(1)

    def keep(self, kept):
        """Forget all pooled statistics, unless `kept` is true."""
        for variable in self.variables:
            value = trainer.value(variable)
            variable.assign(ops.where(kept, value, ops.zeros_like(value)))


def synchronized_moments(layer: Any, inputs: Any, mask: Any) -> tuple:
    """Returns the mean and variance of each feature, over all replicas."""
    total = devices.active().total
    axis = trainer.feature_axis(layer)
    return _statistics(inputs, axis, mask, total, True)[:2]


def _statistics(x, axis, mask, total, synchronized):
    """Returns the mean, variance and number of values of each feature.

    Args:
        x: Tensor.
        axis: The axis of features.
        mask: Tensor of one rank less than `x`, or None.
        total: Function that sums a tensor over replicas.
        synchronized: Whether the statistics are those of all replicas, for which
            `total` is called.
    """
    axes = [i for i in range(len(x.shape)) if i != axis % len(x.shape)]
    if mask is None:
        if not synchronized:
            mean, variance = ops.moments(x, axes)
            # Floats, because the number of a volume's voxels may not fit in an int32.
            shape = [ops.cast(ops.shape(x)[i], x.dtype) for i in axes]
            return mean, variance, ops.broadcast_to(math.prod(shape), mean.shape)
        weights = ops.ones_like(x)
    else:
        weights = ops.cast(ops.expand_dims(mask, -1), "bool")
        weights = ops.cast(ops.broadcast_to(weights, ops.shape(x)), x.dtype)
        # A masked value may be infinite or NaN, which times 0 is not 0.
        x = ops.where(weights > 0, x, 0)
    if not synchronized:
        total = _unchanged
    count = total(ops.sum(weights, axes, keepdims=True))
    mean = ops.divide_no_nan(total(ops.sum(x * weights, axes, keepdims=True)), count)
    squares = ops.square(x - mean) * weights
    variance = ops.divide_no_nan(total(ops.sum(squares, axes, keepdims=True)), count)
    return tuple(ops.squeeze(each, axes) for each in (mean, variance, count))


def _over_replicas(mean, variance, count, total):
    """Returns the statistics of all replicas, pooled."""
    everywhere = total(count)
    if everywhere is count:
        return mean, variance, count
    pooled = ops.divide_no_nan(total(count * mean), everywhere)
    squares = count * (variance + ops.square(mean - pooled))
    return pooled, ops.divide_no_nan(total(squares), everywhere), everywhere


def _unchanged(tensor):
    return tensor


def _check_mask(inputs, mask):
    if mask is not None and len(mask.shape) != len(inputs.shape) - 1:
        raise ValueError(
            "Argument `mask` must have a rank of one less than the inputs. Received: "
            f"mask of shape {mask.shape}, inputs of shape {inputs.shape}"
        )


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"Argument `{name}` must be a number. "
            f"Received: {name}={described(value)} (of type {type(value).__name__})"
        )
    if not low <= value <= high:
        raise ValueError(
            f"Argument `{name}` must be a number from {low} to {high}. "
            f"Received: {name}={value}"
        )
