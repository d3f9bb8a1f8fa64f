"""`megascale dryrun`: the training step of one rank of a job of any size, on this machine, without a tensor's storage.

The trainer of that rank is built on the meta device without process groups, and its two lists (the micro-batches
through its stages, the optimizer) go through the executor as they would on the cluster. Nothing is modelled twice:
memory is what the lists make torch allocate, bytes are what the collectives counted, FLOPs what the operators declare.
Routing counts as balanced. What a real job has besides is not in it: the CUDA context, cuBLAS workspaces, NCCL's own
buffers, allocator fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megascale_moe.config import Config, require
from megascale_moe.engine.memory import Meter
from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op
from megascale_moe.engine.trace import Trace
from megascale_moe.model.counts import counts
from megascale_moe.pipeline.batches import check_batches, micro_batch
from megascale_moe.pipeline.checker import Timeline, timeline
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.schedule import Action
from megascale_moe.pipeline.step import action_ops
from megascale_moe.pipeline.storageless import step_inputs_without_storage
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.tools.dryrun.messages import Agreement, check_messages
from megascale_moe.tools.storageless import trainer_without_storage
from megascale_moe.train.trainer import Trainer


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        activations: the most that is alive between two operators. buffers: what the operators at the peak make
            besides (messages, intermediate results). peak: of everything together.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    peak: int


@dataclass(frozen=True)
class Wire:
    """Bytes that one rank sends in a step by one operator of all layers and micro-batches, in `count` messages."""

    op: str
    axis: str
    phase: str
    bytes: int
    count: int


@dataclass(frozen=True)
class DryRun:
    """A step of the job, and of one of its ranks."""

    parameters_total: int
    parameters_active: int
    flops_per_token: float
    tokens_per_step: int
    ranks: int
    mesh: dict[str, int]
    micro_batches: int
    bubble: float
    rank: dict[str, Any]
    agreement: Agreement | None

    def document(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def dry_run(
    config: Config, gpus: int, rank: int, *, all_ranks: bool = True,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> DryRun:
    """Run rank `rank` of `gpus`.

    Args:
        all_ranks: also build the messages of every rank and compare them.
        progress: called with what is being done, and how far.

    Raises:
        ConfigError: the layout does not fit `gpus` ranks or the model, or there is no such rank.
    """
    require(gpus > 0, f"--gpus {gpus}: must be at least 1")
    mesh = mesh_of(config.parallel, config.model, gpus)
    check_batches(config, mesh)
    require(0 <= rank < gpus, f"--rank {rank}: a job of {gpus} ranks has ranks 0 to {gpus - 1}")
    rows = micro_batch(config, mesh)
    micros = config.train.global_batch // mesh.dp // rows
    require(
        config.overlap.remat != "budget" and config.overlap.split != "auto",
        "a dry run measures no times, and overlap.remat = 'budget' and split = 'auto' follow from them; "
        "use remat = 'none', 'paper' or 'full' and split = 'none' or a number",
    )
    require(
        config.wire.activations != "auto",
        "a dry run measures no times, and wire.activations = 'auto' follows from them; use 'fp32', 'bf16' or 'fp8'",
    )
    trainer = trainer_without_storage(config, mesh, rank)
    found = _run(trainer, rows, micros, progress)
    plan = trainer.plan(rows, micros)
    agreement = None
    if all_ranks:
        agreement = check_messages(
            config, mesh, rows, micros, trainer.dtype, lambda done: progress("messages of all ranks", done, gpus)
        )
    size, times = counts(config.model), step_timeline(plan)
    stages = sorted(plan.stages)
    return DryRun(
        size.parameters_total, size.parameters_active, size.flops_per_token,
        config.train.global_batch * config.model.sequence_length, gpus, asdict(mesh), micros, times.bubble,
        {"index": rank, "stage": mesh.stage_of(rank), "stages": stages, "layers": list(plan.part.layers), **found},
        agreement,
    )  # fmt: skip


def _run(
    trainer: Trainer, rows: int, micros: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """One step; what it took."""
    plan, program = trainer.program(rows, micros, "train")
    optimizer, trace, hidden = trainer.optimizer, Trace(), trainer.hides
    rate = trainer.config.train.learning_rate
    done, total = 0, len(program.ops)

    def observe(op: Op, values: dict[str, Any]) -> None:
        nonlocal done
        meter.between()
        done += 1
        if done % 500 == 0 or done == total:
            progress("one step of one rank", done, total)

    meter = Meter()
    with meter:
        values = step_inputs_without_storage(plan)
        if hidden:  # synchronisation and update are in the list
            values |= optimizer.given(rate) | optimizer.updated()
        program.run(values, optimizer.weights | trainer.buffers, optimizer.gradients, trace, observe)
        values.clear()
        held = meter.held
        if not hidden:
            optimizer.step(rate, trace)
    ops = [*program.ops, *(() if hidden else optimizer.ops)]
    return {
        "memory": asdict(_memory(trainer, held, meter.peak)),
        "wire": [asdict(wire) for wire in _wire(ops, trace)],
        "flops": sum(op.cost.flops for op in ops),
    }


def _memory(trainer: Trainer, held: int, peak: int) -> Memory:
    """Return the bytes that stay from step to step, and those that a step adds."""
    stays = trainer.optimizer.held_bytes()
    stays["parameters"] += sum(buffer.nbytes for buffer in trainer.buffers.values())
    return Memory(**stays, activations=held, buffers=peak - held, peak=sum(stays.values()) + peak)


def _wire(ops: list[Op], trace: Trace) -> list[Wire]:
    """Return what was sent, by operator in the order of the list; layers, pieces and micro-batches are added up."""
    totals: dict[tuple[str, str, str], tuple[int, int]] = {}
    for op, event in zip(ops, trace.events, strict=True):
        assert op.name == event.name
        if event.wire_bytes:
            key = (parse(op.name).tensor, op.cost.axis, str(op.phase))
            size, count = totals.get(key, (0, 0))
            totals[key] = (size + event.wire_bytes, count + 1)
    return [Wire(*key, *value) for key, value in totals.items()]


def step_timeline(plan: StepPlan) -> Timeline:
    """The schedule with each action as long as its declared FLOPs: the bubbles that the layout itself makes."""
    flops: dict[tuple[int, str], float] = {}
    for stage, part in enumerate(plan.parts):
        lists = plan.stage(part)
        for phase in ("F", "B", "W", "BW"):
            flops[stage, phase] = sum(op.cost.flops for op in action_ops(lists, phase))

    def cost(action: Action) -> float:
        return flops[action.stage, action.phase]

    return timeline(plan.schedule, plan.parallel.pp, cost)
