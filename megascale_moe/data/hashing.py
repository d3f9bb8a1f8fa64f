"""What must come out the same on every machine: digests, and shuffles derived from a key.

A shuffle that resumes exactly may not depend on the state of a generator, and not on the release of numpy either (its
generators' streams may change between releases). So a permutation here is the sort order of hashed indices: splitmix64,
started at a hash of the key. It is vectorised, needs no state, and is the same for ever.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def digest(*parts: bytes | str) -> str:
    """Hash the parts, each with its length so that ("ab", "c") and ("a", "bc") differ; 32 hexadecimal digits."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()


def permutation(count: int, *key: int | str) -> NDArray[np.int64]:
    """Return the numbers 0 .. count-1 in an order that depends on the key alone; int64 [count]."""
    # Hashing the key first keeps neighbouring seeds apart: with `index + seed` they would be the same order, shifted.
    start = int(digest(*map(str, key))[:16], 16)
    state = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN + np.uint64(start)
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable")
