"""Synchronisation of flat weights over their replicas, as operators: four hierarchical steps (paper, section 3.1).

Gradients are reduce-scattered inside the node and then between nodes, updated weights all-gathered between nodes and
then inside the node. A rank of n in its node thus sends the n-th part of the P elements between nodes, 2P/n (d-1)/d
for both directions, the slow link's share under tensor parallelism, and pays with 2P (n-1)/n on the fast link.

To use both links at once, the shards are cut into chunks, and a chunk travels between nodes while the next one travels
inside: the order of the list says so, a communication operator starts where it stands and is waited for where its
result is read. Several groups are one pipeline, so that neither link idles between two groups.

Without a second level there is nothing to overlap: the buffer itself is sent at once, without a copy. In a narrower
format (`narrow_sums`, and `FlatWeights.formats`) there is: a chunk travels while the next is cast and the one before
is summed or read. Sums are taken in rank order, first inside the node and then over nodes, so chunks do not change a
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import Pending, all_gather, all_gather_in_place, tag_of
from megascale_moe.engine.op import Cost, Op, Phase, Stream
from megascale_moe.optim.flat import FlatWeights, Formats
from megascale_moe.optim.narrow_sums import FORMS

CHUNK = 1 << 19
"""Elements of a shard per chunk: 2 MiB messages between nodes, long against a link's latency, short against a group."""

Job = list[list[Op]]
"""The way of one chunk, hop by hop; the operators of a hop stand together in the list."""

_Collective = Callable[[Tensor, Axis, int], Pending]
_Level = tuple[Axis, Stream]


def shard_of(flat: FlatWeights) -> str:
    """Return the name of the summed gradients of this rank's shard, float32 [S]."""
    return f"{flat.name}.shard"


def updated_of(flat: FlatWeights) -> str:
    """Return the name of the updated weights of this rank's shard, `FlatWeights.updated`."""
    return f"{flat.name}.updated"


def given(groups: Sequence[FlatWeights]) -> dict[str, Tensor]:
    """Return what `reduce` reads, by name: the flat gradients; without replicas these are the summed shard already."""
    return {_gradients_of(flat) if _levels(flat) else shard_of(flat): flat.gradients for flat in groups}


def updated(groups: Sequence[FlatWeights]) -> dict[str, Tensor]:
    """Return what `gather_job` reads, by name."""
    return {updated_of(flat): flat.updated for flat in groups}


def reduce(groups: Sequence[FlatWeights], chunk: int = CHUNK) -> list[Op]:
    """Sum the gradients over the replicas: `given` -> `shard_of` each group. The gradient buffers are only read."""
    chunks = [_chunks(flat, chunk) for flat in groups if _levels(flat)]
    jobs = [_reduce_job(part) for parts in chunks for part in parts]
    return [*pipelined(jobs), *(_assemble(parts) for parts in chunks if len(parts) > 1)]


def gather(groups: Sequence[FlatWeights], updates: Mapping[str, Job], chunk: int = CHUNK) -> list[Op]:
    """Fill the `weights` of every rank from the shards.

    Args:
        updates: by name of the group, the hops of its update, the last of which writes `updated_of` it. That comes
            right before the group's first chunk, so that the group before it travels while it runs.
    """
    jobs: list[Job] = []
    in_place = []
    for flat in groups:
        *hops, last = updates[flat.name]
        for part in _chunks(flat, chunk):
            way = _gather_job(part)
            if _levels(flat) and part.in_place:
                in_place.append(flat)
            elif _levels(flat):
                way.append([_unpack(part)])
            first, *rest = way or [[]]
            jobs.append([*hops, [*last, *first], *rest])
            hops, last = [[] for _ in hops], []  # the update is done once; later chunks wait for it
    return [*pipelined(jobs), _ready(in_place)]


def reduce_job(flat: FlatWeights) -> Job:
    """Return the hops of one group's gradients, uncut; none where nobody else holds its weights."""
    return _reduce_job(_whole(flat)) if _levels(flat) else []


def gather_job(flat: FlatWeights) -> Job:
    """Return the hops of one group's updated weights, uncut; `arrived` comes behind them."""
    return _gather_job(_whole(flat))


def arrived(flat: FlatWeights) -> Op:
    """Return what stands between `gather_job` and the first use of the weights."""
    whole = _whole(flat)
    return _ready([flat]) if whole.in_place else _unpack(whole)


