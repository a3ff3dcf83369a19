"""Pieces that differ in sequence length."""

import numpy as np
from api import layers

from .data import classified_tokens, token_sequences, weighted_rows
from .losses import logits, slow, squared
from .models import dense_steps, of_tokens, pooled, tagger
from .problem import PIECE, add, change, cut, of_reduction, sgd


def trimmed(batch):
    """Pieces as a pipeline that buckets by length makes them: without the padding."""

    def trim(piece):
        x = piece[0]
        longest = int((x > 0).sum(axis=1).max())
        steps = [a[:, :longest] if a.ndim > 1 else a for a in piece]
        return tuple(steps)

    return [trim(piece) for piece in cut(batch)]


def bucketed(make=token_sequences):
    """Batches whose pieces have different longest rows."""

    def batches():
        result = make()
        for x, *_ in result:
            x[0:PIECE, 3:] = 0
            x[PIECE] = np.maximum(x[PIECE], 1)
            x[2 * PIECE :, 4:] = 0
        return result

    return batches


for _reduction in ("sum", "sum_over_batch_size", "mean_with_sample_weight"):
    add(
        f"pieces_of_different_length_{_reduction}",
        tagger,
        bucketed(lambda: weighted_rows(token_sequences())),
        arguments=squared(_reduction),
        optimizer=slow if _reduction == "sum" else sgd,
        pieces=trimmed,
        **of_reduction(_reduction, equal=False),
    )
change("pieces_of_different_length_sum_over_batch_size", core=("accum_steps",))
change("pieces_of_different_length_mean_with_sample_weight", devices=("jax", "torch"))
add(
    "pieces_of_different_length_pooled",
    pooled(),
    bucketed(classified_tokens),
    arguments=logits(),
    pieces=trimmed,
    optimizer_reduction=None,
)
add(
    "pieces_of_different_length_lstm",
    of_tokens(lambda: layers.LSTM(4, return_sequences=True), dense_steps()),
    bucketed(),
    pieces=trimmed,
    optimizer_reduction=None,
)
