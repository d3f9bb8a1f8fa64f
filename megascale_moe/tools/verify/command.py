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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megascale_moe.comm.axis import connect
from megascale_moe.comm.local_ranks import fork_ranks
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError
from megascale_moe.tools.verify.explain import first_difference
from megascale_moe.tools.verify.layouts import ROWS_PER_RANK, all_cases, own_case
from megascale_moe.tools.verify.rank import RankOfLayout
from megascale_moe.tools.verify.reference import reference
from megascale_moe.tools.verify.report import LayoutResult, Verification, show
from megascale_moe.train.job import Job, check_device, join, local_rank_count, number, under_launcher
from megascale_moe.train.progress import counted_progress

CPU_RANKS = 8
TIMEOUT = 60.0
"""Seconds: no step of a small model takes as long, a collective that waits so long waits for ever."""


def verify(config: Config, nproc: int | None, *, only: bool = False, as_json: bool = False) -> int:
    """Verify the layouts of a config, print the results and return the exit status.

    Args:
        nproc: ranks; None: as many as GPUs, or 8 on the CPU (with `only`, as the layout needs).
        only: the config's own layout alone.

    Raises:
        ConfigError: `only`, and it does not fit the ranks; no such device.
    """
    start = time.monotonic()
    ranks = number("WORLD_SIZE", 1) if under_launcher() else _rank_count(config, nproc, only)
    work = _work(config, ranks, only)
    with counted_progress() as progress:

        def show_progress(done: int) -> None:
            progress(f"verifying {len(work.cases)} layouts on {ranks} ranks", done, len(work.cases))

        if under_launcher():
            return _as_a_rank(work, as_json, start, show_progress)
        status = _fork(work, show_progress)
    if status in (2, 130):
        return status
    work.seconds = time.monotonic() - start
    return show(work, as_json)


def _rank_count(config: Config, nproc: int | None, only: bool) -> int:
    p, gpus = config.parallel, torch.cuda.device_count() if config.train.device != "cpu" else 0
    if nproc:
        ranks = nproc
    elif only and (p.dp or p.node or p.ep or max(p.etp, p.pp, p.cp) > 1):
        ranks = local_rank_count(config)
    else:
        ranks = gpus if gpus > 1 or config.train.device == "cuda" else CPU_RANKS
    check_device(config, ranks)
    return ranks


def _work(config: Config, ranks: int, only: bool) -> Verification:
    if only:
        try:
            cases, note = [own_case(config, ranks)], ""
        except ConfigError as error:
            raise ConfigError(f"--only: the config's own layout does not fit {ranks} ranks: {error}") from error
    else:
        cases, note = all_cases(config, ranks)
    models = dict.fromkeys(case.model for case in cases)
    references = {model: reference(model, ROWS_PER_RANK * ranks, config.train.seed) for model in models}
    return Verification(config, ranks, cases, references, note)


# --- ranks -----------------------------------------------------------------------------------------------------------


def _results(work: Verification, job: Job) -> Iterator[LayoutResult]:
    """Verify case after case on this rank; ranks go through it together."""
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    for case in work.cases:
        start = time.monotonic()
        axes = connect(case.mesh, made=made) if work.ranks > 1 else job.axes
        run = RankOfLayout(case, axes, job.rank, job.device, work.references[case.model])
        errors = run.verify()
        difference = None if errors.passed else first_difference(run, errors)
        own = case is work.cases[0] and not work.note
        yield LayoutResult(case, errors, own, time.monotonic() - start, difference)


def _fork(work: Verification, show_progress: Callable[[int], None]) -> int:
    """Run the ranks as forks of this process, collect their results and return the exit status."""
    with tempfile.TemporaryDirectory(prefix="megascale-verify-") as name:
        folder = Path(name)

        def results() -> list[Path]:
            return sorted(folder.glob("result-*"))

        status = fork_ranks(
            work.ranks, lambda rank: _forked(work, folder, rank), timeout=TIMEOUT,
            poll=lambda: show_progress(len(results())),
        )  # fmt: skip
        work.results = [pickle.loads(path.read_bytes()) for path in results()]
        errors = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("error-*"))]
        if status:
            work.error = errors[0] if errors else f"a rank ended with exit status {status}"
    return status


def _forked(work: Verification, folder: Path, rank: int) -> None:
    """Be a forked rank: results and the first error go to files."""
    done = 0
    try:
        job = join(work.config, Mesh(dp=work.ranks))
        for result in _results(work, job):
            if job.leads:
                hidden = folder / f".result-{done:05}"
                hidden.write_bytes(pickle.dumps(result))
                hidden.rename(folder / f"result-{done:05}")
            done += 1
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0]
        text = f"{work.cases[done].text}: rank {rank}{_running(error)}: {type(error).__name__}: {message}"
        (folder / f"error-{time.monotonic():020.6f}-{rank}").write_text(text, encoding="utf-8")
        time.sleep(0.5)  # the others fail because of this one: it was the first, and all have said so by then
        sys.stderr.flush()
        os._exit(1)


def _running(error: Exception) -> str:
    """Return the operator that was running, if one was, as part of a sentence."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        op = frame.f_locals.get("op")
        if frame.f_code.co_name == "_step" and op is not None:
            return f", {op.name} (phase {op.phase})"
    return ""


def _as_a_rank(work: Verification, as_json: bool, start: float, show_progress: Callable[[int], None]) -> int:
    """Be a rank that a launcher started: the leading one prints, all return the same exit status."""
    job = join(work.config, Mesh(dp=work.ranks))
    for result in _results(work, job):
        work.results.append(result)
        if job.leads:
            show_progress(len(work.results))
    work.seconds = time.monotonic() - start
    return int(job.from_lead(lambda: str(show(work, as_json))))