def pipelined(jobs: Sequence[Job]) -> list[Op]:
    """Put hop h of job j at time j + h, later jobs first: a chunk's second hop starts behind the next one's first."""
    times: dict[int, list[Op]] = {}
    for start, job in enumerate(jobs):
        for hop, ops in enumerate(job):
            times.setdefault(start + hop, [])[:0] = ops
    return [op for time in sorted(times) for op in times[time]]


# --- chunks and levels -----------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """Elements `part` of every rank's shard of a group, the `number`-th chunk; `alone` if that is all of them."""

    flat: FlatWeights
    part: slice
    number: int
    alone: bool

    @property
    def size(self) -> int:
        """Elements of one rank, s."""
        return int(self.part.stop - self.part.start)

    @property
    def total(self) -> int:
        """Elements of all ranks, n * d * s."""
        return self.size * self.flat.intra.size * self.flat.inter.size

    @property
    def matrix(self) -> tuple[int, int]:
        """A rank's part as rows that share a scale."""
        unit = self.flat.formats.unit
        return self.size // unit, unit

    @property
    def in_place(self) -> bool:
        """Whether weights are received where they belong, rather than unpacked."""
        return self.alone and self.flat.formats.parameters is None

    def name(self, what: str) -> str:
        """Return the name of a value that belongs to the chunk."""
        return f"{self.flat.name}.{what}" if self.alone else f"{self.flat.name}.{what}.{self.number}"

    def of(self, buffer: Tensor) -> Tensor:
        """Return the view [n, d, s] of a flat buffer."""
        return buffer.view(self.flat.intra.size, self.flat.inter.size, -1)[:, :, self.part]

    def collective(
        self, kind: str, level: _Level, reads: str, writes: str, sent: float, run: _Collective, *, ring: bool = True
    ) -> Op:
        """Return a "reduce_scatter" of gradients or an "all_gather" of parameters over one of the group's axes.

        Args:
            sent: bytes from a rank to each of its peers.
        """
        axis, stream = level
        what, phase = ("gradients", Phase.W) if kind == "reduce_scatter" else ("parameters", Phase.F)
        name = f"{what}.{self.flat.name}.{stream}_{kind}"
        tag = tag_of(f"{name} {self.number}")
        return Op(
            name=name, reads=(reads,), writes=(writes,), run=lambda x: run(x, axis, tag), phase=phase, stream=stream,
            cost=Cost(wire_bytes=sent * (axis.size - 1), axis=axis.name, ring=ring),
        )  # fmt: skip


