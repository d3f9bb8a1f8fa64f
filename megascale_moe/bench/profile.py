"""`megascale bench profile`: a cluster profile of the ranks at hand, for the planner.

Ranks are started here, or are those of a launcher; `train.machine` measures them. The result is a TOML file that
`planner.cluster.load` reads: peaks are the best rates that were seen, shares what operators and messages of a size
reached of them, with machine, versions, date and command in its comments. Shares are of one dtype, the one that the
profile is asked for; of the other it has the peak alone. What cannot be measured on these ranks, as the links of one,
can be another profile's: the base of the one that is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megascale_moe.bench.machine import FORMULAS, Effort, MachineFigures, MachineMeter
from megascale_moe.bench.shares import Points, rising, shares
from megascale_moe.comm.local_ranks import fork_ranks
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, TrainConfig, require
from megascale_moe.engine.op import Stream, Work
from megascale_moe.kernels.allocator import keep_freed_memory
from megascale_moe.planner.cluster import load
from megascale_moe.train.hardware import available_memory, cpu_model
from megascale_moe.train.job import join, number, under_launcher
from megascale_moe.train.progress import counted_progress

PRODUCTS = tuple(map(str, (Work.PRODUCT, Work.GROUPED, Work.ATTENTION)))
MOVING = (str(Work.ROWS), FORMULAS)
KINDS = (*PRODUCTS, *MOVING)


@dataclass(frozen=True)
class ProfileOptions:
    """The arguments of the command.

    Attributes:
        nproc: ranks to start here; under a launcher there are as many as it has started. node: ranks of a node, 0: all
            that were started on one machine. out: where the profile goes. base: the profile that says the rest.
    """

    nproc: int = 2
    node: int = 0
    dtype: str = ""
    out: Path = Path("profile.toml")
    base: str = ""
    effort: Effort | None = None

    def mesh(self, world: int, local: int) -> Mesh:
        """Nodes of ranks.

        Raises:
            ConfigError: one rank has no links, there is no such base, or the nodes do not divide the ranks.
        """
        require(
            world > 1 or bool(self.base),
            "bench profile: 1 rank has no links to measure; start 2 or more with --nproc, or name with --base the "
            "profile that has them",
        )
        if self.base:
            load(self.base)
        node = self.node or min(local, world)
        fitting = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
        require(world % node == 0, f"bench profile: nodes of {node} do not divide the {world} ranks; use --node with "
                                   f"one of {fitting}")  # fmt: skip
        return Mesh(dp=world // node, node=node, ep=node)


def bench(order: ProfileOptions, *, as_json: bool) -> int:
    """The command: on forked ranks, or as one rank under a launcher; the first writes. The exit status.

    Raises:
        ConfigError: see `Order.mesh`, or the file cannot be written.
    """
    if under_launcher():
        world = number("WORLD_SIZE", 1)
        _rank(order, order.mesh(world, number("LOCAL_WORLD_SIZE", world)), as_json)
        return 0
    mesh = order.mesh(order.nproc, order.nproc)
    _check_place(order.out)
    return fork_ranks(order.nproc, lambda _: _rank(order, mesh, as_json), timeout=600.0)


def _check_place(path: Path) -> str:
    """Refuse before minutes are spent; there is nothing to tell otherwise."""
    require(path.suffix == ".toml", f"bench profile: --out {path}: a profile is a .toml file")
    folder = path.absolute().parent
    require(folder.is_dir() and os.access(folder, os.W_OK), f"bench profile: --out {path}: cannot write to {folder}")
    return ""


def _rank(order: ProfileOptions, mesh: Mesh, as_json: bool) -> None:
    keep_freed_memory()
    job = join(Config(train=TrainConfig()), mesh)
    job.from_lead(lambda: _check_place(order.out))
    dtype = order.dtype or ("bf16" if job.device.type == "cuda" else "fp32")
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(counted_progress()) if job.leads else (lambda what, done, total: None)
        found = MachineMeter(job.axes, mesh, job.device, dtype, order.effort, progress).everything()
    if job.leads:
        text = profile(found, memory_of(job.device, mesh.node), header(job.device), order.base)
        order.out.write_text(text, encoding="utf-8")
        load(str(order.out))  # what cannot be read must not be left for later
        print(json.dumps(document(found, order.out)) if as_json else f"profile: {order.out}", flush=True)


def memory_of(device: torch.device, ranks: int) -> float:
    """Bytes that one of so many ranks of a machine can have."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(available_memory() or 1 << 33) / ranks


