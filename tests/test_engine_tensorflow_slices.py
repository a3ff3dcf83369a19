"""The slices of embeddings' gradients on TensorFlow, and their memory."""

import subprocess
import sys

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the others have none"
)

MEASURED = """
import re
from pathlib import Path
import tensorflow as tf
from gradient_accumulator.engine.tensorflow_slices import *

ROWS, WIDTH, COUNT, MIB = 4096, 512, 16, 2**20
variable = tf.Variable(tf.zeros((8, WIDTH)))

def peak():
    # Not of `getrusage`, which counts the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

@tf.function(autograph=False)
def total(most, even):
    def body(k, held):
        values = tf.random.stateless_uniform((ROWS, WIDTH), [k, 0])
        indices = tf.zeros((ROWS,), tf.int32)
        new = tf.IndexedSlices(values, indices, tf.constant([8, WIDTH]))
        return k + 1, with_slices(held, k, new, most)

    start = tf.constant(0), no_slices(variable, tf.int32, even)
    _, held = tf.while_loop(
        lambda k, held: k < most, body, start, parallel_iterations=1
    )
    return joined(held, variable).values[0, 0]

for count in (1, COUNT):
    graph = total.get_concrete_function(tf.constant(count), {even})
    before = peak()
    graph(tf.constant(count))
print((peak() - before) / (ROWS * WIDTH * 4 * COUNT))
"""


def sizes_of_slices(even):
    """The peak memory of a loop, as a multiple of the size of all its slices."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.replace("{even}", str(even))],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_slices_of_a_known_number_are_in_memory_once():
    once = sizes_of_slices(even=True)
    assert once < 1.4
    # If their number is not known they take twice the memory: the measure works.
    assert once < 0.8 * sizes_of_slices(even=False)
