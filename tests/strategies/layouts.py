"""Layouts as factors of tables of pairs; the model's list run on one of them, compared with the plain modules."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ConfigError, ModelConfig, ParallelConfig
from megascale_moe.engine.executor import Program, resolve
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import backward
from megascale_moe.engine.trace import Trace
from megascale_moe.model.transformer import Transformer
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import INPUTS, auxiliary_names, load_names, local_inputs, model_ops
from megascale_moe.strategies.placement import Placement
from megascale_moe.strategies.stages import Part
from megascale_moe.strategies.weights import placements
from megascale_moe.tools.verify.batch import BatchRows
from megascale_moe.tools.verify.batch import random_rows as random_rows  # for the tests that import it from here
from megascale_moe.tools.verify.reference import drawn
from tests.pairs import Rule

SCALE = 0.01
CPU = torch.device("cpu")

# --- layouts as factors (tests/pairs.py) -----------------------------------------------------------------------------

SIZES: dict[str, tuple[int, int, int, int]] = {
    "one-rank": (1, 1, 1, 1), "dp2": (1, 2, 1, 1), "node2": (1, 1, 1, 2), "node4": (1, 1, 1, 4),
    "dp2-node2": (1, 2, 1, 2), "dp4": (1, 4, 1, 1), "cp2": (1, 1, 2, 1), "cp2-node2": (1, 1, 2, 2),
    "dp2-cp2": (1, 2, 2, 1), "pp2-node2": (2, 1, 1, 2), "pp2-dp2": (2, 2, 1, 1), "pp2-cp2": (2, 1, 2, 1),
}  # fmt: skip
"""Values of the factor "sizes": pp, dp, cp, node."""

EXPERTS: dict[str, tuple[str, str, str]] = {
    "whole": ("ep", "nowhere", "auto"),
    "ep-all_to_all": ("ep", "node", "all_to_all"),
    "ep-all_gather": ("ep", "node", "all_gather"),
    "ep-over-nodes-all_to_all": ("ep", "stage", "all_to_all"),
    "ep-over-nodes-all_gather": ("ep", "stage", "all_gather"),
    "tp": ("tp", "node", "auto"),
    "ep+tp-all_to_all": ("ep+tp", "stage", "all_to_all"),
    "ep+tp-all_gather": ("ep+tp", "stage", "all_gather"),
}
"""Values of the factor "experts": the strategy, over which ranks it goes, and how rows get there."""

LAYOUT: dict[str, tuple[str, ...]] = {
    "sizes": tuple(SIZES),
    "experts": tuple(EXPERTS),
    "attention": ("alone", "sp", "tp", "cp"),
    "vocabulary": ("replicated", "sharded"),
}
"""The factors of a layout; "schedule" may be one more. Attention is "alone" on a node of one rank, or by latents."""


def parallel_of(case: Mapping[str, str]) -> ParallelConfig:
    """The layout of a case."""
    (pp, dp, cp, node), (ffn, where, dispatch) = SIZES[case["sizes"]], EXPERTS[case["experts"]]
    ranks = {"nowhere": 1, "node": node, "stage": dp * cp * node}[where]
    ep, etp = {"ep": (ranks, 1), "tp": (1, ranks), "ep+tp": (max(ranks // 2, 1), 2)}[ffn]
    schedule = case.get("schedule", "1f1b")
    return ParallelConfig(
        pp=pp, dp=dp, cp=cp, node=node, ep=ep, etp=etp, ffn=ffn, dispatch=dispatch,  # type: ignore[arg-type]
        attention=case["attention"].replace("alone", "sp"), vocabulary=case["vocabulary"],  # type: ignore[arg-type]
        schedule=schedule, virtual_stages=2 if schedule == "interleaved" else 1,  # type: ignore[arg-type]
    )  # fmt: skip


def fitted(model: ModelConfig, parallel: ParallelConfig) -> ModelConfig:
    """The model, where it does not fit a layout, as near as it can be: tensor parallelism cuts between key heads, every
    stage has a layer. What does not fit is refused in tests/comm/test_mesh.py.
    """
    if parallel.attention == "tp":
        if model.qk_norm == "full":
            model = replace(model, qk_norm="head")
        if model.attention == "gqa" and model.kv_heads % parallel.node:
            model = replace(model, kv_heads=4)
    return replace(model, layers=max(model.layers, parallel.pp * parallel.virtual_stages))


def node_has_ranks(sizes: str, attention: str) -> bool:
    """Attention is cut where a node has several ranks, or where nodes share sequences and may gather latents."""
    _, _, cp, node = SIZES[sizes]
    return (node == 1) == (attention == "alone") or (cp > 1 and attention == "cp")


def vocabulary_is_cut(sizes: str, vocabulary: str) -> bool:
    """Over a node of several ranks."""
    return vocabulary == "replicated" or SIZES[sizes][3] > 1


def experts_are_cut(sizes: str, experts: str) -> bool:
    """The mesh has such a way of the experts, and it is not another one by name: over nodes there are several, and
    rows go to several ranks.
    """
    (pp, dp, cp, node), (ffn, where, dispatch) = SIZES[sizes], EXPERTS[experts]
    parallel = parallel_of({"sizes": sizes, "experts": experts, "attention": "sp", "vocabulary": "replicated"})
    if (where == "node" and node == 1) or (where == "stage" and ffn == "ep" and dp * cp == 1):
        return False
    if dispatch == "all_to_all" and parallel.ep == 1:
        return False
    try:
        mesh_of(parallel, ModelConfig(), pp * dp * cp * node)
    except ConfigError:
        return False
    return True


RULES: tuple[Rule, ...] = (node_has_ranks, vocabulary_is_cut, experts_are_cut)
"""What is legal among the factors of a layout."""


# --- running them ----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """Loss sums, and gradients of a rank's parts of the weights."""

    loss: float
    auxiliary: float
    gradients: dict[str, Tensor]
    load: dict[str, Tensor] = field(default_factory=dict)
    wire: dict[tuple[str, Any], int] = field(default_factory=dict)
    placements: dict[str, Placement] = field(default_factory=dict)


