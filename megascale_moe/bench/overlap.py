"""`megascale bench overlap`: what parallelism, order and splitting each bring, on the ranks and links at hand.

The ablation of the paper (its section 5) on one's own machine: the Megatron-style layout with nothing hidden, each
module's strategy alone, then the strategies of the paper with an order, and with communication cut into pieces. All do
the same work on the same tokens: forward and backward of the model's layers, without the optimizer. Rounds of all
variants are interleaved, so that whatever else the machine does falls on all of them alike.

Beside each step stands what bounds it, measured as well: its computation alone, which is the same list with what every
communication brought once in its place, and its communication alone, which is the same messages one after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megascale_moe.bench.timed import TimedSteps, barrier, machine, over_ranks, random_inputs, run_timed, spread
from megascale_moe.comm.axis import connect, single
from megascale_moe.comm.collectives import Pending
from megascale_moe.comm.local_ranks import fork_ranks
from megascale_moe.config import Config, ConfigError, OverlapConfig, ParallelConfig, WireConfig
from megascale_moe.engine.executor import Observer, Program
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Op, Stream
from megascale_moe.engine.trace import now
from megascale_moe.kernels.allocator import keep_freed_memory
from megascale_moe.pipeline.batches import DTYPES
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.weights import initial, placements
from megascale_moe.train.job import join, local_rank_count, number, under_launcher
from megascale_moe.train.output import print_json, table
from megascale_moe.train.profiling import Profiler, needs_profile, plain
from megascale_moe.train.progress import Update, counted_progress, silent

PROFILE_RUNS = 4
SERIAL = OverlapConfig()
AS_COMPUTED = WireConfig()


@dataclass(frozen=True)
class Variant:
    """A layout, how its communication is hidden and how it is written."""

    name: str
    parallel: ParallelConfig
    overlap: OverlapConfig = SERIAL
    wire: WireConfig = AS_COMPUTED


def variants(parallel: ParallelConfig) -> list[Variant]:
    """Return all from the Megatron-style layout on; each differs from one before it in one thing."""

    def of(attention: str, ffn: str) -> ParallelConfig:
        ep = 0 if ffn == "ep" else 1
        dispatch = parallel.dispatch if ffn == "ep" else "auto"
        return replace(parallel, attention=attention, ffn=ffn, ep=ep, etp=1, dispatch=dispatch)  # type: ignore[arg-type]

    scheduled = OverlapConfig(order="scheduled")
    together = replace(scheduled, micro_batches=2)
    overlaps = {
        "paper order": OverlapConfig(order="paper"),
        "scheduled": scheduled,
        "scheduled, split in 2": replace(scheduled, split="2"),
        "scheduled, split by rank": replace(scheduled, split="by rank"),
        "scheduled, two micro-batches": together,
        "scheduled, two micro-batches, split in 2": replace(together, split="2"),
    }
    layouts = [Variant(f"{a}+{f}", of(a, f)) for a, f in (("tp", "tp"), ("sp", "tp"), ("tp", "ep"), ("sp", "ep"))]
    return layouts + [Variant(f"sp+ep, {name}", of("sp", "ep"), overlap) for name, overlap in overlaps.items()]


class Runner:
    """One variant on one rank: everything a step needs, and what its steps took."""

    def __init__(self, variant: Variant, config: Config, world: int, made: dict[Any, Any]) -> None:
        mesh = mesh_of(variant.parallel, config.model, world)
        self.variant, self.world = variant, world
        self.axes = connect(mesh, made=made) if world > 1 else single()
        overlap = variant.overlap
        if overlap.split == "by rank":
            overlap = replace(overlap, split=str(max(mesh.node, mesh.ffn)))
        rows = config.train.micro_batch or 1
        micros = max(config.train.global_batch // mesh.dp // rows, 1)
        self.plan = StepPlan(
            config.model, variant.parallel, self.axes, DTYPES[config.train.dtype], rows, micros, overlap=overlap,
            wire=variant.wire,
        )  # fmt: skip
        self.measured: dict[str, list[float]] = defaultdict(list)

    def prepare(self, weights: dict[str, Tensor], seed: int) -> None:
        """Take weights, which variants of one layout share; run the list once to warm up.

        That also notes what its communications were given and what they brought.
        """
        self.weights = weights
        self.sinks = {name: Gradient(torch.zeros(value.shape)) for name, value in weights.items()}
        self.values = random_inputs(self.plan, seed)
        if needs_profile(self.variant.overlap, self.variant.wire):
            self._learn()
        self.program = self.plan.program()
        self.messages: list[Callable[[], Any]] = []
        travelling = {name for op in self.plan.ops if op.stream != Stream.COMPUTE for name in op.writes}
        known: dict[str, Any] = {}

        def observe(op: Op, values: dict[str, Any]) -> None:
            given = [values[name] if name else None for name in op.reads]  # arrived by now
            known.update((name, value) for name, value in zip(op.reads, given, strict=True) if name in travelling)
            if op.stream != Stream.COMPUTE:
                self.messages.append(partial(op.run, *given))

        self._run(self.program, observe)
        self.computing = self.plan.program([
            op if op.stream == Stream.COMPUTE else replace(op, run=partial(_brought, known, op.writes))
            for op in self.plan.ops
        ])  # fmt: skip

    def _learn(self) -> None:
        """Measure the plain list, for orders and splits that are derived from times."""
        overlap, wire = plain(self.plan.overlap, self.plan.wire)
        serial = replace(self.plan, overlap=overlap, wire=wire)
        program, profiler = serial.program(), Profiler()
        for _ in range(PROFILE_RUNS):
            profiler.runs.append(self._run(program, profiler.observe).trace.events)
        self.plan = replace(self.plan, profile=profiler.profile(serial, self.plan.overlap, self.axes["data"]))

    def step(self) -> None:
        """Run forward and backward of all micro-batches; then each of the two things they consist of."""
        timed = self._run(self.program)
        trace = timed.trace
        for name, value in (
            ("seconds", timed.seconds), ("cpu_s", timed.cpu_s), ("exposed_s", over_ranks(trace.exposed, self.world)),
            ("communication_s", over_ranks(trace.communication, self.world)),
            ("computing_alone", self._run(self.computing).seconds), ("communicating_alone", self._communicate()),
        ):  # fmt: skip
            self.measured[name].append(value)
        self.wire_bytes = sum(trace.wire_bytes().values())

    def _run(self, program: Program, observe: Observer | None = None) -> TimedSteps:
        return run_timed(program, self.values, self.weights, self.sinks, self.world, observe)

    def _communicate(self) -> float:
        barrier(self.world)
        start = now()
        for message in self.messages:
            pending = message()
            if isinstance(pending, Pending):
                pending.wait()
        return over_ranks(now() - start, self.world)

    def row(self) -> dict[str, Any]:
        """Return the results."""
        shares = self.axes["data"].size // self.axes["sequence"].size
        tokens = self.plan.rows * self.plan.micros * self.plan.model.sequence_length * shares
        medians, seconds = {name: median(values) for name, values in self.measured.items()}, self.measured["seconds"]
        row = {
            "variant": self.variant.name, "median": medians["seconds"], "spread": spread(seconds), "unit": "s",
            "tokens_per_s": tokens / medians["seconds"], "wire_bytes": self.wire_bytes, "pieces": self.plan.pieces,
            "all": seconds,
        }  # fmt: skip
        row |= {name: medians[name] for name in ("exposed_s", "cpu_s", "communication_s")}
        for name in ("computing_alone", "communicating_alone"):
            row |= {f"{name}_s": medians[name], f"all_{name}": self.measured[name]}
        return row


def _brought(known: dict[str, Any], names: tuple[str, ...], *_: Any) -> Any:
    """Stand in for a communication; what nobody reads is None."""
    results = tuple(known.get(name) for name in names)
    return results[0] if len(results) == 1 else results


def bench_overlap(
    config: Config, world: int, rounds: int, progress: Update = silent,
    chosen: Callable[[ParallelConfig], Sequence[Variant]] = variants,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run on every rank and return the rows of all variants that fit the ranks and the model.

    Args:
        config: the model (its layers), micro-batch, global batch and dtype; parallel gives dp and node.
        chosen: from that, what is compared.
    """
    made: dict[Any, Any] = {}
    runners: list[Runner] = []
    shared: dict[tuple[str, str], dict[str, Tensor]] = {}
    mesh = mesh_of(config.parallel, config.model, world)
    for variant in chosen(replace(config.parallel, pp=mesh.pp, dp=mesh.dp, node=mesh.node)):
        try:
            runner = Runner(variant, config, world, made)
        except ConfigError:
            continue  # this layout does not fit the model or the ranks
        key = (variant.parallel.attention, variant.parallel.ffn)
        if key not in shared:
            placed = placements(config.model, runner.plan.layout, runner.plan.part)
            shared[key] = {
                name: initial(name, placement, config.model, config.train.seed).to(runner.plan.dtype)
                for name, placement in placed.items()
            }
        runner.prepare(shared[key], seed=runner.axes["tensor_data"].index // runner.axes["cp"].size)
        runners.append(runner)
    for done in range(rounds):
        for turn in range(len(runners)):
            runners[(turn + done) % len(runners)].step()
        progress("rounds", done + 1, rounds)
    return [runner.row() for runner in runners]


def document(config: Config, world: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the --json document."""
    return {"name": "overlap", "machine": machine(world), "model": asdict(config.model), "rows": rows}


def bench(config: Config, nproc: int | None, rounds: int, *, as_json: bool) -> int:
    """Run on forked ranks, or as one rank under a launcher; the first prints. Return the exit status."""
    launched = under_launcher()
    world = number("WORLD_SIZE", 1) if launched else nproc or local_rank_count(config)
    mesh = mesh_of(config.parallel, config.model, world)

    def measure(rank: int) -> None:
        keep_freed_memory()
        with counted_progress(shown=rank == 0) as progress:
            rows = bench_overlap(config, world, rounds, progress)
        if rank == 0 and as_json:
            print_json(document(config, world, rows))
        elif rank == 0:
            _print(rows)

    if world > 1 and not launched:
        return fork_ranks(world, measure)
    measure(join(config, mesh).rank)
    return 0


def _print(rows: Sequence[dict[str, Any]]) -> None:
    """Print for people: ratios are to the first row."""
    heads = ("variant", "ms", "spread", "tokens/s", "x", "exposed ms", "computing alone", "communicating alone")
    milliseconds = ("median", "spread", "exposed_s", "computing_alone_s", "communicating_alone_s")
    lines = []
    for row in rows:
        took, deviation, *alone = (f"{row[name] * 1e3:,.0f}" for name in milliseconds)
        ratio = f"{rows[0]['median'] / row['median']:.2f}"
        lines.append([row["variant"], took, deviation, f"{row['tokens_per_s']:,.0f}", ratio, *alone])
    Console(highlight=False, width=130).print(table(heads, lines, text=("variant",)))
