"""`megascale report`, and the report that ends a training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megascale_moe.config import Config, ConfigError, require
from megascale_moe.engine.cost import Priced, Rates
from megascale_moe.engine.trace import Event
from megascale_moe.pipeline.batches import check_batches, micro_batch
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.tools.dryrun.step import trainer_without_storage
from megascale_moe.tools.report.page import assemble, page
from megascale_moe.tools.report.rehearsal import GPU, memory, planned
from megascale_moe.tools.report.run import FinishedRun, read_run
from megascale_moe.train import metrics
from megascale_moe.train.config_file import read_config
from megascale_moe.train.job import local_rank_count
from megascale_moe.train.timeline import record

FILE = "report.html"


def report(
    source: Path, overrides: Sequence[str], out: Path | None, gpus: int | None = None, *, rehearse: bool = True
) -> dict[str, Any]:
    """Make the page of a run folder or of a TOML file; the --json document.

    Args:
        rehearse: find memory that the run has not seen, for which torch imports its compiler.
        gpus: ranks of the job, for a TOML file; as many as its mesh needs if None.

    Raises:
        ConfigError: what is there is no run or no config, or is damaged, or the page cannot be written.
    """
    require(source.exists(), f"{source}: is not there; give a run folder or a TOML file")
    if source.is_dir():
        given = overrides[0] if overrides else ""
        require(not given, f"override {given!r}: a run is reported as it was configured; leave it out")
        require(gpus is None, f"--gpus {gpus}: a run is reported as it was run; leave it out")
        return _written(run_data(read_run(source), rehearse), out or source / FILE)
    config = read_config(source, overrides)
    return _written(plan_data(config, gpus or local_rank_count(config), source), out or source.parent / FILE)


def outdated(folder: Path) -> bool:
    """Whether a run has gone on since its page was made."""
    page, steps = folder / FILE, folder / metrics.FILE
    return not (page.exists() and steps.exists() and page.stat().st_mtime_ns >= steps.stat().st_mtime_ns)


def run_data(run: FinishedRun, rehearse: bool) -> dict[str, Any]:
    """Data of a run's page; what had to be worked out is kept in the run folder."""
    config, mesh = run.config, run.mesh
    timeline = run.timeline
    if timeline is None or (rehearse and "memory" not in timeline):
        backend = "gloo" if timeline is None else timeline["backend"]
        made = _rehearsed(config, mesh.world, backend, timeline)
        if timeline is not None:
            _keep(run.folder / record.FILE, made)
        timeline = made
    timeline = timeline | {"traced": _traced(run.traces)}
    return assemble(config, mesh, timeline, timeline.get("memory", {}), run.records, str(run.folder))


def plan_report(config: Config, gpus: int, source: Path, out: Path, known: tuple[Priced, str]) -> None:
    """Write the page of a plan.

    Args:
        known: seconds of operators, and where they are from, in words.

    Raises:
        ConfigError: it cannot be written.
    """
    _written(plan_data(config, gpus, source, known), out)


def plan_data(config: Config, gpus: int, source: Path, known: tuple[Priced, str] | None = None) -> dict[str, Any]:
    """Data of a plan's page."""
    timeline = _rehearsed(config, gpus, "nccl", None, known)
    return assemble(config, mesh_of(config.parallel, config.model, gpus), timeline, timeline["memory"], [], str(source))


def _rehearsed(
    config: Config, world: int, backend: str, timeline: dict[str, Any] | None, known: tuple[Priced, str] | None = None
) -> dict[str, Any]:  # fmt: skip
    """A timeline with memory; without one its times are known from elsewhere, or estimates."""
    mesh = mesh_of(config.parallel, config.model, world)
    check_batches(config, mesh)
    rows = micro_batch(config, mesh)
    micros = config.train.global_batch // mesh.dp // rows
    rates = GPU if config.train.dtype == "bf16" and config.train.device != "cpu" else Rates()
    if timeline is not None:  # as it was cut, whatever estimates would say
        config = replace(config, overlap=replace(config.overlap, split=str(timeline["pieces"])))
    trainer = trainer_without_storage(config, mesh, 0, backend)
    cost, words = known or (rates, record.rates_words(rates))
    step = planned(trainer, rows, micros, cost, words)
    return (timeline or record.document(step, mesh, 0)) | {"memory": memory(trainer, step.plan)}


def _keep(path: Path, timeline: dict[str, Any]) -> None:
    """Write it if that can be done: a report can be made of a folder that is read-only."""
    try:
        path.write_text(json.dumps(timeline, allow_nan=False), encoding="utf-8")
    except OSError:
        return


def _traced(traces: dict[int, list[Event]]) -> dict[str, Any]:
    """Return the events of each rank with a trace, on one clock where the ranks share one."""
    starts = {rank: events[0].start for rank, events in traces.items() if events}
    common = min(starts.values(), default=0.0)
    longest = max((events[-1].end - events[0].start for events in traces.values() if events), default=0.0)
    together = all(start - common < longest for start in starts.values())
    return {
        str(rank): record.measured(traces[rank], common if together else start) for rank, start in starts.items()
    }


def _written(data: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        path.write_text(page(data), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place with --out") from error
    lists = {f"{name}_step_s": data["timeline"][name]["totals"]["seconds"] for name in ("plain", "overlapped")}
    exposed = {f"{name}_exposed_s": data["timeline"][name]["totals"]["exposed"] for name in ("plain", "overlapped")}
    return {"path": str(path), "kind": data["kind"], **lists, **exposed, **_numbers(data)}


def _numbers(data: dict[str, Any]) -> dict[str, Any]:
    names = ("step", "loss", "eval_loss", "tokens_per_s", "exposed_comm_share")
    return {name: data["last"][name] for name in names} if data["last"] else {}
