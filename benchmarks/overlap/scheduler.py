"""How long the list scheduler takes for a stage of the paper's models, and what its order is worth against others.

    python benchmarks/overlap/scheduler.py

No ranks, no GPU: the lists of the first rank of an 8-GPU node, priced with an H800's rates (four fifths of the link
and of the memory, 600 TFLOP/s in a product). The step times are simulated with these, not measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megascale_moe.comm.axis import axes_of
from megascale_moe.config import OverlapConfig, ParallelConfig
from megascale_moe.engine.cost import Rates
from megascale_moe.engine.op import Op, Stream
from megascale_moe.engine.order import best_order, makespan, paper_order, simulate
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.presets import PRESETS
from megascale_moe.strategies.fit import mesh_of

H800 = Rates(flops=600e12, memory=2.7e12, links={Stream.INTRA: 160e9, Stream.INTER: 40e9}, latency=1e-5)
CASES = (("internal-352b", 15), ("qwen3-30b-a3b", 4), ("deepseek-moe", 2))
NODE = 8


def stage_plan(name: str, pp: int, overlap: OverlapConfig) -> StepPlan:
    """Rank 0 of a model in `pp` stages, with enough micro-batches for pairs."""
    parallel, model = ParallelConfig(pp=pp, dp=1, node=NODE), PRESETS[name]
    axes = axes_of(mesh_of(parallel, model, pp * NODE), 0)
    return StepPlan(
        model, parallel, axes, torch.bfloat16, 1, 2 * pp + 1, overlap=overlap, device=torch.device("meta"),
        profile=Profile(H800),
    )  # fmt: skip


def milliseconds(lists: Sequence[Sequence[Op]]) -> float:
    """Simulated, one list after the other."""
    return sum(makespan(simulate(ops, H800.seconds)) for ops in lists) * 1e3


def row(name: str, pp: int, split: str) -> str:
    """A line of the table."""
    overlap = OverlapConfig(split=split, remat="paper")
    (stage,) = stage_plan(name, pp, overlap).stages.values()
    lists = [list(stage.forward), list(stage.backward)]
    start = time.perf_counter()
    found = [best_order(ops, H800.seconds) for ops in lists]
    took = time.perf_counter() - start
    pairs = stage_plan(name, pp, replace(overlap, order="scheduled", micro_batches=2))
    _ = pairs.stages  # without their own orders, which were timed above
    start = time.perf_counter()
    _ = pairs.ops
    paired = time.perf_counter() - start
    times = (milliseconds(lists), milliseconds([paper_order(ops) for ops in lists]), milliseconds(found))
    layers = len(pairs.parts[0].layers)
    count = sum(map(len, lists))
    return (
        f"| {name}, {layers} layers | {split} | {count} | {took:.2f} | {paired:.2f} | "
        + " | ".join(f"{x:.1f}" for x in times) + " |"
    )  # fmt: skip


def main() -> None:
    """Print the table."""
    heads = ("stage", "split", "operators", "scheduled in s", "list of a step in pairs, s", "serial ms", "paper ms",
             "scheduled ms")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name, pp in CASES:
        for split in ("none", "2", "8"):
            print(row(name, pp, split), flush=True)


if __name__ == "__main__":
    main()
