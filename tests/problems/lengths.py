"""Micro-batches of different sequence lengths."""

import numpy as np
from api import layers

from .data import classified_tokens, token_sequences, weighted_rows
from .losses import logits
from .models import dense_steps, of_tokens, pooled, tagger
from .problem import MICROBATCH, add, cut
from .reductions import of_reduction, squared


def trimmed(batch):
    """Micro-batches without padding, as from a pipeline that sorts by length."""

    def trim(microbatch):
        x = microbatch[0]
        longest = int((x > 0).sum(axis=1).max())
        steps = [a[:, :longest] if a.ndim > 1 else a for a in microbatch]
        return tuple(steps)

    return [trim(microbatch) for microbatch in cut(batch)]


def bucketed(make=token_sequences):
    """Batches in which the longest rows of the micro-batches differ in length."""

    def batches():
        result = make()
        for x, *_ in result:
            x[0:MICROBATCH, 3:] = 0
            x[MICROBATCH] = np.maximum(x[MICROBATCH], 1)
            x[2 * MICROBATCH :, 4:] = 0
        return result

    return batches


for _reduction, _fields in (
    ("sum", {}),
    ("sum_over_batch_size", {"core": ("accum_steps",)}),
    ("mean_with_sample_weight", {"devices": ("jax", "torch")}),
):
    add(
        f"microbatches_of_different_length_{_reduction}",
        tagger,
        bucketed(lambda: weighted_rows(token_sequences())),
        arguments=squared(_reduction),
        microbatches=trimmed,
        **of_reduction(_reduction, masked=True),
        **_fields,
    )
add(
    "microbatches_of_different_length_pooled",
    pooled(),
    bucketed(classified_tokens),
    arguments=logits(),
    microbatches=trimmed,
    optimizer_reduction=None,
)
add(
    "microbatches_of_different_length_lstm",
    of_tokens(lambda: layers.LSTM(4, return_sequences=True), dense_steps()),
    bucketed(),
    microbatches=trimmed,
    optimizer_reduction=None,
)
