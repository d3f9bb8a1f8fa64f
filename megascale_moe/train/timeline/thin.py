"""Curves with fewer points than a step has operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

POINTS = 600
"""Most points of the curve; of neighbours that do not fit the highest is kept."""


def thinned(curve: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """At most `POINTS` points: the highest of each bundle."""
    width = -(-len(curve) // POINTS) or 1
    return [max(curve[start : start + width], key=lambda point: point[1]) for start in range(0, len(curve), width)]


def of_curve(curve: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Return the drawn curve of (phase, bytes alive) after each operator."""
    points = thinned(curve)
    return {
        "alive": [alive for _, alive in points], "phases": [phase for phase, _ in points], "operators": len(curve),
        "peak": max((alive for _, alive in curve), default=0),
    }  # fmt: skip
