"""From a config to a mesh: the sizes left open are worked out, and what does not fit is refused."""

from __future__ import annotations

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig, require
from megascale_moe.strategies import registry
from megascale_moe.strategies.refusals import divisors


def mesh_of(parallel: ParallelConfig, model: ModelConfig, world: int) -> Mesh:
    """Work out the sizes left at 0 and refuse what does not fit.

    Raises:
        ConfigError: sizes that do not multiply up to `world` ranks or do not divide the model, or a strategy that does
            not fit them.
    """
    p, pp = parallel, parallel.pp
    attention = registry.named(registry.ATTENTION, p.attention, "parallel.attention")
    ffn = registry.named(registry.FFN, p.ffn, "parallel.ffn")
    vocabulary = registry.named(registry.VOCABULARY, p.vocabulary, "parallel.vocabulary")
    require(world % pp == 0, f"parallel.pp = {pp} does not divide the {world} ranks; use one of {divisors(world)}")
    stage = world // pp
    node = p.node or ffn.asked(p) or (max(stage // p.dp, 1) if p.dp else stage)
    require(
        stage % node == 0,
        f"parallel.{'node' if p.node else 'ep'} = {node} does not divide the {_stage(stage, pp)}; "
        f"use one of {divisors(stage)}",
    )
    dp = p.dp or stage // node
    require(
        dp * node == stage,
        f"parallel.dp x parallel.node = {dp} x {node} is not the {_stage(stage, pp, ' that were started')}; "
        f"use dp = {stage // node}",
    )
    mesh = Mesh(pp, dp, node, *ffn.sizes(p, node, stage))
    require(
        model.sequence_length % node == 0,
        f"model.sequence_length = {model.sequence_length} is not divisible by parallel.node = {node}",
    )
    for strategy in (attention, vocabulary, ffn):
        strategy.check(mesh, parallel, model)
    return mesh


def _stage(ranks: int, pp: int, which: str = "") -> str:
    return f"{ranks} ranks{which}" if pp == 1 else f"{ranks} ranks of a pipeline stage"
