"""`megascale bench profile`: a cluster profile of the ranks at hand, for the planner.

Ranks are started here, or are those of a launcher; `bench.machine` measures them. The result is a TOML file that
`planner.cluster.load` reads: peaks are the best rates that were seen, shares what operators and messages of a size
reached of them, with machine, versions, date and command in its comments. Shares are of one dtype, the one that the
profile is asked for; of the other it has the peak alone. What cannot be measured on these ranks, as the links of one,
can be another profile's: the base of the one that is written.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megascale_moe.bench.machine import FORMULAS, Effort, MachineFigures, MachineMeter
from megascale_moe.bench.shares import rising, shares
from megascale_moe.bench.timed import machine
from megascale_moe.comm.local_ranks import fork_ranks
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, require
from megascale_moe.engine.op import Stream, Work
from megascale_moe.kernels.allocator import keep_freed_memory
from megascale_moe.planner.cluster import load
from megascale_moe.train.hardware import available_memory, cpu_model
from megascale_moe.train.job import join, number, under_launcher
from megascale_moe.train.output import print_json
from megascale_moe.train.progress import counted_progress

PRODUCTS = tuple(map(str, (Work.PRODUCT, Work.GROUPED, Work.ATTENTION)))
MOVING = (str(Work.ROWS), FORMULAS)
KINDS = (*PRODUCTS, *MOVING)


def bench(
    nproc: int, node: int | None, dtype: str | None, out: Path, base: str, effort: Effort | None = None, *,
    as_json: bool,
) -> int:  # fmt: skip
    """Measure on forked ranks, or as one rank under a launcher; the first writes. Return the exit status.

    Args:
        nproc: ranks to start here; under a launcher there are as many as it has started. node: ranks of a node; None:
            all that were started on one machine. out: where the profile goes. base: the profile that says the rest.

    Raises:
        ConfigError: one rank has no links, there is no such base, the nodes do not divide the ranks, or the file cannot
            be written.
    """
    launched = under_launcher()
    world = number("WORLD_SIZE", 1) if launched else nproc
    require(
        world > 1 or bool(base),
        "bench profile: 1 rank has no links to measure; start 2 or more with --nproc, or name with --base the profile "
        "that has them",
    )
    if base:
        load(base)
    node = node or min(number("LOCAL_WORLD_SIZE", world) if launched else world, world)
    fitting = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
    require(
        world % node == 0,
        f"bench profile: nodes of {node} do not divide the {world} ranks; use --node with one of {fitting}",
    )
    mesh = Mesh(dp=world // node, node=node, ep=node)

    def measure(rank: int = 0) -> None:
        keep_freed_memory()
        job = join(Config(), mesh)
        job.from_lead(lambda: _check_place(out))
        kind = dtype or ("bf16" if job.device.type == "cuda" else "fp32")
        with counted_progress(shown=job.leads) as progress:
            figures = MachineMeter(job.axes, mesh, job.device, kind, effort, progress).everything()
        if job.leads:
            text = profile(figures, memory_of(job.device, mesh.node), header(job.device), base)
            out.write_text(text, encoding="utf-8")
            load(str(out))  # what cannot be read must not be left for later
            if as_json:
                print_json(document(figures, out))
            else:
                print(f"profile: {out}", flush=True)

    if launched:
        measure()
        return 0
    _check_place(out)
    return fork_ranks(world, measure, timeout=600.0)


def _check_place(path: Path) -> str:
    """Refuse before minutes are spent; there is nothing to tell otherwise."""
    require(path.suffix == ".toml", f"bench profile: --out {path}: a profile is a .toml file")
    folder = path.absolute().parent
    require(folder.is_dir() and os.access(folder, os.W_OK), f"bench profile: --out {path}: cannot write to {folder}")
    return ""


def memory_of(device: torch.device, ranks: int) -> float:
    """Return the bytes that one of so many ranks of a machine can have."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(available_memory() or 1 << 33) / ranks


