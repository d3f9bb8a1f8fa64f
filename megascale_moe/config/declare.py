"""What a key is declared with: a type with its range, and by `key` its default, meaning and other names.

Ranges are those of the annotated_types package, so that other libraries that read it (pydantic, hypothesis) understand
our dataclasses. Every number has a lower and an upper bound: far above what anybody trains, low enough that nothing
hangs or fills the memory before it is refused, and that float32 can hold it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, TypeVar

from annotated_types import Interval, Len

Value = TypeVar("Value")


def key(default: Value, meaning: str, *also: str, least: str = "") -> Value:
    """Declare a key of the configuration as a field of a section's dataclass.

    Args:
        meaning: one sentence. also: the names that other libraries, papers and people have for it.
        least: what the least value of its range, or the empty one, stands for where it is not meant as it is: 0 for a
            size that follows from others.
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, "also": also, "least": least})


@dataclass(frozen=True)
class TextForm:
    """Ask for a text that matches a regular expression as a whole, and say in words what that is."""

    pattern: str
    words: str


# --- whole numbers; those "or zero" give 0 a meaning of its own (`least`), or mean none of something ------------------

Layers = Annotated[int, Interval(ge=1, le=10_000)]
LayersOrZero = Annotated[int, Interval(ge=0, le=10_000)]
Width = Annotated[int, Interval(ge=1, le=2**24)]
"""Elements of a hidden state, an expert, a head."""
WidthOrZero = Annotated[int, Interval(ge=0, le=2**24)]
Heads = Annotated[int, Interval(ge=1, le=2**16)]
Experts = Annotated[int, Interval(ge=1, le=2**15)]
"""Kernels sort the numbers of experts as int16."""
ExpertsOrZero = Annotated[int, Interval(ge=0, le=2**15)]
Tokens = Annotated[int, Interval(ge=1, le=2**24)]
"""Of a vocabulary, or in a sequence."""
TokensOrZero = Annotated[int, Interval(ge=0, le=2**24)]
Ranks = Annotated[int, Interval(ge=1, le=2**20)]
RanksOrZero = Annotated[int, Interval(ge=0, le=2**20)]
Sequences = Annotated[int, Interval(ge=1, le=2**24)]
SequencesOrZero = Annotated[int, Interval(ge=0, le=2**24)]
Steps = Annotated[int, Interval(ge=1, le=10**12)]
StepsOrZero = Annotated[int, Interval(ge=0, le=10**12)]

# --- other numbers, always finite ------------------------------------------------------------------------------------

Amount = Annotated[float, Interval(ge=0, le=1e30)]
"""A coefficient: products of it are still numbers in float32."""
Factor = Annotated[float, Interval(gt=0, le=1e30)]

# --- texts, never with a NUL, which no path may have -----------------------------------------------------------------

Text = Annotated[str, Len(0, 4096)]
"""As long as a path may be on Linux."""
NeededText = Annotated[str, Len(1, 4096)]
