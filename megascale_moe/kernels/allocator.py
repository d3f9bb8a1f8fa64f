"""Keeping freed memory on a CPU.

glibc gives every large block back to the system when it is freed and takes a new one at the next allocation; the
system then clears it page by page on first touch. A training step allocates the same tensors again and again, and
those page faults cost more than the elementwise work on them: 16 ms against 2.5 for one pass over 32 MB
(benchmarks/kernels). GPUs have torch's caching allocator for the same reason.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 1 << 30  # blocks above it still go back to the system


def keep_freed_memory() -> bool:
    """Make this process's allocator keep what it frees; False where the C library has no such switch."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
