"""Runs the model's list on some layout and on the plain modules, and compares."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.comm.axis import connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig
from megascale_moe.engine.executor import Program, resolve
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import backward
from megascale_moe.engine.trace import Trace
from megascale_moe.model.transformer import Transformer, build
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import INPUTS, auxiliary_names, load_names, local_inputs, model_ops
from megascale_moe.strategies.placement import Placement
from megascale_moe.strategies.stages import Part
from megascale_moe.strategies.weights import placements
from megascale_moe.tools.verify.batch import BatchRows
from megascale_moe.tools.verify.batch import random_rows as random_rows  # for the tests that import it from here

SCALE = 0.01
CPU = torch.device("cpu")


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
    model = build(config, seed)
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
    """`run_model` with initial weights from the seed."""
    return run_model(build(config, seed), batch, mesh, dispatch, micro, **strategies)


def run_model(
    model: Transformer, batch: BatchRows, mesh: Mesh, dispatch: str, micro: int = 0,
    device: torch.device = CPU, dtype: torch.dtype = torch.float32, **strategies: str,
) -> Result:  # fmt: skip
    """One rank's share through the list, in micro-batches of `micro` rows; gradients (float32, on the CPU) summed over
    the right axes.
    """
    config = model.config
    axes = connect(mesh) if mesh.world > 1 else single()
    place = dist.get_rank() // mesh.node if mesh.world > 1 else 0
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
