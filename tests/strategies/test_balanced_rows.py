"""Routing without storage: what one rank counts fits what every other counts, and a routing that could be.

Balanced counts were once rounded down per expert, and again per sender: with 160 experts the parts of a message added
up to 380 rows of 382, and plans of DeepSeek-V2 and Kimi-K2 ended in a traceback.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale_moe.comm.axis import axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig
from megascale_moe.kernels.grouped import Groups
from megascale_moe.kernels.rows import row_map
from megascale_moe.strategies.layer import Layer
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import moe_ops
from megascale_moe.strategies.registry import strategies_of
from megascale_moe.strategies.row_maps import PieceRows

# Experts, top-k, tokens of each rank: DeepSeek-V2's and Kimi-K2's ratios, primes, fewer assignments than experts.
ROUTINGS = [(160, 6, 17), (384, 8, 5), (96, 5, 7), (32, 3, 1), (32, 32, 2), (64, 1, 64)]
MESHES = {
    "one rank": Mesh(),
    "ep": Mesh(node=4, ep=4),
    "ep over nodes": Mesh(dp=4, node=2, ep=8),
    "etp": Mesh(node=4, ep=1, etp=4),
    "ep x etp": Mesh(dp=2, node=4, ep=4, etp=2),
}


def model_of(experts: int, top_k: int) -> ModelConfig:
    return ModelConfig(hidden=8, heads=1, kv_heads=1, experts=experts, top_k=top_k, ffn_hidden=8)


def dealt_out(tokens: int, model: ModelConfig) -> Tensor:
    """Assignment i to expert i modulo their number: what routing without storage stands for."""
    return (torch.arange(tokens * model.top_k) % model.experts).view(tokens, model.top_k)


def planned(choice: Tensor, model: ModelConfig, mesh: Mesh, rank: int, dispatch: str, pieces: int) -> tuple[Any, ...]:
    """What a rank's operator `plan` makes of the routing of its group."""
    tokens = len(choice) // mesh.ffn
    layout = Layout(1, tokens * mesh.node, axes_of(mesh, rank), dispatch=dispatch, pieces=pieces)
    layer = Layer(model, layout, strategies_of(layout, model), model.layer_specs[-1])
    (plan,) = [op for op in moe_ops(layer, layer.tokens("ln2_out", model.hidden))[0] if op.name == "plan"]
    found = plan.run(torch.empty(choice.shape, device=choice.device), choice)
    return found if isinstance(found, tuple) else (found,)


def counted(value: Any) -> Any:
    """All that is a number: lists, the lengths of tensors, and how many rows each group has."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, PieceRows):
        return [counted(getattr(value, f.name)) for f in fields(value)]
    if is_dataclass(value):
        own = {f.name: counted(getattr(value, f.name)) for f in fields(value) if f.name not in ("table", "per_token")}
        return own | ({"counts": value.counts} if isinstance(value, Groups) else {})
    return value


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_counts_are_those_of_a_routing_that_could_be(
    mesh: Mesh, dispatch: str, pieces: int, routing: tuple[int, int, int]
) -> None:
    model = model_of(*routing[:2])
    choice = dealt_out(routing[2] * mesh.ffn, model)
    for rank in range(mesh.world):
        real = planned(choice, model, mesh, rank, dispatch, pieces)
        paper = planned(choice.to("meta"), model, mesh, rank, dispatch, pieces)
        assert [counted(value) for value in paper] == [counted(value) for value in real]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_what_a_rank_sends_is_what_the_other_receives(routing: tuple[int, int, int]) -> None:
    model, mesh = model_of(*routing[:2]), MESHES["ep x etp"]
    choice = torch.empty(routing[2] * mesh.ffn, model.top_k, dtype=torch.int64, device="meta")
    found = [planned(choice, model, mesh, rank, "all_to_all", 1)[1] for rank in range(mesh.world)]
    for rank, rows in enumerate(found):
        assert sum(rows.sent) == routing[2] * model.top_k
        assert sum(rows.share) == len(rows.experts.source) == sum(rows.experts.counts)
        assert rows.share[mesh.place("etp", rank)[1]] == sum(rows.received)
        peers = mesh.ranks("ep", rank)
        place = peers.index(rank)
        assert rows.received == [found[peer].sent[place] for peer in peers]
    ranks = [found[rank] for rank in mesh.ranks("ffn", 0) if mesh.place("etp", rank)[1] == 0]
    assert sum(len(rows.experts.source) for rows in ranks) == len(choice) * model.top_k


@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_differ_by_one_row_at_most(routing: tuple[int, int, int]) -> None:
    experts, top_k, tokens = routing
    choice = torch.empty(tokens * 8, top_k, dtype=torch.int64, device="meta")
    counts = row_map(choice, 0, experts, of=experts, senders=range(8)).counts
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == tokens * 8 * top_k
