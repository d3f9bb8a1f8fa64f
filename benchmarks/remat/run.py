"""What rematerialization costs and frees: policies side by side on one model, in real training steps.

    sudo .venv/bin/python benchmarks/remat/run.py --write      # all cases
    .venv/bin/python benchmarks/remat/run.py --case one        # one rank; no root needed, nor for --case loopback

Forward and backward of a small model's layers, all policies on the same weights, tokens and balanced routing. Rounds of
all of them are interleaved and each is compared with "none" of its own round, so that whatever else the machine does
falls on all alike. Cases: one rank; two ranks (sp + ep) over loopback, where nothing is hidden; the same two on shaped
links (benchmarks/cluster), in proportion to the ranks as NVLink is to an H800, where the scheduled order hides what is
made again under communication.

Bytes are counted, not sampled: what the values of the executor hold when the forward of a micro-batch ends, by their
storages; and in one more step, which is not timed, every tensor from its birth to its death (`engine.memory.Meter`).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.cluster.cluster import Shape, cluster  # noqa: E402
from benchmarks.cluster.iso import NODES, balance, gemm_rates  # noqa: E402
from benchmarks.cluster.ranks import run_on_cluster  # noqa: E402
from benchmarks.overlap.run import balanced_route  # noqa: E402
from megascale_moe.bench.timed import TimedSteps, over_ranks, random_inputs, run_timed, spread  # noqa: E402
from megascale_moe.comm.axis import connect, single  # noqa: E402
from megascale_moe.config import ModelConfig, OverlapConfig, ParallelConfig  # noqa: E402
from megascale_moe.engine.executor import Observer, Program, resolve  # noqa: E402
from megascale_moe.engine.gradient import Gradient  # noqa: E402
from megascale_moe.engine.memory import Meter, tensors_in  # noqa: E402
from megascale_moe.engine.names import parse  # noqa: E402
from megascale_moe.engine.op import Op, Phase, Stream  # noqa: E402
from megascale_moe.engine.remat import kept_names  # noqa: E402
from megascale_moe.kernels.allocator import keep_freed_memory  # noqa: E402
from megascale_moe.pipeline.program import Profile, StepPlan  # noqa: E402
from megascale_moe.strategies import routing  # noqa: E402
from megascale_moe.strategies.fit import mesh_of  # noqa: E402
from megascale_moe.strategies.weights import initial, placements  # noqa: E402
from megascale_moe.testing import run_ranks  # noqa: E402
from megascale_moe.train.profiling import Profiler  # noqa: E402

MODEL = ModelConfig(
    layers=4, hidden=512, heads=8, kv_heads=4, experts=8, top_k=2, ffn_hidden=1792, vocab=256, sequence_length=1024,
    init_std=0.02, balance_loss=0.01,
)  # fmt: skip
H_FFN = 14336
"""Expert width of the real layer (Mixtral-8x7B, Internal-352B) whose balance the links are given."""
MICROS = 2
PROFILE_RUNS = 3
POLICIES = ("none", "paper", "budget", "full")
CASES = {"one": (1, ("serial",)), "loopback": (2, ("serial",)), "cluster": (2, ("serial", "scheduled"))}
"""Ranks and orders."""


@dataclass(frozen=True)
class Counts:
    """Bytes on one rank.

    Attributes:
        held: what a micro-batch's layers keep when its forward ends. kept: the part of it that a policy decides about.
        between: the most there was between two operators of a step. peak: the most there was at all.
    """

    held: int
    kept: int
    between: int
    peak: int


class Variant:
    """An order and a policy: the list, and what its steps took."""

    def __init__(self, bench: Bench, order: str, remat: str, budget: int) -> None:
        overlap = OverlapConfig(order=order, remat=remat, activation_bytes=budget if remat == "budget" else 0)  # type: ignore[arg-type]
        self.order, self.remat, self.bench, self.budget = order, remat, bench, overlap.activation_bytes
        self.plan = replace(bench.plan, overlap=overlap, profile=bench.profile)
        self.program = self.plan.program()
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.again: list[float] = []
        self.exposed: list[float] = []

    def step(self) -> None:
        """One that counts."""
        timed = self.bench.run(self.program)
        self.seconds.append(timed.seconds)
        self.cpu.append(timed.cpu_s)
        events = timed.trace.events
        made_again = (e.end - e.start for e in events if e.phase == Phase.R and e.stream == Stream.COMPUTE)
        self.again.append(over_ranks(sum(made_again), self.bench.world))
        self.exposed.append(over_ranks(timed.trace.exposed, self.bench.world))

    def count(self) -> Counts:
        """A step that is not timed."""
        held = 0
        last = max(place for place, op in enumerate(self.program.ops) if _of_first_forward(op))
        place = -1

        def observe(op: Op, values: dict[str, Any]) -> None:
            nonlocal held, place
            place += 1
            meter.between()
            if place == last:
                storages = {
                    tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
                    for name in list(values) if name.startswith(("0/layers.", "0/hidden_"))
                    for tensor in tensors_in(resolve(values, name))
                }  # fmt: skip
                held = sum(storages.values())

        with Meter() as meter:
            self.bench.run(self.program, observe)
        return Counts(held, kept_bytes(self.plan), meter.held, meter.peak)

    def row(self, first: Variant, counts: Counts) -> dict[str, Any]:
        """The result; ratios are to `first`, round by round."""
        return {
            "variant": f"{self.order}, {self.remat}", "order": self.order, "remat": self.remat, "unit": "s",
            "median": median(self.seconds), "spread": spread(self.seconds), "all": self.seconds,
            "ratio": ratio(self.seconds, first.seconds), "ratio_spread": ratio_spread(self.seconds, first.seconds),
            "cpu_s": median(self.cpu), "cpu_spread": spread(self.cpu), "cpu_all": self.cpu,
            "cpu_ratio": ratio(self.cpu, first.cpu), "cpu_ratio_spread": ratio_spread(self.cpu, first.cpu),
            "again_s": median(self.again), "exposed_s": median(self.exposed), "activation_bytes": self.budget,
            "bytes": asdict(counts),
        }  # fmt: skip


def _of_first_forward(op: Op) -> bool:
    return op.phase == Phase.F and any(parse(name).micro == 0 and parse(name).layer is not None for name in op.writes)


def kept_bytes(plan: StepPlan) -> int:
    """Bytes of a rank's layers that one micro-batch keeps for its backward, as `budget` counts them."""
    sizes = plan.profile.sizes
    kept = (name for stage in plan.stages.values() for name in kept_names(stage.forward, stage.backward))
    return sum(sizes.get(name, 0) for name in kept if name.startswith("layers."))


