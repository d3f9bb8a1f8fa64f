"""`megascale dryrun`: the training step of one rank of a job of any size, on this machine, without a tensor's storage.

The trainer of that rank is built on the meta device without process groups, and its two lists (the micro-batches
through its stages, the optimizer) go through the executor as they would on the cluster. Nothing is modelled twice:
memory is what the lists make torch allocate, bytes are what the collectives counted, FLOPs what the operators declare.
Routing counts as balanced. What a real job has besides is not in it: the CUDA context, cuBLAS workspaces, NCCL's own
buffers, allocator fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megascale_moe.comm.axis import axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, require
from megascale_moe.engine.memory import Meter
from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op
from megascale_moe.engine.trace import Trace
from megascale_moe.model.counts import counts
from megascale_moe.pipeline.batches import check_batches, micro_batch
from megascale_moe.pipeline.checker import Timeline, timeline
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.step import action_ops
from megascale_moe.pipeline.storageless import META, step_inputs_without_storage
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.tools.dryrun.messages import Agreement, check_messages
from megascale_moe.train.trainer import Trainer

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True)
class DryRun:
    """A step of the job, and of one of its ranks.

    Attributes:
        rank: "index", "stage", "stages" and "layers" of the rank; its "memory" in bytes, of which "activations" is the
            most that is alive between two operators, "buffers" what the operators at the peak make besides (messages,
            intermediate results) and "peak" that of everything together; what it sends on the "wire", a dict per
            operator with the "bytes" in all layers and micro-batches and their "count" of messages; and its "flops".
    """

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
        """Return the step for --json."""
        return asdict(self)


def trainer_without_storage(config: Config, mesh: Mesh, rank: int, backend: str = "nccl") -> Trainer:
    """Return the trainer of a rank on the meta device, without process groups: its lists are those of a real job.

    Args:
        backend: for which library of collectives its lists are.
    """
    config = replace(config, train=replace(config.train, compile="off"))  # there is nothing to compile for
    return Trainer(config, mesh, axes_of(mesh, rank, backend), META)


def dry_run(
    config: Config, gpus: int, rank: int, *, all_ranks: bool = True, progress: Progress = lambda what, done, total: None
) -> DryRun:
    """Run rank `rank` of `gpus`.

    Args:
        all_ranks: also build the messages of every rank and compare them.

    Raises:
        ConfigError: the layout does not fit `gpus` ranks or the model, or there is no such rank.
    """
    require(gpus > 0, f"--gpus {gpus}: must be at least 1")
    mesh = mesh_of(config.parallel, config.model, gpus)
    check_batches(config, mesh)
    require(0 <= rank < gpus, f"--rank {rank}: a job of {gpus} ranks has ranks 0 to {gpus - 1}")
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
    rows = micro_batch(config, mesh)
    plan = trainer.plan(rows, config.train.global_batch // mesh.dp // rows)
    taken = _run(trainer, plan, progress)
    agreement = None
    if all_ranks:
        agreement = check_messages(config, mesh, lambda done: progress("messages of all ranks", done, gpus))
    size = counts(config.model)
    return DryRun(
        size.parameters_total, size.parameters_active, size.flops_per_token,
        config.train.global_batch * config.model.sequence_length, gpus, asdict(mesh), plan.micros,
        step_timeline(plan).bubble,
        {"index": rank, "stage": mesh.stage_of(rank), "stages": sorted(plan.stages), "layers": [*plan.part.layers]}
        | taken,
        agreement,
    )  # fmt: skip


def _run(trainer: Trainer, plan: StepPlan, progress: Progress) -> dict[str, Any]:
    """Run one step and return what it took."""
    _, program = trainer.program(plan.rows, plan.micros, "train")
    optimizer, trace, meter = trainer.optimizer, Trace(), Meter()
    rate = trainer.config.train.learning_rate
    done, total = 0, len(program.ops)

    def observe(op: Op, values: dict[str, Any]) -> None:
        nonlocal done
        meter.between()
        done += 1
        if done % 500 == 0 or done == total:
            progress("one step of one rank", done, total)

    ops: Sequence[Op] = program.ops
    with meter:
        values = step_inputs_without_storage(plan)
        if trainer.hides:  # synchronisation and update are in the list
            values |= optimizer.given(rate) | optimizer.updated()
        program.run(values, optimizer.weights | trainer.buffers, optimizer.gradients, trace, observe)
        values.clear()
        held = meter.held
        if not trainer.hides:
            optimizer.step(rate, trace)
            ops = [*ops, *optimizer.ops]
    memory = optimizer.held_bytes()  # what stays from step to step
    memory["parameters"] += sum(buffer.nbytes for buffer in trainer.buffers.values())
    peak = sum(memory.values()) + meter.peak
    return {
        "memory": {**memory, "activations": held, "buffers": meter.peak - held, "peak": peak},
        "wire": _wire(ops, trace),
        "flops": sum(op.cost.flops for op in ops),
    }


def _wire(ops: Sequence[Op], trace: Trace) -> list[dict[str, Any]]:
    """Return what was sent, by operator in the order of the list; layers, pieces and micro-batches are added up."""
    totals: dict[tuple[str, str, str], dict[str, Any]] = {}
    for op, event in zip(ops, trace.events, strict=True):
        assert op.name == event.name
        if event.wire_bytes:
            key = name, axis, phase = parse(op.name).tensor, op.cost.axis, str(op.phase)
            sent = totals.setdefault(key, {"op": name, "axis": axis, "phase": phase, "bytes": 0, "count": 0})
            sent["bytes"] += event.wire_bytes
            sent["count"] += 1
    return list(totals.values())


def step_timeline(plan: StepPlan) -> Timeline:
    """Return the schedule with each action as long as its declared FLOPs: the bubbles that the layout itself makes."""
    stages = [plan.stage(part) for part in plan.parts]
    flops = {
        (stage, phase): sum(op.cost.flops for op in action_ops(lists, phase))
        for stage, lists in enumerate(stages) for phase in ("F", "B", "W", "BW")
    }  # fmt: skip
    return timeline(plan.schedule, plan.parallel.pp, lambda action: flops[action.stage, action.phase])
