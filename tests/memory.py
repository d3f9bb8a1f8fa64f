"""What this process holds of the system's memory: ranks are forked from it, and a fork copies its page tables."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Return freed memory to the system; glibc keeps some of it, and all of it once a trainer has asked for that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        gc.collect()
        trim(0)
