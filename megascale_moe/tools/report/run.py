"""A run folder, read for a report: complete and sound, or refused in one line.

A run that was killed leaves a torn last line in its metrics, which is dropped like everywhere else. Any other line that
is no record means that the file was changed or damaged, and a page of the rest would look like the whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, require
from megascale_moe.engine.op import Phase, Stream
from megascale_moe.engine.trace import Event
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.train import metrics
from megascale_moe.train.config_file import read_config
from megascale_moe.train.job import local_rank_count
from megascale_moe.train.timeline import TIMELINE, VERSION, measured

NUMBERS = ("loss", "grad_norm", "tokens_per_s", "step_s", "comm_s", "exposed_comm_s", "wire_bytes")
RANKS = 8
"""Most ranks whose traces are read."""


@dataclass(frozen=True)
class FinishedRun:
    """The files of a finished run.

    Attributes:
        timeline: the document of the run's step, None if the run wrote none.
        traced: rank -> its last traced step, as `measured` has it.
    """

    config: Config
    mesh: Mesh
    records: list[dict[str, Any]]
    timeline: dict[str, Any] | None
    traced: dict[str, Any]


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        ConfigError: it holds no run, no finished step, or something damaged.
    """
    path = folder / "config.toml"
    require(path.is_file(), f"{folder}: no run, it has no config.toml; give a folder that train wrote, or a TOML file")
    config = read_config(path)
    records, timeline = _records(folder / metrics.FILE), _timeline(folder / TIMELINE)
    mesh = Mesh(**timeline["mesh"]) if timeline else mesh_of(config.parallel, config.model, local_rank_count(config))
    return FinishedRun(config, mesh, records, timeline, _traced(folder, config))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _records(path: Path) -> list[dict[str, Any]]:
    require(path.is_file(), f"{path.parent}: the run has no {path.name}, so no step of it has ended")
    *lines, torn = _read(path).split(b"\n")
    records = [_record(line, f"{path}: line {number}") for number, line in enumerate(lines, start=1)]
    require(bool(records), f"{path}: no step has ended yet{' (its only line is torn)' if torn else ''}")
    for number, (before, after) in enumerate(pairwise(each["step"] for each in records), start=2):
        require(before < after, f"{path}: line {number} is damaged: step {after} after {before}")
    return records


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is damaged: no JSON") from error
    require(isinstance(values, dict) and type(values.get("step")) is int, f"{where} is damaged: no record of a step")
    for name in NUMBERS:
        require(name in values, f"{where} is damaged: {name} is missing")
    for name in (*NUMBERS, "eval_loss"):
        require(_number(values.get(name)), f"{where} is damaged: {name} = {values.get(name)!r} is no number")
    loads = values.get("expert_load", [])
    fits = isinstance(loads, list) and all(map(_number, loads))
    require(fits, f"{where} is damaged: expert_load is no list of numbers")
    return dict(values)


def _number(value: object) -> bool:
    return value is None or type(value) in (int, float)


def _timeline(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        timeline = json.loads(_read(path))
        Mesh(**timeline["mesh"])
        for name in ("plain", "overlapped"):
            require("rows" in timeline[name]["table"] and "seconds" in timeline[name]["totals"], "")
        return dict(timeline) if timeline["version"] == VERSION else None
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: damaged; without it the report estimates times: remove it") from error


def _traced(folder: Path, config: Config) -> dict[str, Any]:
    """Return the last traced step of each rank, on one clock where the ranks share one."""
    steps = min(config.run.trace_steps, config.train.steps)
    paths = {str(rank): folder / f"trace-rank-{rank}.json" for rank in range(RANKS if steps else 0)}
    traces = {rank: events for rank, path in paths.items() if path.is_file() and (events := _last_step(path, steps))}
    origin = min((events[0].start for events in traces.values()), default=0.0)
    longest = max((events[-1].end - events[0].start for events in traces.values()), default=0.0)
    together = all(events[0].start - origin < longest for events in traces.values())
    return {rank: measured(events, origin if together else events[0].start) for rank, events in traces.items()}


def _last_step(path: Path, steps: int) -> list[Event]:
    """Return the last of several steps: they have equally many operators, or else end with the optimizer's."""
    streams = list(Stream)
    try:
        events = [
            Event(entry["name"][2:], Phase(entry["name"][0]), streams[entry["tid"]], entry["ts"] / 1e6,
                  (end := entry["ts"] + entry["dur"]) / 1e6, int(entry["args"]["wire_bytes"]),
                  (end - entry["args"]["exposed_us"]) / 1e6)
            for entry in json.loads(_read(path))["traceEvents"] if entry["ph"] == "X"
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path}: damaged; the report can do without it: remove it") from error
    if len(events) % steps == 0:
        return events[len(events) - len(events) // steps :]
    return events[max(index for index, event in enumerate(events) if event.name == events[0].name) :]
