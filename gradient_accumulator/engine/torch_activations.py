"""Frees activations that are in reference cycles, and so outlive their micro-batch.

On PyTorch, Keras's tree functions leave such cycles, with a model's inputs and with the
inputs of merging layers. Python finds the cycles only after it has made some hundred
more objects, which takes several micro-batches.
"""

from __future__ import annotations

import gc
import threading


class _Counted:
    """An object that Python counts. It reuses objects of some built-in types."""


_made = 0  # objects since Python last looked at older ones
# One thread collects while others go on, as in Python's own collections.
_collecting = threading.Lock()


def free_activations() -> None:
    """Free a micro-batch's activations before the next micro-batch begins.

    This collects Python's youngest objects. That delays automatic collections, and only
    those look at older objects, so that this starts one as often as Python would have.
    Nothing happens if the user has turned the collector off.
    """
    global _made
    if not gc.isenabled() or not _collecting.acquire(blocking=False):
        return
    try:
        young, older, _ = gc.get_threshold()
        if not young:
            return
        _made += gc.get_count()[0]
        if _made > young * (older + 1):
            _made = 0
            _start_collector()
        else:
            gc.collect(0)
    finally:
        _collecting.release()


def _start_collector() -> None:
    """Make Python start the automatic collection that is due."""
    before = gc.get_threshold()
    gc.set_threshold(1, *before[1:])
    try:
        for _ in range(3):
            _Counted()
    finally:
        gc.set_threshold(*before)
