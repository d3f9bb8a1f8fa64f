"""Which rank sits where. Pure arithmetic: the planner lays out 12,288 ranks with it and opens no process group.

Ranks form a mesh pp x dp x node, the last fastest: the ranks of a node are consecutive and share a fast link.
Attention and FFN each fold the same ranks their own way, so an axis is a rule from a rank to its peers:

    node          sequence-parallel attention (and later tensor parallelism)
    ep            expert parallelism: consecutive ranks of a stage, one node or several
    expert_data   ranks of a stage that hold the same experts
    data          all ranks of a stage: they hold the same non-expert parameters
    pp            the same place in every stage
"""

from __future__ import annotations

from dataclasses import dataclass

from megascale_moe.config import ModelConfig, ParallelConfig, require

AXES = ("node", "ep", "expert_data", "data", "pp", "world")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes; see the module's text for their meaning."""

    pp: int = 1
    dp: int = 1
    node: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.node

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.node

    def ranks(self, axis: str, rank: int) -> tuple[int, ...]:
        """Ranks that share `axis` with `rank`, ascending.

        Raises:
            KeyError: no such axis.
        """
        first = rank // self.stage * self.stage  # of the rank's stage
        place = rank - first
        members = {
            "node": range(place // self.node * self.node, (place // self.node + 1) * self.node),
            "ep": range(place // self.ep * self.ep, (place // self.ep + 1) * self.ep),
            "expert_data": range(place % self.ep, self.stage, self.ep),
            "data": range(self.stage),
            "pp": range(place - first, self.world - first, self.stage),
            "world": range(-first, self.world - first),
        }[axis]
        return tuple(first + member for member in members)

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """All groups of an axis; together they hold every rank once."""
        return sorted({self.ranks(axis, rank) for rank in range(self.world)})


def mesh_of(parallel: ParallelConfig, model: ModelConfig, world: int) -> Mesh:
    """Work out the sizes left at 0 and refuse what does not fit.

    Raises:
        ConfigError: sizes that do not multiply up to `world` ranks or do not divide the model.
    """
    node = parallel.node or parallel.ep or (max(world // parallel.dp, 1) if parallel.dp else world)
    require(
        world % node == 0,
        f"parallel.{'node' if parallel.node else 'ep'} = {node} does not divide the {world} ranks; "
        f"use one of {_divisors(world)}",
    )
    dp = parallel.dp or world // node
    require(
        dp * node == world, f"parallel.dp x parallel.node = {dp} x {node} is not the {world} ranks that were started"
    )
    ep = parallel.ep or node
    require(
        ep >= 1 and ep % node == 0 and world % ep == 0,
        f"parallel.ep = {ep}: must be a multiple of parallel.node = {node} that divides the {world} ranks",
    )
    mesh = Mesh(pp=1, dp=dp, node=node, ep=ep)
    _check_model(mesh, model)
    return mesh


def _check_model(mesh: Mesh, model: ModelConfig) -> None:
    require(
        model.sequence_length % mesh.node == 0,
        f"model.sequence_length = {model.sequence_length} is not divisible by parallel.node = {mesh.node}",
    )
    require(
        model.heads % mesh.node == 0,
        f"model.heads = {model.heads} is not divisible by parallel.node = {mesh.node}; "
        f"use one of {_divisors(model.heads)}",
    )
    require(
        model.experts % mesh.ep == 0,
        f"model.experts = {model.experts} is not divisible by parallel.ep = {mesh.ep}; "
        f"use one of {_divisors(model.experts)}",
    )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
