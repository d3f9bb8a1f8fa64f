"""An optimizer on its own in some layout: the weights of a small model where the layout has them, made-up gradients.

Gradients are whole numbers, so that their sums over ranks are exact in any order: what a layout does to an update shows
in the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig, TrainConfig, WireConfig
from megascale_moe.engine.executor import Program
from megascale_moe.engine.trace import Trace
from megascale_moe.model.counts import parameter_shapes
from megascale_moe.optim.groups import flat_groups
from megascale_moe.optim.registry import rule_of
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.placement import Placement
from megascale_moe.strategies.stages import parts_of_rank, stage_parts, together
from megascale_moe.strategies.weights import placements
from megascale_moe.testing import run_ranks
from tests.optim.test_sharded import declared

MODEL = ModelConfig(
    layers=2, hidden=16, heads=8, kv_heads=4, experts=8, top_k=2, ffn_hidden=8, vocab=24, sequence_length=8,
    shared_experts=1, dense_layers=1, dense_ffn_hidden=12,
)  # fmt: skip
TP: dict[str, Any] = {"attention": "tp", "ffn": "tp", "vocabulary": "sharded"}
LAYOUTS = {
    "one rank": ParallelConfig(dp=1, node=1),
    "dp": ParallelConfig(dp=4, node=1),
    "ep": ParallelConfig(node=4, ep=4),
    "two nodes": ParallelConfig(dp=2, node=2, ep=2),
    "ep over two nodes": ParallelConfig(dp=2, node=2, ep=4),
    "tp": ParallelConfig(node=4, **TP),
    "tp in two nodes": ParallelConfig(dp=2, node=2, **TP),
    "tp attention": ParallelConfig(dp=2, node=2, ep=2, attention="tp"),
    "ep+tp": ParallelConfig(node=4, ffn="ep+tp", ep=2, etp=2),
    "ep+tp in two nodes": ParallelConfig(dp=2, node=2, ffn="ep+tp", ep=1, etp=2, attention="tp"),
    "pp": ParallelConfig(pp=2, node=2, ep=2),
}
CHUNK = 40
"""Elements of a shard that travel together: several chunks where there are two levels."""
RATE = 0.01
Weights = dict[str, Tensor]


def initial(name: str, model: ModelConfig = MODEL) -> Tensor:
    """Weights of size one, a function of the name alone."""
    return torch.randn(parameter_shapes(model)[name], generator=torch.Generator().manual_seed(sum(name.encode())))


def gradient(name: str, step: int, part: int, model: ModelConfig = MODEL) -> Tensor:
    """What the `part`-th of the ranks with the same weight adds, from -3 to 3: exact in any format that travels."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()) + 10 * part)
    return torch.randint(-3, 4, parameter_shapes(model)[name], generator=generator).float()


def summed(name: str, step: int, replicas: int, model: ModelConfig = MODEL) -> Tensor:
    """The gradient of the global batch, where so many ranks have the weight."""
    return torch.stack([gradient(name, step, part, model) for part in range(replicas)]).sum(0)


@dataclass
class Updated:
    """What a rank ends with.

    Attributes:
        weights: its parts, by name. sent, declared: bytes of the last step by operator, counted and as the list says.
        held: bytes that stay. replicas: how many ranks have a weight.
    """

    weights: Weights
    norms: list[float]
    placed: dict[str, Placement]
    sent: dict[str, int]
    declared: dict[str, float]
    held: dict[str, int]
    replicas: dict[str, int] = field(default_factory=dict)


def peers_of(placement: Placement, mesh: Mesh, rank: int) -> list[int]:
    """Ranks that hold the same part of a weight."""
    intra, inter = placement.replicas
    near = mesh.ranks(intra, rank) if intra else (rank,)
    return sorted({peer for member in near for peer in mesh.ranks(inter, member)})


def updated(
    parallel: ParallelConfig, train: TrainConfig, steps: int, wire: WireConfig | None = None, *, hidden: bool = False,
    model: ModelConfig = MODEL,
) -> Updated:
    """Some updates on this rank of a layout.

    Args:
        hidden: by the list of a step with synchronisation inside, by layers.
    """
    world = max(parallel.pp, 1) * max(parallel.dp, 1) * max(parallel.node, 1)
    mesh = mesh_of(parallel, model, world)
    axes, rank = (connect(mesh), dist.get_rank()) if world > 1 else (single(), 0)
    layout = Layout.of(parallel, 1, model.sequence_length, axes, torch.float32)
    part = together(parts_of_rank(stage_parts(parallel, model), mesh.pp, axes["pp"].index))
    placed = placements(model, layout, part)
    groups = flat_groups(
        placed, axes, torch.float32, torch.device("cpu"), by_layer=hidden, wire=wire, rule=rule_of(train)
    )
    optimizer = ShardedOptimizer(groups, axes, train, CHUNK)
    for group in groups:
        for slot in group.slots:
            group.set(slot, slot.placement.take(initial(slot.name, model)))
    peers = {name: peers_of(placement, mesh, rank) for name, placement in placed.items()}
    norms = []
    for step in range(steps):
        for name, sink in optimizer.gradients.items():
            sink.add(placed[name].take(gradient(name, step, peers[name].index(rank), model)))
        norms.append(_step(optimizer, trace := Trace(), hidden=hidden))
    ops = optimizer.hidden([]) if hidden else optimizer.ops
    if hidden:
        optimizer.settle()
    sent = {name: count for (name, _), count in trace.wire_bytes().items() if count}
    weights = {name: weight.clone() for name, weight in optimizer.weights.items()}
    replicas = {name: len(ranks) for name, ranks in peers.items()}
    return Updated(weights, norms, placed, sent, declared(ops), optimizer.held_bytes(), replicas)


def _step(optimizer: ShardedOptimizer, trace: Trace, *, hidden: bool) -> float:
    if not hidden:
        return optimizer.step(RATE, trace)
    given = optimizer.given(RATE) | optimizer.updated()
    program = Program(optimizer.hidden([]), given, ["norm"])
    return optimizer.end(program.run(given, {}, optimizer.gradients, trace=trace)["norm"])


def on_ranks(parallel: ParallelConfig, *args: Any, **options: Any) -> list[Updated]:
    """`updated` on all ranks of a layout."""
    world = max(parallel.pp, 1) * max(parallel.dp, 1) * max(parallel.node, 1)
    if world == 1:
        return [updated(parallel, *args, **options)]
    return run_ranks(world, _call, parallel, args, options)


def _call(parallel: ParallelConfig, args: tuple[Any, ...], options: dict[str, Any]) -> Updated:
    return updated(parallel, *args, **options)
