"""Steps that are run to be timed: a list on random tokens, all ranks from one barrier to the end of the slowest.

What `bench overlap` and the benchmarks have in common, so that a second of one is a second of the other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.engine.executor import Observer, Program, resolve
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.trace import Trace, now
from megascale_moe.model.segments import Segments
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.step import of_micro
from megascale_moe.strategies.model import local_inputs
from megascale_moe.train.hardware import cpu_model


@dataclass(frozen=True)
class TimedSteps:
    """A step. `seconds` until the last rank was done, `cpu_s`: CPU time of all ranks together."""

    trace: Trace
    seconds: float
    cpu_s: float


def random_inputs(plan: StepPlan, seed: int) -> dict[str, Any]:
    """Return what the list of a plan reads besides weights: random tokens, every row one document."""
    generator = torch.Generator().manual_seed(seed)
    shape = (plan.rows, plan.model.sequence_length)
    values: dict[str, Any] = {"loss_scale": 1e-3, "auxiliary_scale": torch.tensor(1e-3, device=plan.device)}
    for micro in range(plan.micros):
        tokens = torch.randint(0, plan.model.vocab, shape, generator=generator).to(plan.device)
        inputs = local_inputs(tokens, tokens.roll(-1, 1), plan.layout, Segments.whole_rows(*shape), plan.model)
        values |= {of_micro(name, micro): value for name, value in inputs.items()}
    return values


def run_timed(
    program: Program,
    values: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Gradient],
    world: int,
    observe: Observer | None = None,
) -> TimedSteps:
    """Run a list once, until everything that it began has ended."""
    trace = Trace(device=next(iter(weights.values())).device)
    barrier(world)
    start, cpu = now(), time.process_time()
    out = program.run(dict(values), weights, gradients, trace, observe)
    for name in list(out):
        resolve(out, name)
    trace.settle()
    took, used = now() - start, time.process_time() - cpu
    return TimedSteps(trace, over_ranks(took, world), over_ranks(used, world, dist.ReduceOp.SUM))


def barrier(world: int) -> None:
    """Wait for all ranks; one rank has nobody to wait for."""
    if world > 1:
        dist.barrier()


def over_ranks(value: float, world: int, how: Any = dist.ReduceOp.MAX) -> float:
    """Return the largest of all ranks' values, or what `how` says."""
    tensor = torch.tensor(value, dtype=torch.float64)
    if world > 1:
        dist.all_reduce(tensor, op=how)
    return float(tensor)


def spread(values: Sequence[float]) -> float:
    """Return the distance of the quartiles; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4)
    return high - low


def machine(ranks: int) -> dict[str, Any]:
    """Return the "machine" of a --json document."""
    return {
        "processor": cpu_model(), "torch": torch.__version__, "ranks": ranks, "threads": torch.get_num_threads(),
    }  # fmt: skip