def header(device: torch.device) -> list[str]:
    """Return where and how a profile was measured."""
    return [
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_model()}, {os.cpu_count()} cores",
        f"torch {torch.__version__}, Python {sys.version.split()[0]}",
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    ]


def profile(figures: MachineFigures, memory: float, header: Sequence[str], base: str = "") -> str:
    """Return the TOML file.

    Args:
        memory: bytes of a rank. header: lines of comment. base: the profile that says what this one does not.
    """
    points = {kind: rising(s for s in figures.samples if s.kind == kind) for kind in KINDS}
    bandwidth = max(rate for kind in MOVING for _, rate in points[kind])
    best = max(rate for kind in PRODUCTS for _, rate in points[kind])
    peaks = figures.peaks | {figures.dtype: max(figures.peaks[figures.dtype], best)}
    most = dict.fromkeys(PRODUCTS, peaks[figures.dtype]) | dict.fromkeys(MOVING, bandwidth)
    lines = [
        *(f"# {line}" for line in header),
        f"# ranks: {figures.ranks}, in nodes of {figures.node}, all at work, threads of each: {figures.threads}; "
        f"shares of {figures.dtype}",
        *([f'base = "{base}"'] if base else []),
        'stack = "megascale_moe, measured by bench profile"', "", "[gpu]", f"memory_gb = {memory / 1e9:.4g}",
        *([] if base else ["reserved_gb = 0"]), f"memory_tb_per_s = {bandwidth / 1e12:.4g}",
        f"overhead_us = {figures.overhead * 1e6:.4g}",
        *([f"contention = {figures.contention:.4g}"] if figures.links else []), "", "[gpu.peak_tflops]",
        *(f"{name} = {rate / 1e12:.4g}" for name, rate in peaks.items()), "", "[gpu.share]",
        *(f"{kind} = {_pairs(shares(points[kind], most[kind]))}" for kind in KINDS),
        *_link_lines(figures, base),
        "", "[run]", f"jitter = {figures.jitter:.4g}", f"step_ms = {figures.step * 1e3:.4g}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _link_lines(figures: MachineFigures, base: str) -> Iterator[str]:
    if not figures.links:
        return
    yield from ("", "[node]", f"ranks = {figures.node}", f"rings = {'true' if figures.rings else 'false'}")
    other = next(iter(figures.links.values()))
    for stream in (Stream.INTRA, Stream.INTER):
        link = figures.links.get(stream)
        if link is None and base:
            continue
        yield from ("", f"[links.{stream}]")
        if link is None:
            yield "# There is none here; the other one's figures."
            link = other
        yield from (
            f"gb_per_s = {link.rate / 1e9:.4g}", f"latency_us = {link.latency * 1e6:.4g}",
            f"peer_us = {link.peer * 1e6:.4g}", f"beside_us = {link.beside * 1e6:.4g}",
            f"share = {_pairs(link.share.points)}",
        )  # fmt: skip


def _pairs(points: Iterable[tuple[float, float]]) -> str:
    return "[" + ", ".join(f"[{size:.5g}, {share:.3g}]" for size, share in points) + "]"


def document(figures: MachineFigures, path: Path) -> dict[str, Any]:
    """Return the --json document: medians are means over ranks here, spreads are not known."""
    rows = [
        *((f"peak {name}", rate / 1e12, "TFLOP/s") for name, rate in figures.peaks.items()),
        *((f"{stream} rate", link.rate / 1e9, "GB/s") for stream, link in figures.links.items()),
        *((f"{stream} latency", link.latency * 1e6, "us") for stream, link in figures.links.items()),
        ("overhead", figures.overhead * 1e6, "us"), ("contention", figures.contention, "x"),
        ("jitter", figures.jitter, "x"), ("step", figures.step * 1e3, "ms"),
    ]  # fmt: skip
    return {
        "name": "profile", "machine": machine(figures.ranks) | {"node": figures.node}, "path": str(path),
        "rows": [{"variant": name, "median": value, "unit": unit, "spread": 0.0} for name, value, unit in rows],
    }  # fmt: skip
