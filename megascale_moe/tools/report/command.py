"""`megascale report`, and the report that ends a training run.

What a run has not left is found on tensors without storage: the list of a trainer without storage, as in `megascale
dryrun`, is run once under the eyes of a `Watch`, as a real step is. A plan, which nobody has run, is simulated.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, require
from megascale_moe.engine.cost import Priced, Rates
from megascale_moe.engine.executor import Program
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Stream
from megascale_moe.pipeline.batches import check_batches, micro_batch
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.pipeline.storageless import (
    inputs_without_storage,
    message_without_storage,
    step_inputs_without_storage,
)
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.tools.dryrun.step import trainer_without_storage
from megascale_moe.tools.report.page import assemble, page
from megascale_moe.tools.report.run import read_run
from megascale_moe.train import metrics
from megascale_moe.train.config_file import read_config
from megascale_moe.train.job import local_rank_count
from megascale_moe.train.profiling import best_pieces
from megascale_moe.train.timeline import PART, TIMELINE, WHOLE, RankStep, Watch, document, first_layers, layers_within
from megascale_moe.train.trainer import Trainer

FILE = "report.html"
GPU = Rates(flops=5e14, memory=2.5e12, links={Stream.INTRA: 1.6e11, Stream.INTER: 4e10}, latency=2e-5)
"""About half to three quarters of an H800's nominal figures: 990 TFLOP/s, 3,350 GB/s, 200 GB/s, 50 GB/s."""


def report(
    source: Path, overrides: Sequence[str], out: Path | None, gpus: int | None = None, *, rehearse: bool = True
) -> dict[str, Any]:
    """Make the page of a run folder or of a TOML file and return the --json document.

    Args:
        rehearse: find memory that the run has not seen, for which torch imports its compiler.
        gpus: ranks of the job, for a TOML file; as many as its mesh needs if None.

    Raises:
        ConfigError: what is there is no run or no config, or is damaged, or the page cannot be written.
    """
    require(source.exists(), f"{source}: is not there; give a run folder or a TOML file")
    if not source.is_dir():
        config = read_config(source, overrides)
        return plan_report(config, gpus or local_rank_count(config), source, out or source.parent / FILE)
    given = overrides[0] if overrides else ""
    require(not given, f"override {given!r}: a run is reported as it was configured; leave it out")
    require(gpus is None, f"--gpus {gpus}: a run is reported as it was run; leave it out")
    run = read_run(source)
    timeline = run.timeline
    if timeline is None or (rehearse and "memory" not in timeline):
        timeline = _rehearsed(run.config, run.mesh, timeline["backend"] if timeline else "gloo", timeline)
        if run.timeline is not None:
            with contextlib.suppress(OSError):  # a report can be made of a folder that is read-only
                (source / TIMELINE).write_text(json.dumps(timeline, allow_nan=False), encoding="utf-8")
    timeline = timeline | {"traced": run.traced}
    return _written(assemble(run.config, run.mesh, timeline, run.records, str(source)), out or source / FILE)


def plan_report(
    config: Config, gpus: int, source: Path, out: Path, known: tuple[Priced, str] | None = None
) -> dict[str, Any]:
    """Write the page of a plan and return the --json document.

    Args:
        known: seconds of operators, and where they are from, in words.

    Raises:
        ConfigError: the layout does not fit the ranks, or the page cannot be written.
    """
    mesh = mesh_of(config.parallel, config.model, gpus)
    return _written(assemble(config, mesh, _rehearsed(config, mesh, known=known), [], str(source)), out)


def outdated(folder: Path) -> bool:
    """Return whether a run has gone on since its page was made."""
    path, steps = folder / FILE, folder / metrics.FILE
    return not (path.exists() and steps.exists() and path.stat().st_mtime_ns >= steps.stat().st_mtime_ns)


def _written(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write the page and return the --json document."""
    try:
        path.write_text(page(data), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place with --out") from error
    about: dict[str, Any] = {"path": str(path), "kind": data["kind"]}
    totals = {
        f"{name}_{unit}_s": data["timeline"][name]["totals"][total]
        for total, unit in (("seconds", "step"), ("exposed", "exposed")) for name in ("plain", "overlapped")
    }  # fmt: skip
    return about | totals | {name: value for name, value in data["last"].items() if name != "step_s"}


# --- what nobody has run ----------------------------------------------------------------------------------------------


def _rehearsed(
    config: Config, mesh: Mesh, backend: str = "nccl", timeline: dict[str, Any] | None = None,
    known: tuple[Priced, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the timeline of rank 0 with the memory of its step.

    Args:
        timeline: of a run, without memory; of a config that nobody has run it is simulated.
        known: seconds of operators for that, and where they are from, in words; estimates if None.

    Raises:
        ConfigError: batch sizes that the mesh does not divide.
    """
    check_batches(config, mesh)
    rows = micro_batch(config, mesh)
    micros = config.train.global_batch // mesh.dp // rows
    if timeline is not None:  # as it was cut, whatever estimates would say
        config = replace(config, overlap=replace(config.overlap, split=str(timeline["pieces"])))
    rates = GPU if config.train.dtype == "bf16" and config.train.device != "cpu" else Rates()
    cost, source = known or (rates, _sentence(rates))
    trainer = trainer_without_storage(config, mesh, 0, backend)
    trainer.overlap, trainer.profile = config.overlap, Profile(cost)
    if config.overlap.split == "auto":
        pieces = best_pieces(trainer.plan(rows), config.overlap, trainer.profile)
        trainer.profile = replace(trainer.profile, pieces=pieces)
    plan = trainer.plan(rows, micros)
    timeline = timeline or document(RankStep(plan, config.train, cost, source), mesh, 0)
    return timeline | {"memory": _memory(trainer, plan)}


def _memory(trainer: Trainer, plan: StepPlan) -> dict[str, Any]:
    """Return bytes of a rank: what stays, the curve of a step, and what each policy keeps of a micro-batch."""
    optimizer, watch, whole = trainer.optimizer, Watch(trainer), len(plan.ops) <= WHOLE
    if whole:
        trainer.program.cache_clear()
        _, program = trainer.program(plan.rows, plan.micros, "train")
        values = step_inputs_without_storage(plan)
        if trainer.hides:
            values |= optimizer.given(0.0) | optimizer.updated()
    else:
        stage = plan.stage(first_layers(plan, layers_within([plan], PART)))
        messages = [stage.reads, grad(stage.writes) if stage.writes else ""]
        values = inputs_without_storage(plan) | {name: message_without_storage(plan) for name in messages if name}
        program = Program([*stage.forward, *stage.backward], values)
    program.run(values, optimizer.weights | trainer.buffers, optimizer.gradients, None, watch.observe)
    return watch.memory(trainer, plan) | {"whole": whole}


def _sentence(rates: Rates) -> str:
    """Return a sentence on where estimates are from."""
    intra, inter = (rates.links[stream] / 1e9 for stream in (Stream.INTRA, Stream.INTER))
    return (
        f"Seconds of operators are estimates, nothing was measured: {rates.flops / 1e12:g} TFLOP/s, "
        f"{rates.memory / 1e9:,g} GB/s of memory, links of {intra:g} GB/s inside a node and {inter:g} GB/s between "
        f"nodes, {rates.latency * 1e6:g} µs per message."
    )
