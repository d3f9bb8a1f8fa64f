"""Reduce-scatters of float32 gradients that send less than float32.

    bf16        one cast, an all-to-all, sums in float32 at the receiver (paper, section 4.3): each term is rounded
                once, relative 2^-8, however many ranks there are. The cast is in place: BF16 in one half of the buffer,
                what comes in the other, so nothing is allocated but the sum. What was in the buffer is spent
    fp8         the same with E4M3 and a scale for every 128 elements: relative 2^-4 per term, a quarter of the bytes
    bf16_ring   what a reduction in BF16 does on a ring, named to be measured: a partial sum is rounded at each of n - 1
                hops, so small terms are lost in large sums, and more the more ranks there are

Under the hierarchy (inside the node, then between nodes) the node's float32 sums are cast once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import Pending, exchange, reduce_scatter, shift
from megascale_moe.kernels.narrow import BLOCK, Float8

CAST = 1 << 18
"""Elements that are cast at a time: the temporary is half a megabyte."""
ROWS = Float8("rows")

Reduce = Callable[[Tensor, Axis, int], Pending]


def reduce_scatter_bf16(x: Tensor, axis: Axis, tag: int) -> Pending:
    """float32 [size * T], which is spent -> float32 [T]."""
    count = len(x)
    halves = x.view(torch.bfloat16)
    send, room = halves[:count], halves[count:]
    for start in range(0, count, CAST):  # element i moves from byte 4i to 2i: nothing that is still to be read is hit
        send[start : start + CAST] = x[start : start + CAST].to(torch.bfloat16)
    return exchange(send.chunk(axis.size), room.chunk(axis.size), axis, tag).then(sum_in_float32)


def reduce_scatter_fp8(x: Tensor, axis: Axis, tag: int) -> Pending:
    """float32 [size * T], T a multiple of BLOCK -> float32 [T]."""
    parts = [part.view(-1, BLOCK) for part in x.chunk(axis.size)]
    send = [ROWS.encode(part) for part in parts]
    room = [torch.empty_like(message) for message in send]

    def finish(_: object) -> Tensor:
        decoded = torch.empty_like(parts[0])
        total = ROWS.decode(room[0], torch.empty_like(parts[0]))
        for message in room[1:]:
            total += ROWS.decode(message, decoded)
        return total.flatten()

    return exchange(send, room, axis, tag).then(finish)


def reduce_scatter_bf16_ring(x: Tensor, axis: Axis, tag: int) -> Pending:
    """float32 [size * T] -> float32 [T]: rank r's sum starts behind it and is rounded wherever it is added to."""
    parts, me, size = x.to(torch.bfloat16).chunk(axis.size), axis.index, axis.size

    def finish() -> Tensor:
        total = parts[(me - 1) % size]
        for hop in range(1, size):
            room = torch.empty_like(total)
            shift([total], [room], [1], axis, tag).wait()
            total = room + parts[(me - 1 - hop) % size]
        return total.float()

    return Pending([], finish, parts[0].nbytes * (size - 1))


def sum_in_float32(parts: Sequence[Tensor]) -> Tensor:
    """Sum of equal tensors in their order, float32."""
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return total


FORMS: dict[str, tuple[Reduce, float]] = {
    "fp32": (reduce_scatter, 4), "bf16": (reduce_scatter_bf16, 2), "fp8": (reduce_scatter_fp8, 1 + 1 / BLOCK),
    "bf16_ring": (reduce_scatter_bf16_ring, 2),
}  # fmt: skip
"""By name in `[wire] gradients`: how, and bytes per element sent."""
