"""`megascale bench overlap`: what parallelism, order and splitting each bring, on the ranks and links at hand.

The ablation of the paper (its section 5) on one's own machine: the Megatron-style layout with nothing hidden, each
module's strategy alone, then the strategies of the paper with an order, and with communication cut into pieces. All do
the same work on the same tokens: forward and backward of the model's layers, without the optimizer. Rounds of all
variants are interleaved, so that whatever else the machine does falls on all of them alike.

Beside each step stands what bounds it, measured as well: its computation alone, which is the same list with what every
communication brought once in its place, and its communication alone, which is the same messages one after the other.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megascale_moe.bench.timed import TimedSteps, barrier, over_ranks, random_inputs, run_timed, spread
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
from megascale_moe.train.profiling import Profiler, needs_profile, plain
from megascale_moe.train.progress import counted_progress

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
    """From the Megatron-style layout to all that there is; each differs from one before it in one thing."""

    def of(attention: str, ffn: str) -> ParallelConfig:
        ep = 0 if ffn == "ep" else 1
        dispatch = parallel.dispatch if ffn == "ep" else "auto"
        return replace(parallel, attention=attention, ffn=ffn, ep=ep, etp=1, dispatch=dispatch)  # type: ignore[arg-type]

    both = of("sp", "ep")
    layouts = [Variant(f"{a}+{f}", of(a, f)) for a, f in (("tp", "tp"), ("sp", "tp"), ("tp", "ep"), ("sp", "ep"))]
    return [
        *layouts,
        Variant("sp+ep, paper order", both, OverlapConfig(order="paper")),
        Variant("sp+ep, scheduled", both, OverlapConfig(order="scheduled")),
        Variant("sp+ep, scheduled, split in 2", both, OverlapConfig(order="scheduled", split="2")),
        Variant("sp+ep, scheduled, split by rank", both, OverlapConfig(order="scheduled", split="by rank")),
        Variant("sp+ep, scheduled, two micro-batches", both, OverlapConfig(order="scheduled", micro_batches=2)),
        Variant("sp+ep, scheduled, two micro-batches, split in 2", both,
                OverlapConfig(order="scheduled", micro_batches=2, split="2")),
    ]  # fmt: skip


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
        self.seconds: list[float] = []
        self.exposed: list[float] = []
        self.communication: list[float] = []
        self.cpu: list[float] = []
        self.computing_alone: list[float] = []
        self.communicating_alone: list[float] = []
        self.wire_bytes = 0

    def fill(self, weights: dict[str, Tensor], seed: int) -> None:
        """Weights, gradients and inputs; variants of one layout share them."""
        self.weights = weights
        self.sinks = {name: Gradient(torch.zeros(value.shape)) for name, value in weights.items()}
        self.values = random_inputs(self.plan, seed)

    def learn(self) -> None:
        """Measure the plain list, for orders and splits that are derived from times."""
        overlap, wire = plain(self.plan.overlap, self.plan.wire)
        serial = replace(self.plan, overlap=overlap, wire=wire)
        program, profiler = serial.program(), Profiler()
        for _ in range(PROFILE_RUNS):
            profiler.runs.append(self._run(program, profiler.observe).trace.events)
        self.plan = replace(self.plan, profile=profiler.profile(serial, self.plan.overlap, self.axes["data"]))

    def prepare(self) -> None:
        """Run the list once, to warm up and to note what its communications were given and what they brought."""
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

    def step(self) -> None:
        """Forward and backward of all micro-batches; then each of the two things it consists of."""
        timed = self._run(self.program)
        trace = timed.trace
        self.cpu.append(timed.cpu_s)
        self.seconds.append(timed.seconds)
        self.exposed.append(over_ranks(trace.exposed, self.world))
        self.communication.append(over_ranks(trace.communication, self.world))
        self.wire_bytes = sum(trace.wire_bytes().values())
        self.computing_alone.append(self._run(self.computing).seconds)
        self.communicating_alone.append(self._communicate())

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
        """The result."""
        tokens = self.plan.rows * self.plan.micros * self.plan.model.sequence_length * self.axes["tensor_data"].size
        middle = median(self.seconds)
        return {
            "variant": self.variant.name, "median": middle, "spread": spread(self.seconds), "unit": "s",
            "tokens_per_s": tokens / middle, "exposed_s": median(self.exposed),
            "cpu_s": median(self.cpu), "communication_s": median(self.communication),
            "wire_bytes": self.wire_bytes, "pieces": self.plan.pieces,
            "computing_alone_s": median(self.computing_alone),
            "communicating_alone_s": median(self.communicating_alone), "all": self.seconds,
            "all_computing_alone": self.computing_alone, "all_communicating_alone": self.communicating_alone,
        }  # fmt: skip


def _brought(known: dict[str, Any], names: tuple[str, ...], *_: Any) -> Any:
    """In place of a communication; what nobody reads is None."""
    results = tuple(known.get(name) for name in names)
    return results[0] if len(results) == 1 else results


def bench_overlap(
    config: Config, world: int, rounds: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    chosen: Callable[[ParallelConfig], Sequence[Variant]] = variants,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run on every rank; the rows of all variants that fit the ranks and the model.

    Args:
        config: the model (its layers), micro-batch, global batch and dtype; parallel gives dp and node.
        chosen: from that, what is compared.
    """
    made: dict[Any, Any] = {}
    runners = list(_runners(config, world, made, chosen))
    for runner in runners:
        if needs_profile(runner.variant.overlap, runner.variant.wire):
            runner.learn()
        runner.prepare()
    for done in range(rounds):
        for place in range(len(runners)):
            runners[(place + done) % len(runners)].step()
        progress("rounds", done + 1, rounds)
    return [runner.row() for runner in runners]


