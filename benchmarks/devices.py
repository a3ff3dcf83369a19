"""One process of `distributed`: a model trained on several virtual devices.

`python -m benchmarks.devices SPEC` (the parent does this) answers as `variants` does,
and the line "count" with the bytes that a device hands to reductions in an update.
On PyTorch a process is one of the devices.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext

from . import meters
from .models import MODELS
from .variants import Spec, trainer

EPOCHS = 2  # a round; processes that train together must agree on it
EXCHANGE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
BYTES = {"float": 4, "int": 4, "double": 8, "long int": 8}


class _TensorFlow:
    """Logical processors under a `MirroredStrategy` that can count what it reduces."""

    def __init__(self, spec: Spec):
        import tensorflow as tf

        self._count: int | None = None
        if spec.replicas == 1:
            self.scope = nullcontext
            return
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * spec.replicas
        )
        counted = self._counted

        class Reduction(tf.distribute.ReductionToOneDevice):
            def reduce_implementation(
                self, reduce_op, per_replica_value, destinations, options
            ):
                counted(per_replica_value.values[0])
                return super().reduce_implementation(
                    reduce_op, per_replica_value, destinations, options
                )

        self.scope = tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(spec.replicas)], cross_device_ops=Reduction()
        ).scope

    def _counted(self, value) -> None:
        if self._count is None:
            return
        import tensorflow as tf

        # When the graph runs: what is in a loop counts as often as the loop runs.
        parts = tf.nest.flatten(value, expand_composites=True)
        sent = sum(tf.size(part) * part.dtype.size for part in parts)
        tf.py_function(self._add, [sent], [])

    def _add(self, sent) -> None:
        self._count += int(sent)

    def count(self, spec: Spec, prepare: Callable, train: Callable) -> float:
        self._count = 0
        train = prepare()  # graphs that count
        train(1)
        self._count = 0
        train(1)
        return self._count / spec.updates


class _Jax:
    def __init__(self, spec: Spec):
        import keras

        self.scope = nullcontext
        if spec.replicas > 1:
            keras.distribution.set_distribution(keras.distribution.DataParallel())

    def count(self, spec: Spec, prepare: Callable, train: Callable) -> float:
        """From the programs that XLA compiled, and how often an update runs each."""
        import jax

        sent = 0
        for executable in jax.devices()[0].client.live_executables():
            for module in executable.hlo_modules():
                once = "reduce" in module.name or "apply" in module.name
                found = sum(map(_size, EXCHANGE.findall(module.to_string())))
                sent += found * (1 if once else spec.microbatches)
        return sent


def _size(shapes: str) -> int:
    """Bytes of the arrays in an HLO type, as `(f32[8,4]{1,0}, f32[])`."""
    return sum(
        int(bits or 8) // 8 * math.prod(map(int, filter(None, shape.split(","))))
        for bits, shape in re.findall(r"\b[a-z]+(\d*)\[([\d,]*)\]", shapes)
    )


class _Torch:
    def __init__(self, spec: Spec):
        import torch.distributed as dist

        self.scope = nullcontext
        dist.init_process_group("gloo")

    def count(self, spec: Spec, prepare: Callable, train: Callable) -> float:
        import torch

        with torch.profiler.profile(record_shapes=True) as profile:
            train(1)
        sent = sum(
            math.prod(shape) * BYTES[dtype]
            for event in profile.events()
            if event.name == "gloo:all_reduce"
            for shape, dtype in zip(event.input_shapes, event.input_dtypes)
        )
        return sent / spec.updates


def run(spec: Spec, commands, answer: Callable[[dict], None]) -> None:
    """Build, warm up, then do what the lines of `commands` say."""
    kind = {"tensorflow": _TensorFlow, "jax": _Jax, "torch": _Torch}[spec.backend]
    devices = kind(spec)
    import keras

    problem = MODELS[spec.model]
    x, y = problem.data(spec.updates * spec.size * spec.microbatches * spec.replicas)

    def prepare():
        nonlocal model
        keras.utils.set_random_seed(0)
        with devices.scope():
            model = problem.build()
            return trainer(spec, model, x, y)

    model = None
    train = prepare()
    train(2)
    answer(
        {
            "gradients": 4 * sum(math.prod(v.shape) for v in model.trainable_variables),
            "device": meters.device(spec.backend),
            "versions": meters.versions(spec.backend),
        }
    )
    for command in commands:
        gc.collect()
        if command.strip() == "count":
            answer({"bytes": devices.count(spec, prepare, train)})
        else:
            seconds = train(1 + EPOCHS)[1:]  # the first may still fill caches
            answer({"seconds": [s / spec.updates for s in seconds]})


def main() -> None:
    # What libraries print must not end up between the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict) -> None:
        print(json.dumps(message), file=out, flush=True)

    run(Spec(**json.loads(sys.argv[1])), sys.stdin, answer)


if __name__ == "__main__":
    main()
