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
from dataclasses import dataclass
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
        """The same communication with one more local step at its end."""
        return Pending([], lambda: finish(self.wait()), self.wire_bytes)


@dataclass(frozen=True)
class _Message:
    """A message under way to or from a peer, or with all peers (None); its failure names them."""

    work: Any
    axis: Axis
    peer: int | None = None

    def wait(self) -> None:
        """Block until it has arrived, or a sent one has left."""
        with waiting(self.axis, self.peer):
            self.work.wait()


class _Nothing:
    """A message to or from a peer without a process group: nothing is sent."""

    def wait(self) -> None:
        """There is nothing to wait for."""


NOTHING = _Nothing()


def _on_paper(x: Tensor, axis: Axis) -> bool:
    """Whether there is nobody to send x to; what has storage must not get lost that way."""
    if not axis.deserted:
        return False
    if not x.is_meta:
        raise RuntimeError(f"axis {axis.name} has no process group: only tensors without storage can be sent over it")
    return True


def tag_of(name: str) -> int:
    """A message tag for an operator's name."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def exchange(send: Sequence[Tensor], receive: Sequence[Tensor], axis: Axis, tag: int) -> Pending:
    """Send `send[i]` to rank i of the axis and fill `receive[i]` from it; finishes with `receive`.

    Tensors are contiguous, of any (also unequal, also empty) sizes that both sides agree on; the own part is copied.
    """
    me, group = axis.index, axis.group
    receive[me].copy_(send[me])
    works: list[Any]
    peers = [(me + step) % axis.size for step in range(1, axis.size)]  # ranks do not all hit one peer
    wire = sum(send[peer].nbytes for peer in peers)
    if _on_paper(send[me], axis):
        works = []
    elif axis.native and not send[me].is_cpu:
        empty = receive[peers[0] if peers else me].new_empty(0)  # the own part may be of another dtype
        works = [
            dist.all_to_all(
                [empty if i == me else t for i, t in enumerate(receive)],
                [empty if i == me else t for i, t in enumerate(send)],
                group,
                async_op=True,
            )
        ]
    else:
        works = [_receive(receive[p], axis, p, tag, group) for p in reversed(peers) if receive[p].numel()]
        works += [_send(send[p], axis, p, tag, group) for p in peers if send[p].numel()]
    return Pending(works, lambda: receive, wire, keep=(send, receive))


def all_to_all(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], axis: Axis, tag: int) -> Pending:
    """Rows of x [sum(send_rows), ...] to the ranks in order; finishes with [sum(receive_rows), ...]."""
    out = x.new_empty(sum(receive_rows), *x.shape[1:])
    parts = exchange(x.contiguous().split(list(send_rows)), out.split(list(receive_rows)), axis, tag)
    return parts.then(lambda _: out)


def all_gather(x: Tensor, axis: Axis, tag: int) -> Pending:
    """x [T, ...] of every rank, finishes with [size * T, ...] in rank order."""
    x = x.contiguous()
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    if axis.native and not x.is_cpu:
        return Pending(_all_gather(out, x, axis), lambda: out, x.nbytes * (axis.size - 1), keep=x)
    return exchange([x] * axis.size, out.chunk(axis.size), axis, tag).then(lambda _: out)


def all_gather_in_place(buffer: Tensor, axis: Axis, tag: int) -> Pending:
    """Fill the other ranks' equal shares of `buffer` [size * T, ...]; this rank's own share is already there."""
    parts = buffer.chunk(axis.size)
    mine = parts[axis.index]
    if axis.native and not buffer.is_cpu:
        return Pending(_all_gather(buffer, mine, axis), lambda: buffer, mine.nbytes * (axis.size - 1), keep=buffer)
    return exchange([mine] * axis.size, parts, axis, tag).then(lambda _: buffer)


def reduce_scatter(x: Tensor, axis: Axis, tag: int) -> Pending:
    """Sum of x [size * T, ...] over the ranks, finishes with this rank's [T, ...]; sums in float32, in rank order."""
    x = x.contiguous()
    if axis.native and not x.is_cpu:
        out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
        return Pending(_reduce_scatter(out, x, axis), lambda: out, x.nbytes // axis.size * (axis.size - 1), keep=x)
    parts = x.new_empty(x.shape).chunk(axis.size)
    return exchange(x.chunk(axis.size), parts, axis, tag).then(sum_in_order)


def shift(
    send: Sequence[Tensor], receive: Sequence[Tensor], distances: Sequence[int], axis: Axis, tag: int
) -> Pending:
    """A part of an exchange: `send[i]` goes `distances[i]` ranks on, `receive[i]` comes from as many ranks back.

    Tensors are contiguous, of any sizes that both sides agree on; finishes with `receive`. All distances from 1 to
    size - 1 together are `exchange` without the own part.
    """
    targets = [(axis.index + distance) % axis.size for distance in distances]
    sources = [(axis.index - distance) % axis.size for distance in distances]
    wire = sum(part.nbytes for part in send)
    expected = [(part, source) for part, source in zip(receive, sources, strict=True) if part.numel()]
    given = [(part, target) for part, target in zip(send, targets, strict=True) if part.numel()]
    if axis.native and send[0].is_cuda:
        works = _batched(given, expected, axis)
    else:
        works = [_receive(part, axis, source, tag, axis.group) for part, source in expected]
        works += [_send(part, axis, target, tag, axis.group) for part, target in given]
    return Pending(works, lambda: receive, wire, keep=(send, receive))


def _batched(given: list[tuple[Tensor, int]], expected: list[tuple[Tensor, int]], axis: Axis) -> list[Any]:
    """Point to point on NCCL: in one launch, or sends and receives of two ranks wait for each other."""
    ops = [dist.P2POp(dist.isend, part, group=axis.group, group_peer=target) for part, target in given]
    ops += [dist.P2POp(dist.irecv, part, group=axis.group, group_peer=source) for part, source in expected]
    return dist.batch_isend_irecv(ops) if ops else []


def send(x: Tensor, peer: int, axis: Axis, tag: int, *, backward: bool = False) -> Pending:
    """x to the rank at index `peer` of a pipeline; finishes with nothing."""
    x = x.contiguous()
    message = _send(x, axis, peer, tag, axis.link(axis.index, backward))
    return Pending([message], lambda: None, x.nbytes, keep=x)


def receive(out: Tensor, peer: int, axis: Axis, tag: int, *, backward: bool = False) -> Pending:
    """Receive what `peer` sends into `out`; finishes with `out`."""
    return Pending([_receive(out, axis, peer, tag, axis.link(peer, backward))], lambda: out, 0)


def _send(x: Tensor, axis: Axis, peer: int, tag: int, group: dist.ProcessGroup | None) -> _Message | _Nothing:
    if _on_paper(x, axis):
        return NOTHING
    with waiting(axis, peer):  # where a connection is closed already, posting fails
        return _Message(dist.isend(x, group=group, group_dst=peer, tag=tag), axis, peer)


def _receive(out: Tensor, axis: Axis, peer: int, tag: int, group: dist.ProcessGroup | None) -> _Message | _Nothing:
    if _on_paper(out, axis):
        return NOTHING
    with waiting(axis, peer):
        return _Message(dist.irecv(out, group=group, group_src=peer, tag=tag), axis, peer)


def _all_gather(out: Tensor, x: Tensor, axis: Axis) -> list[Any]:
    """torch's own, which 2.13 gave another name."""
    start = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    return [] if _on_paper(x, axis) else [start(out, x, axis.group, async_op=True)]


def _reduce_scatter(out: Tensor, x: Tensor, axis: Axis) -> list[Any]:
    """torch's own, which 2.13 gave another name."""
    start = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    return [] if _on_paper(x, axis) else [start(out, x, group=axis.group, async_op=True)]


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Sum of equal tensors, accumulated in float32 where they are narrower."""
    if parts[0].dtype.itemsize >= 4:
        total = parts[0]
        for part in parts[1:]:
            total = total.add_(part)
        return total
    return torch.stack(list(parts)).sum(0, dtype=torch.float32).to(parts[0].dtype)


def all_reduce(x: Tensor, axis: Axis, wire_bytes: int) -> Pending:
    """Sum of a small tensor over the axis, in place; finishes with the same bits on every rank."""
    if _on_paper(x, axis):
        return Pending([], lambda: x, wire_bytes)
    with waiting(axis):
        work = dist.all_reduce(x, group=axis.group, async_op=True)
    return Pending([_Message(work, axis)], lambda: x, wire_bytes)


def all_reduce_sum(x: Tensor, axis: Axis) -> Tensor:
    """Sum of a small tensor over the axis, in place, at once; the same bits on every rank."""
    if axis.size > 1 and not _on_paper(x, axis):
        with waiting(axis):
            dist.all_reduce(x, group=axis.group)
    return x