def _runners(
    config: Config, world: int, made: dict[Any, Any], chosen: Callable[[ParallelConfig], Sequence[Variant]]
) -> Sequence[Runner]:
    found: list[Runner] = []
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
                name: initial(name, place, config.model, config.train.seed).to(runner.plan.dtype)
                for name, place in placed.items()
            }
        runner.fill(shared[key], seed=runner.axes["tensor_data"].index)
        found.append(runner)
    return found


def document(config: Config, world: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For --json (interface of `bench`)."""
    machine = {
        "processor": platform.processor() or platform.machine(), "torch": torch.__version__, "ranks": world,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    return {"name": "overlap", "machine": machine, "model": asdict(config.model), "rows": rows}


def bench(config: Config, nproc: int | None, rounds: int, *, as_json: bool) -> int:
    """The command: on forked ranks, or as one rank under a launcher; prints on the first. The exit status."""
    if under_launcher():
        job = join(config, mesh_of(config.parallel, config.model, number("WORLD_SIZE", 1)))
        _bench_rank(config, job.world, rounds, as_json, job.rank)
        return 0
    world = nproc or local_rank_count(config)
    mesh_of(config.parallel, config.model, world)
    if world == 1:
        _bench_rank(config, 1, rounds, as_json, 0)
        return 0
    return fork_ranks(world, lambda rank: _bench_rank(config, world, rounds, as_json, rank))


def _bench_rank(config: Config, world: int, rounds: int, as_json: bool, rank: int) -> None:
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        lead = rank == 0
        progress = stack.enter_context(counted_progress()) if lead else (lambda what, done, total: None)
        rows = bench_overlap(config, world, rounds, progress)
    if not lead:
        return
    if as_json:
        print(json.dumps(document(config, world, rows)), flush=True)
    else:
        Console(highlight=False, width=130).print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For people: ratios are to the first row."""
    heads = ("variant", "ms", "spread", "tokens/s", "x", "exposed ms", "computing alone", "communicating alone")
    found = Table(*heads, box=None, pad_edge=False, header_style="bold")
    found.columns[0].no_wrap = True
    for column in found.columns[1:]:
        column.justify = "right"
    for row in rows:
        numbers = (row["median"] * 1e3, row["spread"] * 1e3, row["tokens_per_s"])
        ratio = f"{rows[0]['median'] / row['median']:.2f}"
        rest = (row["exposed_s"], row["computing_alone_s"], row["communicating_alone_s"])
        found.add_row(
            row["variant"], *(f"{number:,.0f}" for number in numbers), ratio, *(f"{x * 1e3:,.0f}" for x in rest)
        )
    return found
