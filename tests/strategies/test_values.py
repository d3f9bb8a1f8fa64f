"""Values are what they are declared to be: every tensor of every list that runs, forward and backward, cut or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig
from megascale_moe.engine.executor import Program, resolve
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, backward
from megascale_moe.engine.value import Value
from megascale_moe.kernels.rows import RowMap
from megascale_moe.model.transformer import build
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import INPUTS, local_inputs, model_ops
from megascale_moe.strategies.row_maps import PieceRows
from megascale_moe.strategies.stages import Part
from megascale_moe.strategies.weights import placements
from megascale_moe.testing import run_ranks
from tests.strategies.layouts import random_rows
from tests.strategies.test_layouts import BIASED, LATENT, SMALL

ROUTED = ("routed", "arrived", "own")
NORMED = replace(SMALL, qk_norm="head", head_dim=12, shared_experts=1, shared_gate=True)
FULL = replace(SMALL, qk_norm="full", dense_layers=1, dense_ffn_hidden=32)
LAYOUTS: dict[str, tuple[Mesh, dict[str, Any]]] = {
    "one rank": (Mesh(), {}),
    "sp + all-to-all": (Mesh(node=4, ep=4), {"dispatch": "all_to_all"}),
    "sp + all-to-all in 2": (Mesh(node=4, ep=4), {"dispatch": "all_to_all", "pieces": 2}),
    "sp + all-to-all in 4": (Mesh(node=4, ep=4), {"dispatch": "all_to_all", "pieces": 4}),
    "sp + all-gather in 3": (Mesh(node=4, ep=4), {"dispatch": "all_gather", "pieces": 3}),
    "tp + tp": (Mesh(node=4, etp=4), {"attention": "tp", "ffn": "tp", "vocabulary": "sharded"}),
    "sp + tp in 4": (Mesh(node=4, etp=4), {"ffn": "tp", "pieces": 4}),
    "sp + ep x etp in 2": (Mesh(node=4, ep=2, etp=2), {"ffn": "ep+tp", "dispatch": "all_to_all", "pieces": 2}),
    "cp + all-to-all in 2": (Mesh(node=4, ep=4), {"attention": "cp", "dispatch": "all_to_all", "pieces": 2}),
    "cp over nodes + sp in 2": (Mesh(cp=2, node=2, ep=2), {"pieces": 2}),
    "cp over nodes + tp": (Mesh(cp=2, node=2, ep=4), {"attention": "tp", "vocabulary": "sharded"}),
    "cp over nodes + cp": (Mesh(cp=2, node=2, ep=4), {"attention": "cp"}),
    "two nodes": (Mesh(dp=2, node=2, ep=4), {"dispatch": "all_to_all", "pieces": 3}),
}


def wrong(model: ModelConfig, mesh: Mesh, strategies: dict[str, Any]) -> list[str]:
    """Values of a rank's list that are not as declared, and tensors of layers that nobody declared."""
    axes = connect(mesh) if mesh.world > 1 else single()
    layout = Layout(2, model.sequence_length, axes, torch.float32, **strategies)
    forward = model_ops(model, layout)
    ops = [*forward, *backward(forward)]
    reference = build(model)
    placed = placements(model, layout, Part.whole(model))
    weights = {name: placed[name].take(value.detach()) for name, value in reference.named_parameters()}
    sinks = {name: Gradient(torch.empty_like(value)) for name, value in weights.items()}
    rank = mesh.replica(dist.get_rank()) if mesh.world > 1 else 0
    tokens, targets, segments = random_rows(model, 2 * mesh.dp).part(slice(2 * rank, 2 * rank + 2))
    values = local_inputs(tokens, targets, layout, segments, model)
    values |= {"loss_scale": 0.01, "auxiliary_scale": torch.tensor(0.01)}
    found: list[str] = []

    def look(op: Op, alive: dict[str, Any]) -> None:
        for name in op.writes:
            problem = differs(name, resolve(alive, name))
            if problem:
                found.append(f"{op.phase} {op.name}: {name} {problem}")

    Program(ops, INPUTS).run(values, weights | dict(reference.named_buffers()), sinks, observe=look)
    return found


def differs(name: str, value: object) -> str:
    """How a result is not what its name declares."""
    if not isinstance(value, Tensor):
        return "" if value is None or isinstance(value, RowMap | PieceRows) else f"is a {type(value).__name__}"
    if not isinstance(name, Value):
        return "" if parse(name).term or parse(name).layer is None else "is not declared"
    if value.dtype != name.dtype:
        return f"is {value.dtype}, declared {name.dtype}"
    shape = tuple(name.shape)
    counted = name.shard is not None and name.shard.rows.kind in ROUTED  # as many rows as routing makes
    same = tuple(value.shape[1:]) == shape[1:] if counted else tuple(value.shape) == shape
    return "" if same and value.dim() == len(shape) else f"has shape {tuple(value.shape)}, declared {shape}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "model", [NORMED, FULL, LATENT, BIASED], ids=["norms of heads", "norms over heads", "latents", "biases"]
)
def test_every_tensor_is_as_declared(model: ModelConfig, layout: str) -> None:
    mesh, strategies = LAYOUTS[layout]
    if strategies.get("attention") == "tp" and model.attention == "gqa":
        model = replace(model, kv_heads=4)
    if strategies.get("attention") == "tp" and model.qk_norm == "full":
        strategies = strategies | {"attention": "sp"}  # tensor parallelism cuts between heads
    results = run_ranks(mesh.world, wrong, model, mesh, strategies) if mesh.world > 1 else [wrong(model, mesh, {})]
    assert [problem for problems in results for problem in problems] == []
