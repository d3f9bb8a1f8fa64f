"""Reduce-scatters of float32 gradients that send less than float32.

    bf16        one cast, an all-to-all, sums in float32 at the receiver (paper, section 4.3): each term is rounded
                once, relative 2^-8, however many ranks there are. The cast is in place: BF16 in one half of the buffer,
                what comes in the other, so nothing is allocated but the sum. What was in the buffer is spent
    fp8         the same with E4M3 and a scale for every 128 elements: relative 2^-4 per term, a quarter of the bytes
    bf16_ring   what a reduction in BF16 does on a ring, named to be measured: a partial sum is rounded at each of n - 1
                hops, so small terms are lost in large sums, and more the more ranks there are

Under the hierarchy (inside the node, then between nodes) the node's float32 sums are cast once more. Starting and
summing are two functions: what stands between them in a list travels while others are cast and summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import Pending, exchange, reduce_scatter, shift
from megascale_moe.kernels.narrow import BLOCK, Float8

CAST = 1 << 18
"""Elements that are cast at a time: the temporary is half a megabyte."""
ROWS = Float8("rows")


@dataclass(frozen=True)
class Form:
    """A way to sum over ranks.

    Attributes:
        start: float32 [size * T] -> what comes from the ranks; may spend what it was given.
        total: that -> the sum, float32 [T]. None: it is the sum already.
        element: bytes sent per element.
        packed: the dtype in which chunks may be given instead.
    """

    start: Callable[[Tensor, Axis, int], Pending]
    total: Callable[[Any], Tensor] | None
    element: float
    packed: torch.dtype = torch.float32


def exchange_bf16(x: Tensor, axis: Axis, tag: int) -> Pending:
    """Exchange float32 [size * T], which is spent, or bfloat16; finishes with the bfloat16 [T] of every rank."""
    if x.dtype == torch.bfloat16:
        send, room = x, torch.empty_like(x)
    else:
        count, halves = len(x), x.view(torch.bfloat16)
        send, room = halves[:count], halves[count:]
        end = 1 if x.is_meta else count  # without storage a block takes what all take, one after the other
        for start in range(0, end, CAST):  # element i moves from byte 4i to 2i: nothing still to be read is hit
            send[start : start + CAST] = x[start : start + CAST].to(torch.bfloat16)
    return exchange(send.chunk(axis.size), room.chunk(axis.size), axis, tag).then(list)


def sum_in_float32(parts: Sequence[Tensor]) -> Tensor:
    """Return the float32 sum of equal tensors, taken in their order."""
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return total


def exchange_fp8(x: Tensor, axis: Axis, tag: int) -> Pending:
    """Exchange float32 [size * T], T a multiple of BLOCK, in E4M3; finishes with the messages of every rank."""
    send = [ROWS.encode(part.view(-1, BLOCK)) for part in x.chunk(axis.size)]
    return exchange(send, [torch.empty_like(message) for message in send], axis, tag)


def sum_of_fp8(messages: Sequence[Tensor]) -> Tensor:
    """Return the float32 sum of the vectors in messages of equal size, taken in their order."""
    shape = (len(messages[0]) // (BLOCK + 1), BLOCK)
    total, part = (torch.empty(shape, device=messages[0].device) for _ in range(2))
    ROWS.decode(messages[0], total)
    for message in messages[1:]:
        total += ROWS.decode(message, part)
    return total.flatten()


def reduce_scatter_bf16_ring(x: Tensor, axis: Axis, tag: int) -> Pending:
    """Reduce float32 [size * T] to [T] on a ring: rank r's sum starts behind it and is rounded at every hop."""
    parts, me, size = x.to(torch.bfloat16).chunk(axis.size), axis.index, axis.size

    def finish() -> Tensor:
        total = parts[(me - 1) % size]
        for hop in range(1, size):
            room = torch.empty_like(total)
            shift([total], [room], [1], axis, tag).wait()
            total = room + parts[(me - 1 - hop) % size]
        return total.float()

    return Pending([], finish, parts[0].nbytes * (size - 1))


FORMS = {
    "fp32": Form(reduce_scatter, None, 4),
    "bf16": Form(exchange_bf16, sum_in_float32, 2, torch.bfloat16),
    "fp8": Form(exchange_fp8, sum_of_fp8, 1 + 1 / BLOCK),
    "bf16_ring": Form(reduce_scatter_bf16_ring, None, 2),
}
"""By name in `[wire] gradients`."""
