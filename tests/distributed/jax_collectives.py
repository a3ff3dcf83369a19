"""Prints the exchanges between devices in the programs that XLA compiled for an update.

Arguments: a folder for XLA's files, "data" or "model" (what is parallel), and the
number of micro-batches of an update. Prints JSON: the exchanges of the program that
adds a micro-batch, and of the programs that run once. Each exchange has its kind and
its number of values on a device.
"""

import json
import math
import re
import sys
from pathlib import Path

import quickly

FOLDER = Path(sys.argv[1])
quickly.add_flags(
    "--xla_force_host_platform_device_count=4",
    f"--xla_dump_to={FOLDER}",
    "--xla_dump_hlo_as_text",
)

import keras
import numpy as np
from keras import layers

from gradient_accumulator import accumulate

EXCHANGE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def distribution(kind):
    if kind == "data":
        return keras.distribution.DataParallel()
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*wide/kernel"] = (None, "model")
    layout[".*wide/bias"] = ("model",)
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


def exchanges(text):
    found = []
    for shapes, kind in EXCHANGE.findall(text):
        sizes = [
            math.prod(map(int, filter(None, shape.split(","))))
            for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
        ]
        found.append((kind, sum(sizes)))
    return found


def main(kind, microbatches):
    keras.distribution.set_distribution(distribution(kind))
    model = keras.Sequential(
        [
            layers.Input((16,), dtype="int32"),
            layers.Embedding(30, 12, mask_zero=True),
            layers.Dropout(0.1),
            layers.Dense(40, activation="relu", name="wide"),
            layers.Dense(5),
        ]
    )
    r = np.random.default_rng(0)
    x = r.integers(0, 30, (48, 16)).astype("int32")
    y = r.normal(size=(48, 16, 5)).astype("float32")
    model.compile(keras.optimizers.Adam(global_clipnorm=0.1), "mse", metrics=["mae"])
    devices = 4 if kind == "data" else 2
    accumulate(model, microbatch_size=24 // devices // microbatches)
    model.fit(x, y, batch_size=24, verbose=0, shuffle=False)
    found = {"microbatch": [], "update": [], "parameters": model.count_params()}
    for file in FOLDER.glob("*after_optimizations.txt"):
        text = file.read_text()
        if "accumulate_gradients" in text:
            found["microbatch"] += exchanges(text)
        elif "reduce_gradients" in text or "apply_gradients" in text:
            found["update"] += exchanges(text)
    # Each size of micro-batches has a program; here all micro-batches have one size.
    if kind == "model":
        kernel = model.get_layer("wide").kernel.value
        found["sharding"] = str(kernel.sharding.spec)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]))
