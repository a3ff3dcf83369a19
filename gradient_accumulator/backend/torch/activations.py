"""Activations that are in reference cycles, and so stay when a micro-batch is done.

Keras's tree functions leave such cycles on PyTorch, with a model's inputs and with what
a layer merges. Python finds them when it has made some hundred more objects, which
takes several micro-batches.
"""

from __future__ import annotations

import gc
import threading


class _Counted:
    """An object that is made anew, where Python keeps some of other types for later."""


_made = 0  # objects since Python looked at older ones
# Python too lets one thread collect, and others go on meanwhile.
_collecting = threading.Lock()


def free_activations() -> None:
    """Called after a micro-batch, for the next not to begin with its activations.

    A collection that is asked for puts off those that Python starts by itself, which
    alone look at objects that have lived longer. So one of these is started after as
    many objects as Python would have waited for. Nothing happens where a user has
    turned the collector off.
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
    """Let Python collect what it finds that it is time for."""
    before = gc.get_threshold()
    gc.set_threshold(1, *before[1:])
    try:
        for _ in range(3):
            _Counted()
    finally:
        gc.set_threshold(*before)
