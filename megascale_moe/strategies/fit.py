"""From a config to a mesh: the sizes left open are worked out, and what does not fit is refused."""

from __future__ import annotations

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig, require
from megascale_moe.config.refusals import divides, divisors
from megascale_moe.strategies import registry


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
    node = p.node or ffn.asked(p) or max(stage // (max(p.dp, 1) * p.cp), 1)
    require(
        stage % node == 0,
        f"parallel.{'node' if p.node else 'ep'} = {node} does not divide the {_stage(stage, pp)}; "
        f"use one of {divisors(stage)}",
    )
    nodes = stage // node
    require(
        nodes % p.cp == 0,
        f"parallel.cp = {p.cp} does not divide the {nodes} nodes of {node} ranks; use one of {divisors(nodes)}",
    )
    dp = p.dp or nodes // p.cp
    words, groups = ("dp x parallel.cp", f"{dp} x {p.cp}") if p.cp > 1 else ("dp", dp)
    require(
        dp * p.cp * node == stage,
        f"parallel.{words} x parallel.node = {groups} x {node} is not the "
        f"{_stage(stage, pp, ' that were started')}; use dp = {nodes // p.cp}",
    )
    mesh = Mesh(pp, dp, node, *ffn.sizes(p, node, stage), cp=p.cp)
    _check_sequences(mesh, model.sequence_length, attention.zigzag)
    for strategy in (attention, vocabulary, ffn):
        strategy.check(mesh, parallel, model)
    return mesh


def _check_sequences(mesh: Mesh, length: int, zigzag: bool) -> None:
    """Refuse sequences that their ranks cannot share equally, and experts whose ranks have parts of two of them."""
    cp, node, sequence = mesh.cp, mesh.node, mesh.sequence
    key, chunks = "parallel.cp x parallel.node" if cp > 1 else "parallel.node", sequence
    if cp > 1 or (zigzag and node > 1):
        key, chunks = f"2 x {key}", 2 * sequence
    divides("model.sequence_length", length, key, chunks)
    require(
        mesh.ffn % sequence == 0 or sequence % mesh.ffn == 0,
        f"parallel.ep x parallel.etp = {mesh.ffn} with parallel.cp x parallel.node = {cp} x {node}: one must be a "
        f"multiple of the other; use an ep x etp of {node} or a multiple of {sequence}",
    )


def _stage(ranks: int, pp: int, which: str = "") -> str:
    return f"{ranks} ranks{which}" if pp == 1 else f"{ranks} ranks of a pipeline stage"