def reference(config: ModelConfig, batch: BatchRows, seed: int = 0) -> Result:
    """The plain modules on the whole batch."""
    model = drawn(config, seed)
    loss, auxiliary = model.losses(*batch.part(slice(None)))
    ((loss + auxiliary) * SCALE).backward()
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return Result(float(loss.detach()), float(auxiliary.detach()), gradients)


@functools.cache
def wanted_of(config: ModelConfig, rows: int) -> Result:
    """`reference` on that many random rows, worked out once for all tests that compare with it."""
    return reference(config, random_rows(config, rows))


def run_rank(
    config: ModelConfig, batch: BatchRows, mesh: Mesh, dispatch: str, micro: int = 0, seed: int = 0, **strategies: str
) -> Result:
    """`run_model` with random weights from the seed, norms and biases too: a bias of zero may be added twice."""
    return run_model(drawn(config, seed), batch, mesh, dispatch, micro, **strategies)


def run_model(
    model: Transformer, batch: BatchRows, mesh: Mesh, dispatch: str, micro: int = 0,
    device: torch.device = CPU, dtype: torch.dtype = torch.float32, **strategies: str,
) -> Result:  # fmt: skip
    """One rank's share through the list, in micro-batches of `micro` rows; gradients (float32, on the CPU) summed over
    the right axes.
    """
    config = model.config
    axes = connect(mesh) if mesh.world > 1 else single()
    place = mesh.replica(dist.get_rank()) if mesh.world > 1 else 0
    share = len(batch.tokens) // mesh.dp
    micro = micro or share
    layout = Layout(micro, config.sequence_length, axes, dtype, dispatch=dispatch, **strategies)
    ops = model_ops(config, layout)
    names = [*auxiliary_names(config), *load_names(config)]
    program = Program([*ops, *backward(ops)], INPUTS, ["loss", *names])
    placed = placements(config, layout, Part.whole(config))
    weights = {name: placed[name].take(value.detach()).to(device, dtype) for name, value in model.named_parameters()}
    sinks = {name: Gradient(torch.empty_like(value, dtype=torch.float32)) for name, value in weights.items()}
    weights |= {name: value.to(device) for name, value in model.named_buffers()}
    scales = {"loss_scale": SCALE, "auxiliary_scale": torch.tensor(SCALE, device=device)}
    result, trace = Result(0.0, 0.0, {}, placements=placed), Trace()
    for first in range(place * share, (place + 1) * share, micro):
        tokens, targets, segments = batch.part(slice(first, first + micro))
        values = local_inputs(tokens.to(device), targets.to(device), layout, segments, config)
        out = program.run(values | scales, weights, sinks, trace)
        result.loss += float(out["loss"])
        result.auxiliary += sum(float(resolve(out, name)) for name in auxiliary_names(config))
        for name in load_names(config):
            result.load[name] = result.load.get(name, torch.zeros(config.experts)) + out[name].cpu()
    for name, sink in sinks.items():
        result.gradients[name] = sink.value().cpu()
        for axis in placed[name].replicas:
            if axis and axes[axis].size > 1:
                dist.all_reduce(result.gradients[name], group=axes[axis].group)
    result.wire = trace.wire_bytes()
    return result


def relative(value: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((value - wanted).norm() / wanted.norm().clamp(min=1e-12))


def compare(results: list[Result], wanted: Result) -> tuple[float, float, str]:
    """(loss error, worst gradient error, its parameter) of all ranks' results against the reference."""
    loss = abs(sum(r.loss for r in results) - wanted.loss) / abs(wanted.loss)
    if wanted.auxiliary:
        loss = max(loss, abs(sum(r.auxiliary for r in results) - wanted.auxiliary) / wanted.auxiliary)
    worst = (0.0, "")
    for result in results:
        for name, value in result.gradients.items():
            expected = result.placements[name].take(wanted.gradients[name])
            worst = max(worst, (relative(value, expected), name))
    return loss, *worst
