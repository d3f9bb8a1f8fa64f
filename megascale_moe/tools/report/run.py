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
from megascale_moe.train.timeline import record

NUMBERS = ("loss", "grad_norm", "tokens_per_s", "step_s", "comm_s", "exposed_comm_s", "wire_bytes")
RANKS = 8
"""Most ranks whose traces are read."""


@dataclass(frozen=True)
class FinishedRun:
    """The files of a finished run.

    Attributes:
        timeline: the document of `record`, None if the run wrote none.
        traces: rank -> events of its last traced step.
    """

    folder: Path
    config: Config
    records: list[dict[str, Any]]
    timeline: dict[str, Any] | None
    traces: dict[int, list[Event]]

    @property
    def mesh(self) -> Mesh:
        """The ranks that trained."""
        if self.timeline is not None:
            return Mesh(**self.timeline["mesh"])
        return mesh_of(self.config.parallel, self.config.model, local_rank_count(self.config))


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        ConfigError: it holds no run, no finished step, or something damaged.
    """
    path = folder / "config.toml"
    require(path.is_file(), f"{folder}: no run, it has no config.toml; give a folder that train wrote, or a TOML file")
    config = read_config(path)
    records, timeline = _records(folder / metrics.FILE), _timeline(folder / record.FILE)
    return FinishedRun(folder, config, records, timeline, _traces(folder, config))


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
    steps = [record["step"] for record in records]
    for number, (before, after) in enumerate(pairwise(steps), start=2):
        require(before < after, f"{path}: line {number} is damaged: step {after} after {before}")
    return records


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is damaged: no JSON") from error
    require(isinstance(found, dict) and type(found.get("step")) is int, f"{where} is damaged: no record of a step")
    for name in NUMBERS:
        require(name in found, f"{where} is damaged: {name} is missing")
    for name in (*NUMBERS, "eval_loss"):
        require(_number(found.get(name)), f"{where} is damaged: {name} = {found.get(name)!r} is no number")
    loads = found.get("expert_load", [])
    fits = isinstance(loads, list) and all(map(_number, loads))
    require(fits, f"{where} is damaged: expert_load is no list of numbers")
    return dict(found)


def _number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _timeline(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(_read(path))
        known = found["version"] == record.VERSION
        Mesh(**found["mesh"])
        for name in ("plain", "overlapped"):
            require(len(found[name]["table"]["rows"]) >= 0 and "seconds" in found[name]["totals"], "")
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: damaged; without it the report estimates times: remove it") from error
    return dict(found) if known else None


def _traces(folder: Path, config: Config) -> dict[int, list[Event]]:
    """The last traced step of each rank."""
    steps = min(config.run.trace_steps, config.train.steps)
    paths = {rank: folder / f"trace-rank-{rank}.json" for rank in range(RANKS)}
    return {rank: _last_step(path, steps) for rank, path in paths.items() if steps and path.is_file()}


def _last_step(path: Path, steps: int) -> list[Event]:
    streams = list(Stream)
    try:
        events = [
            Event(entry["name"][2:], Phase(entry["name"][0]), streams[entry["tid"]], entry["ts"] / 1e6,
                  (end := entry["ts"] + entry["dur"]) / 1e6, int(entry["args"]["wire_bytes"]),
                  (end - waited) / 1e6 if (waited := entry["args"]["exposed_us"]) else None)
            for entry in json.loads(_read(path))["traceEvents"] if entry["ph"] == "X"
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path}: damaged; the report can do without it: remove it") from error
    first = [place for place, event in enumerate(events) if event.name == events[0].name]
    return events[_start(len(events), first, steps) :]


def _start(count: int, first: list[int], steps: int) -> int:
    """Where the last of several steps begins: they have equally many operators, or else end with the optimizer's."""
    if steps and count % steps == 0:
        return count - count // steps
    return first[-1] if first else 0
