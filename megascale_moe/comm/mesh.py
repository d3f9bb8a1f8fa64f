"""Which rank sits where. Pure arithmetic: the planner lays out 12,288 ranks with it and opens no process group.

Ranks form a mesh pp x dp x node, the last fastest: the ranks of a node are consecutive and share a fast link.
Attention and FFN each fold the same ranks their own way, so an axis is a rule from a rank to its peers:

    node          sequence- or tensor-parallel attention, vocabulary-parallel embedding and head
    ffn           ranks that share one set of all experts: ep x etp consecutive ranks, one node or several
    etp           expert tensor parallelism: consecutive ranks of `ffn`, each with a slice of every expert's width
    ep            expert parallelism: the same place in each etp group of `ffn`
    expert_data   ranks of a stage that hold the same part of the same experts
    tensor_data   the same place in every node of a stage: they hold the same tensor-parallel parts
    data          all ranks of a stage: they hold the same replicated parameters
    tied          as tensor_data, over the first and the last stage: they share a tied embedding
    pp            the same place in every stage
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megascale_moe.config import ModelConfig, ParallelConfig, require

AXES = ("node", "ffn", "etp", "ep", "expert_data", "tensor_data", "data", "tied", "pp", "world")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes; see the module's text for their meaning."""

    pp: int = 1
    dp: int = 1
    node: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.node

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.node

    @property
    def ffn(self) -> int:
        """Ranks that share one set of all experts."""
        return self.ep * self.etp

    def ranks(self, axis: str, rank: int) -> tuple[int, ...]:
        """Ranks that share `axis` with `rank`, ascending.

        Raises:
            KeyError: no such axis.
        """
        return tuple(member for part in self.parts(axis, rank) for member in part)

    def place(self, axis: str, rank: int) -> tuple[int, int]:
        """(ranks on the axis, where among them `rank` is), without listing them: an axis may have ten thousand."""
        parts = self.parts(axis, rank)
        before = 0
        for part in parts:
            if rank in part:
                return sum(map(len, parts)), before + part.index(rank)
            before += len(part)
        raise AssertionError(f"rank {rank} is not on its own axis {axis}")

    def parts(self, axis: str, rank: int) -> list[range]:
        """The ranks of an axis as ranges, ascending."""
        first = rank // self.stage * self.stage  # of the rank's stage
        place = rank - first
        node, ffn, etp = (place // size * size for size in (self.node, self.ffn, self.etp))
        last = self.world - self.stage
        tied = sorted({0, last}) if first in (0, last) else []  # stages between have no embedding
        same_place = [range(start + place % self.node, start + self.stage, self.node) for start in (first, *tied)]
        return {
            "node": [range(first + node, first + node + self.node)],
            "ffn": [range(first + ffn, first + ffn + self.ffn)],
            "etp": [range(first + etp, first + etp + self.etp)],
            "ep": [range(first + ffn + place % self.etp, first + ffn + self.ffn, self.etp)],
            "expert_data": [range(first + place % self.ffn, first + self.stage, self.ffn)],
            "tensor_data": same_place[:1],
            "data": [range(first, first + self.stage)],
            "tied": same_place[1:] or [range(rank, rank + 1)],
            "pp": [range(place, self.world, self.stage)],
            "world": [range(self.world)],
        }[axis]

    def stage_of(self, rank: int) -> int:
        """The pipeline rank of a rank."""
        return rank // self.stage

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """All groups of an axis; together they hold every rank once."""
        found, seen = [], set[int]()
        for rank in range(self.world):
            if rank not in seen:
                found.append(self.ranks(axis, rank))
                seen.update(found[-1])
        return found


def mesh_of(parallel: ParallelConfig, model: ModelConfig, world: int) -> Mesh:
    """Work out the sizes left at 0 and refuse what does not fit.

    Raises:
        ConfigError: sizes that do not multiply up to `world` ranks or do not divide the model.
    """
    p, pp = parallel, parallel.pp
    require(world % pp == 0, f"parallel.pp = {pp} does not divide the {world} ranks; use one of {_divisors(world)}")
    stage = world // pp
    asked = p.ep * p.etp if p.ffn != "tp" else 0
    node = p.node or asked or (max(stage // p.dp, 1) if p.dp else stage)
    require(
        stage % node == 0,
        f"parallel.{'node' if p.node else 'ep'} = {node} does not divide the {_stage(stage, pp)}; "
        f"use one of {_divisors(stage)}",
    )
    dp = p.dp or stage // node
    require(
        dp * node == stage,
        f"parallel.dp x parallel.node = {dp} x {node} is not the {_stage(stage, pp, ' that were started')}; "
        f"use dp = {stage // node}",
    )
    mesh = Mesh(pp, dp, node, *_ffn_sizes(p, node, stage))
    _check_attention(mesh, parallel, model)
    _check_ffn(mesh, parallel, model)
    return mesh


def _stage(ranks: int, pp: int, which: str = "") -> str:
    return f"{ranks} ranks{which}" if pp == 1 else f"{ranks} ranks of a pipeline stage"


def _ffn_sizes(p: ParallelConfig, node: int, stage: int) -> tuple[int, int]:
    """(ep, etp) of a layout of the experts, worked out where left open."""
    if p.ffn == "tp":
        require(
            p.dispatch != "all_to_all", "parallel.dispatch = 'all_to_all' with parallel.ffn = 'tp': use 'all_gather'"
        )
        require(p.ep in (0, 1), f"parallel.ep = {p.ep} with parallel.ffn = 'tp': use 1, or ffn = 'ep+tp' for both")
        require(
            p.etp in (1, node),
            f"parallel.etp = {p.etp} with parallel.ffn = 'tp': every rank of a node takes part, use {node}",
        )
        return 1, node
    require(p.ffn == "ep+tp" or p.etp == 1, f"parallel.etp = {p.etp} needs parallel.ffn = 'ep+tp'; with 'ep' use 1")
    ep = p.ep or max(node // p.etp, 1)
    size, name = (ep, "ep") if p.ffn == "ep" else (ep * p.etp, "ep x parallel.etp")
    require(
        size > 0 and size % node == 0 and stage % size == 0,
        f"parallel.{name} = {size}: must be a multiple of parallel.node = {node} that divides the {stage} ranks"
        f"{'' if stage == node else ' of a stage'}; use one of {_multiples(node, stage)}",
    )
    return ep, p.etp


@lru_cache
def _multiples(node: int, stage: int) -> str:
    return ", ".join(str(width) for width in range(node, stage + 1, node) if stage % width == 0)


def _check_attention(mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> None:
    node = mesh.node
    require(
        model.sequence_length % node == 0,
        f"model.sequence_length = {model.sequence_length} is not divisible by parallel.node = {node}",
    )
    _divides("model.heads", model.heads, "parallel.node", node)
    if parallel.vocabulary == "sharded":
        _divides("model.vocab", model.vocab, "parallel.node", node, " (or parallel.vocabulary = 'replicated')")
    if parallel.attention == "tp":
        require(
            node == 1 or model.qk_norm != "full" or model.attention == "mla",
            "parallel.attention = 'tp' cuts between heads, model.qk_norm = 'full' spans them; use attention = 'sp'",
        )
        if model.attention == "gqa":
            _divides("model.kv_heads", model.kv_heads, "parallel.node", node, " (or parallel.attention = 'sp')")


def _check_ffn(mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> None:
    _divides("model.experts", model.experts, "parallel.ep", mesh.ep)
    if mesh.etp > 1:
        name = "parallel.node" if parallel.ffn == "tp" else "parallel.etp"
        _divides("model.ffn_hidden", model.ffn_hidden, name, mesh.etp)
        if parallel.ffn == "tp":
            _divides("the width of the shared experts", model.shared_hidden, name, mesh.etp)
            _divides("model.dense_ffn_hidden", model.dense_ffn_hidden if model.dense_layers else 0, name, mesh.etp)


def _divides(what: str, size: int, axis: str, parts: int, otherwise: str = "") -> None:
    require(
        size % parts == 0,
        f"{what} = {size} is not divisible by {axis} = {parts}; use one of {_divisors(size)}{otherwise}",
    )


@lru_cache  # a search asks for thousands of layouts
def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
