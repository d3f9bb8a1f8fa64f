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
from dataclasses import dataclass
from typing import Any

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


def shard_of(flat: FlatWeights) -> str:
    """The name of the summed gradients of this rank's shard, float32 [S]."""
    return f"{flat.name}.shard"


def updated_of(flat: FlatWeights) -> str:
    """The name of the updated weights of this rank's shard, compute dtype [S]: that part of `flat.weights` itself."""
    return f"{flat.name}.updated"


def given(groups: Sequence[FlatWeights]) -> dict[str, Tensor]:
    """What `reduce` reads, by name: the flat gradients; without replicas these are the summed shard already."""
    return {_gradients_of(flat) if _levels(flat) else shard_of(flat): flat.gradients for flat in groups}


def reduce(groups: Sequence[FlatWeights], chunk: int = CHUNK) -> list[Op]:
    """Sum the gradients over the replicas: `given` -> `shard_of` each group. The gradient buffers are only read."""
    jobs = [_reduce_job(part) for flat in groups if _levels(flat) for part in _chunks(flat, chunk)]
    return [*pipelined(jobs), *(_assemble(flat, chunk) for flat in groups if len(_chunks(flat, chunk)) > 1)]


def gather(groups: Sequence[FlatWeights], updates: Mapping[str, Job], chunk: int = CHUNK) -> list[Op]:
    """Fill the `weights` of every rank from the shards.

    Args:
        updates: by name of the group, the hops of its update, the last of which writes `updated_of` it. That comes
            right before the group's first chunk, so that the group before it travels while it runs.
    """
    jobs: list[Job] = []
    for flat in groups:
        first, *rest = [_gather_job(part) for part in _chunks(flat, chunk)]
        *hops, last = updates[flat.name]
        jobs.append([*hops, [*last, *first[0]], *first[1:]])
        jobs += [[*([] for _ in hops), *job] for job in rest]
    in_place = [flat for flat in groups if _levels(flat) and _in_place(_chunks(flat, chunk)[0])]
    return [*pipelined(jobs), ready(in_place)]


def reduce_job(flat: FlatWeights) -> Job:
    """The hops of one group's gradients, uncut; none where nobody else holds its weights."""
    return [job for part in _chunks(flat, flat.weights.numel()) for job in _reduce_job(part)] if _levels(flat) else []


def gather_job(flat: FlatWeights) -> Job:
    """The hops of one group's updated weights, uncut; `arrived` comes behind them."""
    return _travel(_whole(flat)) if _levels(flat) else []


def arrived(flat: FlatWeights) -> Op:
    """What stands between `gather_job` and the first use of the weights."""
    return ready([flat]) if flat.formats.parameters is None else _unpack(_whole(flat))


def updated(groups: Sequence[FlatWeights]) -> dict[str, Tensor]:
    """What `gather_job` reads, by name: this rank's shards of the weights, exact ones where they are yet to be written
    in another format."""
    return {
        updated_of(flat): flat.weights[flat.shard] if flat.formats.parameters is None else flat.master
        for flat in groups
    }


def pipelined(jobs: Sequence[Job]) -> list[Op]:
    """Hop h of job j at time j + h, later jobs first: a chunk's second hop starts behind the next one's first."""
    times: dict[int, list[Op]] = {}
    for start, job in enumerate(jobs):
        for hop, ops in enumerate(job):
            times.setdefault(start + hop, [])[:0] = ops
    return [op for time in sorted(times) for op in times[time]]


# --- chunks and levels -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Elements start .. stop of every rank's shard of a group; `alone` if that is all of them."""

    flat: FlatWeights
    start: int
    stop: int
    index: int
    alone: bool

    @property
    def part(self) -> slice:
        """Its place in a shard."""
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        """Elements of one rank, s."""
        return self.stop - self.start

    @property
    def total(self) -> int:
        """Elements of all ranks, n * d * s."""
        return self.size * self.flat.intra.size * self.flat.inter.size

    @property
    def matrix(self) -> tuple[int, int]:
        """A rank's part as rows that share a scale."""
        unit = self.flat.formats.unit
        return self.size // unit, unit

    def name(self, what: str) -> str:
        """The name of a value that belongs to the chunk."""
        return f"{self.flat.name}.{what}" if self.alone else f"{self.flat.name}.{what}.{self.index}"

    def of(self, buffer: Tensor) -> Tensor:
        """The view [n, d, s] of a flat buffer."""
        return buffer.view(self.flat.intra.size, self.flat.inter.size, -1)[:, :, self.part]