class Bench:
    """One rank: weights, tokens and measured times that all variants share."""

    def __init__(self, world: int) -> None:
        self.world = world
        parallel = ParallelConfig(dp=1, node=world, dispatch="all_gather" if world > 1 else "auto")
        axes = connect(mesh_of(parallel, MODEL, world)) if world > 1 else single()
        self.plan = StepPlan(MODEL, parallel, axes, torch.float32, 1, MICROS)
        placed = placements(MODEL, self.plan.layout, self.plan.part)
        self.weights = {name: initial(name, place, MODEL, 0) for name, place in placed.items()}
        self.sinks = {name: Gradient(torch.zeros(value.shape)) for name, value in self.weights.items()}
        self.values = random_inputs(self.plan, 0)
        self.profile = self._profile()

    def _profile(self) -> Profile:
        """Measured on the plain list that keeps everything: the same for all policies."""
        program, profiler = self.plan.program(), Profiler()
        for _ in range(PROFILE_RUNS):
            profiler.runs.append(self.run(program, profiler.observe).trace.events)
        return profiler.profile(self.plan, self.plan.overlap, self.plan.axes["data"])

    def run(self, program: Program, observe: Observer | None = None) -> TimedSteps:
        """Forward and backward of all micro-batches."""
        return run_timed(program, self.values, self.weights, self.sinks, self.world, observe)

    def variants(self, orders: Sequence[str]) -> Iterator[Variant]:
        """Every order with every policy; the budget is halfway between what "none" and "paper" keep."""
        for order in orders:
            none, paper = (Variant(self, order, remat, 0) for remat in ("none", "paper"))
            budget = (kept_bytes(none.plan) + kept_bytes(paper.plan)) // 2
            yield from (none, paper, Variant(self, order, "budget", budget), Variant(self, order, "full", 0))


