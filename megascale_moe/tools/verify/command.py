"""The command: ranks are forked here once for all layouts, or this process is one of them under torchrun.

Forked ranks leave their results as files: the process that shows progress reads them while they come, and what was
found stays even if a layout takes its ranks down. References are computed before the fork, so ranks share them.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megascale_moe.comm.axis import connect
from megascale_moe.comm.local_ranks import fork_ranks
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, ModelConfig
from megascale_moe.tools.verify.explain import first_difference
from megascale_moe.tools.verify.layouts import ROWS_PER_RANK, Case, all_cases, own_case, with_passes
from megascale_moe.tools.verify.rank import RankOfLayout
from megascale_moe.tools.verify.reference import Reference, reference
from megascale_moe.tools.verify.report import LayoutResult, VerifyOutcome, show
from megascale_moe.train.job import Job, check_device, join, local_rank_count, number, under_launcher
from megascale_moe.train.progress import counted_progress

CPU_RANKS = 8
TIMEOUT = 60.0
"""Seconds: no step of a small model takes as long, a collective that waits so long waits for ever."""


@dataclass(frozen=True)
class VerifyWork:
    """The ranks' work: every case against the reference of its model."""

    config: Config
    ranks: int
    cases: list[Case]
    references: dict[ModelConfig, Reference]
    note: str  # why the user's own layout is not the first case; "" if it is


def verify(config: Config, nproc: int | None, *, only: bool = False, as_json: bool = False) -> int:
    """Verify the layouts of a config and print what came out; the exit status.

    Args:
        nproc: ranks; None: as many as GPUs, or 8 on the CPU (with `only`, as the layout needs).
        only: the config's own layout alone.

    Raises:
        ConfigError: `only`, and it does not fit the ranks; no such device.
    """
    start = time.monotonic()
    ranks = _rank_count(config, nproc, only)
    work = _work(config, ranks, only)
    outcome = VerifyOutcome(work.config, ranks, len(work.cases), work.note, [*work.references.values()])
    if under_launcher():
        return _under_launcher(work, outcome, as_json, start)
    with tempfile.TemporaryDirectory(prefix="megascale-verify-") as name, counted_progress() as progress:
        folder, total = Path(name), len(work.cases)

        def poll() -> None:
            progress(f"verifying {total} layouts on {ranks} ranks", len(list(folder.glob("result-*"))), total)

        status = fork_ranks(ranks, lambda rank: _forked(work, folder, rank), timeout=TIMEOUT, poll=poll)
        if status in (2, 130):
            return status
        outcome.results += [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("result-*"))]
        outcome.error = _first_error(folder) or (f"a rank ended with exit status {status}" if status else "")
    outcome.seconds = time.monotonic() - start
    return show(outcome, as_json)


def _rank_count(config: Config, nproc: int | None, only: bool) -> int:
    if under_launcher():
        return number("WORLD_SIZE", 1)
    p, gpus = config.parallel, torch.cuda.device_count() if config.train.device != "cpu" else 0
    if nproc:
        ranks = nproc
    elif only and (p.dp or p.node or p.ep or p.etp > 1 or p.pp > 1):
        ranks = local_rank_count(config)
    else:
        ranks = gpus if gpus > 1 or config.train.device == "cuda" else CPU_RANKS
    check_device(config, ranks)
    return ranks


def _work(config: Config, ranks: int, only: bool) -> VerifyWork:
    if only:
        try:
            cases, note = [own_case(config, ranks)], ""
        except ConfigError as error:
            raise ConfigError(f"--only: the config's own layout does not fit {ranks} ranks: {error}") from error
    else:
        cases, _, note = all_cases(config, ranks)
    cases = [replace(with_passes(case, config.overlap), train=config.train) for case in cases]
    models = dict.fromkeys(case.model for case in cases)
    references = {model: reference(model, ROWS_PER_RANK * ranks, config.train.seed) for model in models}
    return VerifyWork(config, ranks, cases, references, note)


# --- ranks -----------------------------------------------------------------------------------------------------------


def run_cases(
    work: VerifyWork, job: Job, report: Callable[[int, LayoutResult], None], begin: Callable[[int], None]
) -> None:
    """All cases on this rank; the leading one reports. Ranks come here together."""
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    for index, case in enumerate(work.cases):
        begin(index)
        start = time.monotonic()
        axes = connect(case.mesh, made=made) if work.ranks > 1 else job.axes
        run = RankOfLayout(case, axes, job.rank, job.device, work.references[case.model])
        errors = run.verify()
        difference = None if errors.passed else first_difference(run, errors)
        if job.leads:
            own = index == 0 and not work.note
            report(index, LayoutResult(case, errors, own, time.monotonic() - start, difference))


def _forked(work: VerifyWork, folder: Path, rank: int) -> None:
    """A forked rank: results and the first error go to files."""
    current = [0]

    def report(index: int, result: LayoutResult) -> None:
        hidden = folder / f".result-{index:05}"
        hidden.write_bytes(pickle.dumps(result))
        hidden.rename(folder / f"result-{index:05}")

    try:
        job = join(work.config, Mesh(dp=work.ranks))
        run_cases(work, job, report, lambda index: current.__setitem__(0, index))
    except Exception as error:
        text = f"{_named(work.cases[current[0]])}: rank {rank}{_place(error)}: {_line(error)}"
        (folder / f"error-{time.monotonic():020.6f}-{rank}").write_text(text, encoding="utf-8")
        time.sleep(0.5)  # the others fail because of this one: it was the first, and all have said so by then
        sys.stderr.flush()
        os._exit(1)


def _under_launcher(work: VerifyWork, outcome: VerifyOutcome, as_json: bool, start: float) -> int:
    job = join(work.config, Mesh(dp=work.ranks))
    with counted_progress() as progress:

        def report(index: int, result: LayoutResult) -> None:
            outcome.results.append(result)
            progress(f"verifying {len(work.cases)} layouts on {work.ranks} ranks", index + 1, len(work.cases))

        run_cases(work, job, report, lambda _: None)
    outcome.seconds = time.monotonic() - start
    verdicts = [show(outcome, as_json) if job.leads else 0]
    if work.ranks > 1:
        dist.broadcast_object_list(verdicts, src=0)
    return verdicts[0]


# --- failures --------------------------------------------------------------------------------------------------------


def _first_error(folder: Path) -> str:
    errors: Sequence[Path] = sorted(folder.glob("error-*"))
    return errors[0].read_text(encoding="utf-8") if errors else ""


def _named(case: Case) -> str:
    return " ".join(f"{name}={value}" for name, value in case.words.items())


def _place(error: Exception) -> str:
    """The operator that was running, if one was."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        op = frame.f_locals.get("op")
        if frame.f_code.co_name == "_step" and op is not None:
            return f", {op.name} (phase {op.phase})"
    return ""


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