def header(device: torch.device) -> list[str]:
    """Where and how a profile was measured."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    return [
        f"{what}, {os.cpu_count()} cores",
        f"torch {torch.__version__}, Python {sys.version.split()[0]}",
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    ]


def profile(found: MachineFigures, memory: float, header: Sequence[str], base: str = "") -> str:
    """The TOML file.

    Args:
        memory: bytes of a rank. header: lines of comment. base: the profile that says what this one does not.
    """
    points = {kind: rising(s for s in found.samples if s.kind == kind) for kind in KINDS}
    bandwidth = max(rate for kind in MOVING for _, rate in points[kind])
    best = max(rate for kind in PRODUCTS for _, rate in points[kind])
    peaks = found.peaks | {found.dtype: max(found.peaks[found.dtype], best)}
    curves = {kind: shares(points[kind], peaks[found.dtype] if kind in PRODUCTS else bandwidth) for kind in KINDS}
    lines = [f"# {line}" for line in header]
    lines += [
        f"# ranks: {found.ranks}, in nodes of {found.node}, all at work, threads of each: {found.threads}; shares of "
        f"{found.dtype}",
        *([f'base = "{base}"'] if base else []),
        'stack = "megascale_moe, measured by bench profile"', "", "[gpu]", f"memory_gb = {memory / 1e9:.4g}",
        *([] if base else ["reserved_gb = 0"]), f"memory_tb_per_s = {bandwidth / 1e12:.4g}",
        f"overhead_us = {found.overhead * 1e6:.4g}",
        *([f"contention = {found.contention:.4g}"] if found.links else []), "", "[gpu.peak_tflops]",
        *(f"{name} = {rate / 1e12:.4g}" for name, rate in peaks.items()), "", "[gpu.share]",
        *(f"{kind} = {_pairs(curve)}" for kind, curve in curves.items()),
        *(_of_links(found, base) if found.links else []),
        "", "[run]", f"jitter = {found.jitter:.4g}", f"step_ms = {found.step * 1e3:.4g}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _of_links(found: MachineFigures, base: str) -> Iterator[str]:
    yield from ("", "[node]", f"ranks = {found.node}", f"rings = {'true' if found.rings else 'false'}")
    other = next(iter(found.links.values()))
    for stream in (Stream.INTRA, Stream.INTER):
        link = found.links.get(stream)
        if link is None and base:
            continue
        yield from ("", f"[links.{stream}]")
        if link is None:
            yield "# There is none here; the other one's figures."
            link = other
        yield from (
            f"gb_per_s = {link.rate / 1e9:.4g}", f"latency_us = {link.latency * 1e6:.4g}",
            f"peer_us = {link.peer * 1e6:.4g}", f"beside_us = {link.beside * 1e6:.4g}", f"share = {_pairs(link.share)}",
        )  # fmt: skip


def _pairs(points: Points) -> str:
    return "[" + ", ".join(f"[{size:.5g}, {share:.3g}]" for size, share in points) + "]"


def document(found: MachineFigures, path: Path) -> dict[str, Any]:
    """For --json (interface of `bench`): medians are means over ranks here, spreads are not known."""
    rows: list[dict[str, Any]] = [
        {"variant": f"peak {name}", "median": rate / 1e12, "unit": "TFLOP/s"} for name, rate in found.peaks.items()
    ]
    rows += [
        {"variant": f"{stream} rate", "median": link.rate / 1e9, "unit": "GB/s"} for stream, link in found.links.items()
    ]
    rows += [
        {"variant": f"{stream} latency", "median": link.latency * 1e6, "unit": "us"}
        for stream, link in found.links.items()
    ]
    rows += [
        {"variant": "overhead", "median": found.overhead * 1e6, "unit": "us"},
        {"variant": "contention", "median": found.contention, "unit": "x"},
        {"variant": "jitter", "median": found.jitter, "unit": "x"},
        {"variant": "step", "median": found.step * 1e3, "unit": "ms"},
    ]
    machine = {"processor": cpu_model(), "torch": torch.__version__, "ranks": found.ranks, "node": found.node}
    return {"name": "profile", "machine": machine, "path": str(path), "rows": [row | {"spread": 0.0} for row in rows]}