def _chunks(flat: FlatWeights, chunk: int) -> list[_Chunk]:
    """Cut a group into as few chunks as needed, of (almost) equal size; one where nothing overlaps."""
    size, unit = flat.master.numel(), flat.formats.unit
    # Cut where there is something to do while a chunk travels: another link, casts and sums.
    levels, narrow = len(_levels(flat)), flat.formats != Formats()
    count = -(-size // chunk) if levels == 2 or (levels and narrow) else 1
    bounds = [size // unit * index // count * unit for index in range(count)] + [size]
    return [_Chunk(flat, slice(*ends), number, count == 1) for number, ends in enumerate(pairwise(bounds))]


def _whole(flat: FlatWeights) -> _Chunk:
    (chunk,) = _chunks(flat, flat.weights.numel())
    return chunk


def _levels(flat: FlatWeights) -> list[_Level]:
    """Return the axes over which there is something to send, inside of the node first.

    The outer one travels on the inter-node stream also where its ranks happen to be on one host.
    """
    levels = (flat.intra, Stream.INTRA), (flat.inter, Stream.INTER)
    return [(axis, stream) for axis, stream in levels if axis.size > 1]


# --- gradients -------------------------------------------------------------------------------------------------------


def _gradients_of(flat: FlatWeights) -> str:
    return f"{flat.name}.gradients"


def _reduce_job(chunk: _Chunk) -> Job:
    """Reduce float32 [n, d, s] to sums over the node [d, s], then to sums over all ranks [s], each flattened."""
    flat, form, levels = chunk.flat, FORMS[chunk.flat.formats.gradients], _levels(chunk.flat)
    reads, elements = _gradients_of(flat), chunk.total

    def add(received: Any) -> Tensor:
        assert form.total is not None
        sums = form.total(received)
        if chunk.alone:  # what was received lies in the gradient buffer, also where zeros are summed the next time
            flat.clear_padding()
        return sums

    job: Job = []
    hop: list[Op] = []
    if not chunk.alone:
        hop, reads = [_pack(chunk)], chunk.name("packed")
    for level in levels:
        axis, stream = level
        elements //= axis.size
        sums = chunk.name("shard" if level is levels[-1] else "node_sums")
        received = sums if form.total is None else chunk.name(f"{stream}_parts")
        hop.append(
            chunk.collective(
                "reduce_scatter", level, reads, received, form.element * elements, form.start, ring=form.total is None
            )
        )
        job.append(hop)
        hop, reads = [], sums
        if form.total is not None:
            cost = Cost(elements * axis.size, 8 * elements * axis.size)
            hop.append(Op(
                name=f"gradients.{flat.name}.{stream}_sum", reads=(received,), writes=(sums,),
                run=add, phase=Phase.W, cost=cost,
            ))  # fmt: skip
    return [*job, hop] if hop else job


def _pack(chunk: _Chunk) -> Op:
    """Copy the chunk's elements of all shards to one buffer, in the order in which the reduce-scatters cut it."""
    dtype = FORMS[chunk.flat.formats.gradients].packed
    return Op(
        name=f"gradients.{chunk.flat.name}.pack", reads=(_gradients_of(chunk.flat),), writes=(chunk.name("packed"),),
        run=lambda gradients: chunk.of(gradients).to(dtype).flatten(), phase=Phase.W,
        cost=Cost(memory_bytes=(4 + dtype.itemsize) * chunk.total),
    )  # fmt: skip


def _assemble(chunks: Sequence[_Chunk]) -> Op:
    """Make one shard of its chunks."""
    flat = chunks[0].flat
    return Op(
        name=f"gradients.{flat.name}.assemble", reads=tuple(chunk.name("shard") for chunk in chunks),
        writes=(shard_of(flat),), run=lambda *sums: torch.cat(sums), phase=Phase.W,
        cost=Cost(memory_bytes=8 * flat.master.numel()),
    )  # fmt: skip


# --- weights ---------------------------------------------------------------------------------------------------------


def _gather_job(chunk: _Chunk) -> Job:
    """Gather updated weights [s] from the same place in all nodes [d, s], then from all ranks [n, d, s].

    The only chunk of a group is received where it belongs. Several arrive packed and are copied there, while later
    ones travel. What is written in another format is so before the first hop and until after the last.
    """
    flat, levels, form = chunk.flat, _levels(chunk.flat), chunk.flat.formats.parameters
    reads = updated_of(flat)
    sent = chunk.size * flat.weights.itemsize if form is None else form.size(*chunk.matrix)

    def gather_part(updated: Tensor, axis: Axis, tag: int) -> Pending:
        part = updated[chunk.part]
        return all_gather(part if form is None else form.encode(part.view(chunk.matrix)), axis, tag)

    job: Job = []
    for level in reversed(levels):
        axis, stream = level
        run: _Collective = all_gather if job else gather_part
        if chunk.in_place:  # between nodes this rank's row of [n, d * S], inside of the node the other rows
            buffer = flat.weights if stream == Stream.INTRA else flat.weights.chunk(flat.intra.size)[flat.intra.index]
            run = partial(_gather_into, buffer)
        writes = chunk.name("weights" if level is levels[0] else "row")
        job.append([chunk.collective("all_gather", level, reads, writes, sent, run)])
        reads, sent = writes, sent * axis.size
    return job


def _gather_into(buffer: Tensor, _: Tensor, axis: Axis, tag: int) -> Pending:
    return all_gather_in_place(buffer, axis, tag)


def _unpack(chunk: _Chunk) -> Op:
    """Put a chunk of all ranks where it belongs in the weights, this rank's own as the others have it."""
    flat, form = chunk.flat, chunk.flat.formats.parameters

    def run(gathered: Tensor) -> None:
        places = chunk.of(flat.weights)
        if form is None:
            places.copy_(gathered.view(places.shape))
            return
        rows = places.view(-1, chunk.size)
        for message, row in zip(gathered.view(len(rows), -1), rows, strict=True):
            form.decode(message, row.view(chunk.matrix))

    cost = Cost(memory_bytes=2 * chunk.total * flat.weights.itemsize)
    reads = (chunk.name("weights"),)
    return Op(name=f"parameters.{flat.name}.unpack", reads=reads, writes=(), run=run, cost=cost)


def _ready(groups: Sequence[FlatWeights]) -> Op:
    """Wait for what is received in place, which nothing else in the list reads."""
    reads = tuple(f"{flat.name}.weights" for flat in groups)
    return Op(name="parameters.ready", reads=reads, writes=(), run=lambda *_: None)