def _chunks(flat: FlatWeights, chunk: int) -> list[_Chunk]:
    """As few as needed, of (almost) equal size; one where nothing overlaps."""
    size, unit = flat.master.numel(), flat.formats.unit
    # Cut where there is something to do while a chunk travels: another link, casts and sums.
    levels, narrow = len(_levels(flat)), flat.formats != Formats()
    count = -(-size // chunk) if levels == 2 or (levels and narrow) else 1
    bounds = [size // unit * index // count * unit for index in range(count)] + [size]
    return [_Chunk(flat, bounds[i], bounds[i + 1], i, count == 1) for i in range(count)]


def _whole(flat: FlatWeights) -> _Chunk:
    (part,) = _chunks(flat, flat.weights.numel())
    return part


@dataclass(frozen=True)
class _Level:
    """One of a group's two axes. The outer one is `inter` also where its ranks happen to be on one host."""

    axis: Axis
    word: str
    stream: Stream

    def op(
        self, kind: str, chunk: _Chunk, reads: str, writes: str, sent: float, phase: Phase,
        collective: Callable[[Tensor, Axis, int], Pending], *, ring: bool = True,
    ) -> Op:  # fmt: skip
        """A collective over the axis in which a rank sends `sent` bytes to each of its peers."""
        prefix = "gradients" if phase == Phase.W else "parameters"
        name, axis = f"{prefix}.{chunk.flat.name}.{self.word}_{kind}", self.axis
        tag = tag_of(f"{name} {chunk.index}")
        return Op(
            name=name, reads=(reads,), writes=(writes,), run=lambda x: collective(x, axis, tag), phase=phase,
            stream=self.stream,
            cost=Cost(wire_bytes=sent * (axis.size - 1), axis=axis.name, ring=ring),
        )  # fmt: skip


def _levels(flat: FlatWeights) -> list[_Level]:
    """The axes over which there is something to send, inside of the node first."""
    levels = _Level(flat.intra, "intra", Stream.INTRA), _Level(flat.inter, "inter", Stream.INTER)
    return [level for level in levels if level.axis.size > 1]


# --- gradients -------------------------------------------------------------------------------------------------------


def _gradients_of(flat: FlatWeights) -> str:
    return f"{flat.name}.gradients"


def _reduce_job(chunk: _Chunk) -> Job:
    """float32 [n, d, s] -> sums over the node [d, s] -> sums over all [s], each flattened."""
    levels, form = _levels(chunk.flat), FORMS[chunk.flat.formats.gradients]
    packing = [] if chunk.alone else [_pack(chunk)]
    reads = packing[0].writes[0] if packing else _gradients_of(chunk.flat)
    job: Job = []
    following: list[Op] = []
    elements = chunk.total
    for level in levels:
        elements //= level.axis.size
        writes = chunk.name("shard" if level is levels[-1] else "node_sums")
        comes = writes if form.total is None else chunk.name(f"{level.word}_parts")
        op = level.op(
            "reduce_scatter", chunk, reads, comes, form.element * elements, Phase.W, form.start, ring=form.total is None
        )
        job.append([*following, op])
        following = [] if form.total is None else [_total(chunk, level, form.total, comes, writes, elements)]
        reads = writes
    return [[*packing, *job[0]], *job[1:], *([following] if following else [])]


def _total(
    chunk: _Chunk, level: _Level, total: Callable[[Any], Tensor], comes: str, writes: str, elements: int
) -> Op:
    """The sum of what came. What came of a whole group came into its gradient buffer, between the gradients too, which
    must be zero again when they are summed the next time."""
    flat = chunk.flat

    def run(parts: Any) -> Tensor:
        sums = total(parts)
        if chunk.alone:
            flat.clear_padding()
        return sums

    return Op(
        name=f"gradients.{flat.name}.{level.word}_sum", reads=(comes,), writes=(writes,), run=run, phase=Phase.W,
        cost=Cost(elements * level.axis.size, 8 * elements * level.axis.size),
    )  # fmt: skip


def _pack(chunk: _Chunk) -> Op:
    """The chunk's elements of all shards in one piece, in the order in which the reduce-scatters cut it."""
    dtype = FORMS[chunk.flat.formats.gradients].packed
    return Op(
        name=f"gradients.{chunk.flat.name}.pack", reads=(_gradients_of(chunk.flat),), writes=(chunk.name("packed"),),
        run=lambda gradients: chunk.of(gradients).to(dtype).flatten(), phase=Phase.W,
        cost=Cost(memory_bytes=(4 + dtype.itemsize) * chunk.total),
    )  # fmt: skip


def _assemble(flat: FlatWeights, chunk: int) -> Op:
    """One shard of its chunks."""
    parts = _chunks(flat, chunk)
    return Op(
        name=f"gradients.{flat.name}.assemble", reads=tuple(part.name("shard") for part in parts),
        writes=(shard_of(flat),), run=lambda *sums: torch.cat(sums), phase=Phase.W,
        cost=Cost(memory_bytes=8 * sum(part.size for part in parts)),
    )  # fmt: skip


# --- weights ---------------------------------------------------------------------------------------------------------


def _gather_job(chunk: _Chunk) -> Job:
    """All that a chunk's updated weights need to be in `weights`."""
    if not _levels(chunk.flat):
        return [[]]
    return _travel(chunk) if _in_place(chunk) else [*_travel(chunk), [_unpack(chunk)]]


def _in_place(chunk: _Chunk) -> bool:
    """Whether weights are received where they belong, rather than unpacked."""
    return chunk.alone and chunk.flat.formats.parameters is None


def _travel(chunk: _Chunk) -> Job:
    """Updated weights [s] -> those of the same place in all nodes [d, s] -> of all ranks [n, d, s], in `weights`.

    The only chunk of a group is received where it belongs. Several arrive packed and are copied there, while later
    ones travel. What is written in another format is so before the first hop and until after the last.
    """
    flat, levels, form = chunk.flat, _levels(chunk.flat), chunk.flat.formats.parameters
    reads = updated_of(flat)
    sent = chunk.size * flat.weights.itemsize if form is None else form.size(*chunk.matrix)
    job: Job = []
    for level in reversed(levels):
        writes = chunk.name("weights" if level is levels[0] else "row")
        collective = _into_weights(flat, level) if _in_place(chunk) else _of_part(chunk) if not job else all_gather
        job.append([level.op("all_gather", chunk, reads, writes, sent, Phase.F, collective)])
        reads, sent = writes, sent * level.axis.size
    return job


def _into_weights(flat: FlatWeights, level: _Level) -> Callable[[Tensor, Axis, int], Pending]:
    """Receive into the weights: between nodes this rank's row of [n, d * S], inside of the node the other rows."""
    rows = flat.weights.view(flat.intra.size, -1)
    buffer = flat.weights if level.word == "intra" else rows[flat.intra.index]
    return lambda _, axis, tag: all_gather_in_place(buffer, axis, tag)


def _of_part(chunk: _Chunk) -> Callable[[Tensor, Axis, int], Pending]:
    form = chunk.flat.formats.parameters

    def run(updated: Tensor, axis: Axis, tag: int) -> Pending:
        part = updated[chunk.part]
        return all_gather(part if form is None else form.encode(part.view(chunk.matrix)), axis, tag)

    return run


def _unpack(chunk: _Chunk) -> Op:
    """Put a chunk of all ranks where it belongs in the weights, this rank's own as the others have it."""
    flat, form = chunk.flat, chunk.flat.formats.parameters
    n, d = flat.intra.size, flat.inter.size

    def run(gathered: Tensor) -> None:
        places = chunk.of(flat.weights)
        if form is None:
            places.copy_(gathered.view(n, d, chunk.size))
            return
        for message, row in zip(gathered.view(n * d, -1), (row for rows in places for row in rows), strict=True):
            form.decode(message, row.view(chunk.matrix))

    cost = Cost(memory_bytes=2 * chunk.total * flat.weights.itemsize)
    reads = (chunk.name("weights"),)
    return Op(name=f"parameters.{flat.name}.unpack", reads=reads, writes=(), run=run, cost=cost)


def ready(groups: Sequence[FlatWeights]) -> Op:
    """Waits for what is received in place, which nothing else in the list reads."""
    reads = tuple(f"{flat.name}.weights" for flat in groups)
    return Op(name="parameters.ready", reads=reads, writes=(), run=lambda *_: None)
