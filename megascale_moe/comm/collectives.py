"""Collectives that start now and finish when their result is read.

On gloo everything is built from one primitive, `exchange`: all receives are posted before any send, point to point.
That uses both directions of a link at once, where gloo's own all-to-all is half-duplex, and a reduce-scatter becomes
an exchange plus a local sum, where gloo's own is an all-reduce that moves twice the bytes. Each message carries a tag
made from its operator's name, so two operators whose order differs between ranks still meet the right partner
instead of adding wrong tensors silently. On NCCL the native collectives are used; they run on their own stream.

Sums are taken in rank order, so results do not depend on arrival.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.lost import waiting


class Pending:
    """A communication under way. `wait` gives its result; `wire_bytes` is what this rank sends to others."""

    def __init__(self, works: Sequence[Any], finish: Callable[[], Any], wire_bytes: int, keep: object = None) -> None:
        self._works = works
        self._finish = finish
        self._keep = keep  # buffers must outlive the transfer
        self.wire_bytes = wire_bytes

    def wait(self) -> Any:
        """Block until the communication is done (on CUDA: order it before later kernels) and return its result."""
        for work in self._works:
            work.wait()
        return self._finish()

    def then(self, finish: Callable[[Any], Any]) -> Pending:
        """Return the same communication with one more local step at its end."""
        return Pending([], lambda: finish(self.wait()), self.wire_bytes)


class _Message:
    """A message under way to or from a peer, or with all peers (None); its failure names them."""

    def __init__(self, start: Callable[[], Any], axis: Axis, peer: int | None = None) -> None:
        self._axis, self._peer = axis, peer
        with waiting(axis, peer):  # where a connection is closed already, posting fails
            self._work = start()

    def wait(self) -> None:
        """Block until it has arrived, or a sent one has left."""
        with waiting(self._axis, self._peer):
            self._work.wait()


def _is_dry(x: Tensor, axis: Axis) -> bool:
    """Return whether there is nobody to send x to; what has storage must not get lost that way."""
    if axis.deserted and not x.is_meta:
        raise RuntimeError(f"axis {axis.name} has no process group: only tensors without storage can be sent over it")
    return axis.deserted


def _is_native(x: Tensor, axis: Axis) -> bool:
    """Return whether the backend's own collectives send x; in a job on GPUs some tensors live on the CPU."""
    return axis.native and not x.is_cpu


