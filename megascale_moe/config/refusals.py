"""Refusals that name the sizes that would do."""

from __future__ import annotations

from functools import lru_cache

from megascale_moe.config.fields import require


def divides(what: str, size: int, axis: str, parts: int, otherwise: str = "") -> None:
    """Refuse a size that cannot be cut into equal parts.

    Args:
        what: the key of the size. axis: the key of the number of parts. otherwise: another way out.

    Raises:
        ConfigError: it cannot.
    """
    if size % parts:
        require(False, f"{what} = {size} is not divisible by {axis} = {parts}; use one of {divisors(size)}{otherwise}")


@lru_cache  # a search asks for thousands of layouts
def divisors(number: int, multiples_of: int = 1) -> str:
    """Return the divisors of a number as text."""
    return ", ".join(str(d) for d in range(multiples_of, number + 1, multiples_of) if number % d == 0)