def on_rank(world: int, orders: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """The rows, the same on every rank but for bytes, which are this rank's."""
    routing.route = balanced_route  # type: ignore[assignment]
    keep_freed_memory()
    torch.set_num_threads(1)
    bench = Bench(world)
    variants = list(bench.variants(orders))
    counts = [variant.count() for variant in variants]
    for done in range(rounds):
        for place in range(len(variants)):
            variants[(place + done) % len(variants)].step()
        if world == 1 or dist.get_rank() == 0:
            print(f"  round {done + 1} of {rounds}", file=sys.stderr, flush=True)
    first = {variant.order: variant for variant in variants if variant.remat == "none"}
    return [variant.row(first[variant.order], found) for variant, found in zip(variants, counts, strict=True)]


def _ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [value / one for value, one in zip(values, base, strict=True)]


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds."""
    return median(_ratios(values, base))


def ratio_spread(values: Sequence[float], base: Sequence[float]) -> float:
    """Between the quartiles of the rounds."""
    return spread(_ratios(values, base))


def formulas(world: int) -> dict[str, float]:
    """Bytes of all layers by the paper's two formulas (its section 4.1), FP32."""
    m, k, f = MODEL.heads / MODEL.kv_heads, MODEL.top_k, MODEL.ffn_hidden / MODEL.hidden
    unit = 4 * MODEL.layers * MODEL.sequence_length * MODEL.hidden / world
    return {"everything": (2 * world + 2 * k + 3 * k * f + 12 + 5 / m) * unit, "paper": (2 * k * f + 4 + 2 / m) * unit}


def measure(case: str, rounds: int) -> dict[str, Any]:
    """One case."""
    world, orders = CASES[case]
    found: dict[str, Any] = {"case": case, "ranks": world, "model": asdict(MODEL), "formula_bytes": formulas(world)}
    start = time.monotonic()
    if case == "cluster":
        rates = gemm_rates(world)
        links = balance(NODES["h800"], "fp32", rates, H_FFN / MODEL.ffn_hidden)
        with cluster(Shape(world, world, links.intra, links.inter)) as made:
            found["rows"] = run_on_cluster(made, on_rank, world, orders, rounds, timeout=600.0)[0]
        found |= {"link_bits_per_s": links.intra, "gemm_flops": rates}
    else:
        found["rows"] = run_ranks(world, on_rank, world, orders, rounds, timeout=600.0)[0]
    return found | {"seconds": time.monotonic() - start}


def table(found: dict[str, Any]) -> str:
    """For people."""
    everything, paper = (found["formula_bytes"][name] for name in ("everything", "paper"))
    lines = [
        f"{found['case']}: {found['ranks']} ranks; the paper's formulas: everything {everything / 1e6:.1f} MB, "
        f"paper {paper / 1e6:.1f} MB", "",
        "| | ms | spread | x | spread | CPU ms | x | again ms | exposed ms | held MB | of everything | peak MB |",
        "|---" * 12 + "|",
    ]  # fmt: skip
    for row in found["rows"]:
        held, peak = row["bytes"]["held"], row["bytes"]["peak"]
        lines.append(
            f"| {row['variant']} | {row['median'] * 1e3:.0f} | {row['spread'] * 1e3:.0f} | {row['ratio']:.3f} | "
            f"{row['ratio_spread']:.3f} | {row['cpu_s'] * 1e3:.0f} | {row['cpu_ratio']:.3f} | "
            f"{row['again_s'] * 1e3:.0f} | {row['exposed_s'] * 1e3:.0f} | {held / 1e6:.1f} | "
            f"{held / everything:.0%} | {peak / 1e6:.1f} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="write results.json")
    options = parser.parse_args()
    cases = []
    for case in CASES if options.case == "all" else [options.case]:
        cases.append(measure(case, options.rounds))
        print(f"\n{table(cases[-1])}\n", flush=True)
    if options.write:
        document = {"name": "remat", "machine": machine(), "rounds": options.rounds, "cases": cases}
        (HERE / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
