"""What a communication sends to each rank and what it makes of what comes, apart from how numbers are written.

All of a strategy's communications are an exchange of matrices: rows of tokens, or of routed rows, one matrix to each
rank. An all-gather sends everyone the same, a reduce-scatter sums what comes. Said so once, it can be carried out as it
is (`start`), or in steps between which the matrices are rewritten: `pack`, `move`, `unpack`. So there is no second
implementation of a communication for a narrower format, and no format knows a strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import Pending, exchange, shift, sum_in_order

Shape = tuple[int, int]
Matrices = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """An exchange of matrices.

    Attributes:
        pack: from what the operator reads, the matrices [R, w] for the ranks of the axis in order, contiguous.
        shapes: of the matrices that come, from the reads whose places `plan` names (row maps).
        finish: the result of the matrices that came. They lie one behind the other in the memory of `whole` [N], unless
            they are summed: then there is no whole.
        typical: shape of a matrix to another rank when routing is balanced, of the widest where they differ: what is
            decided by it must be decided alike on all ranks.
        dtype: of the result. sums: results are sums; what was rewritten is summed in float32.
        distances: to send only so many ranks on instead of to all ranks of the axis, see `collectives.shift`.
    """

    axis: Axis
    tag: int
    pack: Callable[..., Sequence[Tensor]]
    shapes: Callable[..., Sequence[Shape]]
    finish: Callable[[Tensor, Matrices], Any]
    typical: tuple[float, float]
    dtype: torch.dtype
    plan: tuple[int, ...] = ()
    sums: bool = False
    distances: tuple[int, ...] = ()

    def start(self, *reads: Any) -> Pending:
        """Send what is read as it is."""
        send = self.pack(*reads)
        shapes = self.shapes(*(reads[place] for place in self.plan))
        whole, parts = self._room(shapes, self.dtype, send[0].device)
        return self.move(send, parts).then(lambda _: self.finish(whole, parts))

    def move(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Pending:
        """Send tensors of any form to where the matrices go."""
        if self.distances:
            return shift(send, receive, self.distances, self.axis, self.tag)
        return exchange(send, receive, self.axis, self.tag)

    def own(self, place: int) -> bool:
        """Return whether a matrix stays on this rank."""
        return not self.distances and place == self.axis.index

    def unpack(self, fill: Callable[[int, Tensor], object], device: torch.device, plan: Sequence[Any]) -> Any:
        """Return the result of matrices that `fill(place, matrix)` writes."""
        whole, parts = self._room(self.shapes(*plan), torch.float32 if self.sums else self.dtype, device)
        for place, part in enumerate(parts):
            fill(place, part)
        return self.finish(whole, parts)

    def _room(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Matrices]:
        """Allocate what is received; what is summed in parts of their own, which the sum does not keep alive."""
        if self.sums:
            return torch.empty(0, device=device), [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        whole = torch.empty(sum(rows * width for rows, width in shapes), dtype=dtype, device=device)
        parts = whole.split([rows * width for rows, width in shapes])
        return whole, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def sum_to(dtype: torch.dtype) -> Callable[[Tensor, Matrices], Tensor]:
    """Return the `finish` of a reduce-scatter: the sum in the order of ranks, in `dtype`."""
    return lambda _, parts: sum_in_order(parts).to(dtype)


def as_rows(whole: Tensor, parts: Matrices) -> Tensor:
    """Return matrices of equal width as one, [sum of R, w]; a `finish`."""
    return whole.view(-1, parts[0].shape[1])