def tag_of(name: str) -> int:
    """Return a message tag for an operator's name."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def exchange(send: Sequence[Tensor], receive: Sequence[Tensor], axis: Axis, tag: int) -> Pending:
    """Send `send[i]` to rank i of the axis and fill `receive[i]` from it; finishes with `receive`.

    Tensors are contiguous, of any (also unequal, also empty) sizes that both sides agree on; the own part is copied.
    """
    me, size = axis.index, axis.size
    receive[me].copy_(send[me])
    if _is_dry(send[me], axis):
        return Pending([], lambda: receive, sum(x.nbytes for x in send) - send[me].nbytes)
    if _is_native(send[me], axis):
        empty = receive[me - 1].new_empty(0)  # the own part may be of another dtype
        outputs, inputs = ([empty if i == me else x for i, x in enumerate(parts)] for parts in (receive, send))
        work = dist.all_to_all(outputs, inputs, axis.group, async_op=True)
        return Pending([work], lambda: receive, sum(x.nbytes for x in inputs), keep=(send, receive))
    distances = range(1, size)  # ranks do not all send to one peer first
    away, coming = [send[(me + step) % size] for step in distances], [receive[me - step] for step in distances]
    return shift(away, coming, distances, axis, tag).then(lambda _: receive)


def shift(send: Sequence[Tensor], receive: Sequence[Tensor], distances: Sequence[int], axis: Axis, tag: int) -> Pending:
    """Do a part of an exchange: send `send[i]` `distances[i]` ranks on, receive `receive[i]` from as many ranks back.

    Tensors are contiguous, of any sizes that both sides agree on; finishes with `receive`. All distances from 1 to
    size - 1 together are `exchange` without the own part.
    """
    targets = [(axis.index + distance) % axis.size for distance in distances]
    sources = [(axis.index - distance) % axis.size for distance in distances]
    sends, receives = list(zip(send, targets, strict=True)), list(zip(receive, sources, strict=True))
    works: Sequence[Any]
    if axis.native and send[0].is_cuda:  # in one launch, or sends and receives of two ranks wait for each other
        ops = [
            dist.P2POp(start, x, group=axis.group, group_peer=peer)
            for start, tensors in ((dist.isend, sends), (dist.irecv, receives)) for x, peer in tensors if x.numel()
        ]  # fmt: skip
        works = dist.batch_isend_irecv(ops) if ops else []
    else:
        works = _post(sends, receives, axis, tag, axis.group)
    return Pending(works, lambda: receive, sum(x.nbytes for x in send), keep=(send, receive))


def send(x: Tensor, peer: int, axis: Axis, tag: int, *, backward: bool = False) -> Pending:
    """Send x to the rank at index `peer` of a pipeline; finishes with nothing."""
    x = x.contiguous()
    messages = _post([(x, peer)], [], axis, tag, axis.link(axis.index, backward))
    return Pending(messages, lambda: None, x.nbytes, keep=x)


def receive(out: Tensor, peer: int, axis: Axis, tag: int, *, backward: bool = False) -> Pending:
    """Receive what `peer` sends into `out`; finishes with `out`."""
    return Pending(_post([], [(out, peer)], axis, tag, axis.link(peer, backward)), lambda: out, 0)


def _post(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], axis: Axis, tag: int,
    group: dist.ProcessGroup | None,
) -> list[_Message]:  # fmt: skip
    """Start messages point to point, (tensor, peer) each, all receives before any send; empty ones are left out."""
    directions: list[tuple[Callable[..., Any], str, Sequence[tuple[Tensor, int]]]] = [
        (dist.irecv, "group_src", receives), (dist.isend, "group_dst", sends),
    ]  # fmt: skip
    return [
        _Message(partial(start, x, group=group, tag=tag, **{side: peer}), axis, peer)
        for start, side, tensors in directions for x, peer in tensors if x.numel() and not _is_dry(x, axis)
    ]  # fmt: skip


def all_gather(x: Tensor, axis: Axis, tag: int) -> Pending:
    """Gather x [T, ...] of every rank; finishes with [size * T, ...] in rank order."""
    x = x.contiguous()
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    if _is_native(x, axis):
        return _native_gather(x, out, axis)
    return exchange([x] * axis.size, out.chunk(axis.size), axis, tag).then(lambda _: out)


def all_gather_in_place(buffer: Tensor, axis: Axis, tag: int) -> Pending:
    """Fill the other ranks' equal shares of `buffer` [size * T, ...]; this rank's own share is already there."""
    shares = buffer.chunk(axis.size)
    mine = shares[axis.index]
    if _is_native(mine, axis):
        return _native_gather(mine, buffer, axis)
    return exchange([mine] * axis.size, shares, axis, tag).then(lambda _: buffer)


def _native_gather(x: Tensor, out: Tensor, axis: Axis) -> Pending:
    start = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 gave it another name
    works = [] if _is_dry(x, axis) else [start(out, x, axis.group, async_op=True)]
    return Pending(works, lambda: out, x.nbytes * (axis.size - 1), keep=x)


def reduce_scatter(x: Tensor, axis: Axis, tag: int) -> Pending:
    """Sum x [size * T, ...] over the ranks; finishes with this rank's [T, ...], summed in float32 in rank order."""
    x = x.contiguous()
    if not _is_native(x, axis):
        return exchange(x.chunk(axis.size), x.new_empty(x.shape).chunk(axis.size), axis, tag).then(sum_in_order)
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    start = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # as above
    works = [] if _is_dry(x, axis) else [start(out, x, group=axis.group, async_op=True)]
    return Pending(works, lambda: out, out.nbytes * (axis.size - 1), keep=x)


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of equal tensors, accumulated in float32 where they are narrower."""
    if parts[0].dtype.itemsize >= 4:
        total = parts[0]
        for part in parts[1:]:
            total = total.add_(part)
        return total
    return torch.stack(list(parts)).sum(0, dtype=torch.float32).to(parts[0].dtype)


def all_reduce(x: Tensor, axis: Axis, wire_bytes: int = 0) -> Pending:
    """Sum a small tensor over the axis, in place; finishes with the same bits on every rank."""
    works = []
    if axis.size > 1 and not _is_dry(x, axis):
        works = [_Message(partial(dist.all_reduce, x, group=axis.group, async_op=True), axis)]
    return Pending(works, lambda: x, wire_bytes)


def all_reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of a small tensor over the axis, taken in place; the same bits on every rank."""
    total: Tensor = all_reduce(x, axis).wait()
    return total
