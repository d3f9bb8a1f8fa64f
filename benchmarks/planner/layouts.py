"""Is what the planner says of a layout what its training steps take? Predicted against measured, on shaped links.

    python benchmarks/planner/layouts.py --write       # as root; seven minutes on a quiet machine of two cores

First the cluster is measured as `megascale bench profile` does it, operators and messages and no layout, once. Then
whole training steps (optimizer included) of a small MoE are measured in each layout, all layouts interleaved in every
round, and compared with what `planner.step.price` makes of the profile. Routing is balanced, as the planner takes it to
be. Ranks are hosts of their own with a core of their own each (`cores`), links are in proportion to what they compute.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.cluster.cluster import Cluster, Shape, cluster  # noqa: E402
from benchmarks.cluster.iso import NODES, balance, gemm_rates  # noqa: E402
from benchmarks.cluster.ranks import run_on_cluster  # noqa: E402
from benchmarks.overlap.nodes import batches  # noqa: E402
from benchmarks.overlap.run import balanced_route  # noqa: E402
from benchmarks.planner import cores  # noqa: E402
from megascale_moe.bench import overlap as bench_overlap  # noqa: E402
from megascale_moe.bench.machine import MachineFigures, MachineMeter  # noqa: E402
from megascale_moe.bench.profile import header, memory_of, profile  # noqa: E402
from megascale_moe.bench.timed import over_ranks, spread  # noqa: E402
from megascale_moe.comm.axis import Axes, connect  # noqa: E402
from megascale_moe.comm.mesh import Mesh  # noqa: E402
from megascale_moe.config import (  # noqa: E402
    Config,
    ModelConfig,
    OverlapConfig,
    ParallelConfig,
    TrainConfig,
    WireConfig,
)
from megascale_moe.engine.cost import kind_of  # noqa: E402
from megascale_moe.engine.op import Stream  # noqa: E402
from megascale_moe.engine.trace import Event, now  # noqa: E402
from megascale_moe.planner.cluster import Cluster as Profile  # noqa: E402
from megascale_moe.planner.cluster import load  # noqa: E402
from megascale_moe.planner.price import Prices  # noqa: E402
from megascale_moe.planner.step import price  # noqa: E402
from megascale_moe.strategies import routing  # noqa: E402
from megascale_moe.strategies.fit import mesh_of  # noqa: E402
from megascale_moe.train.profiling import STEPS  # noqa: E402
from megascale_moe.train.trainer import Trainer  # noqa: E402

CPU = torch.device("cpu")
H_FFN = 768
"""Width of Qwen3-30B-A3B's experts: links are in proportion to that, on an H800's NVLink."""
MODEL = ModelConfig(
    layers=4, hidden=256, heads=8, kv_heads=2, experts=8, top_k=2, ffn_hidden=448, shared_experts=1, vocab=256,
    sequence_length=256, init_std=0.02, balance_loss=0.01,
)  # fmt: skip
SEQUENCES = 8


@dataclass(frozen=True)
class Variant(bench_overlap.Variant):
    """A way to train."""

    micro_batch: int = 4

    @property
    def config(self) -> Config:
        """Of a run."""
        train = TrainConfig(global_batch=SEQUENCES, micro_batch=self.micro_batch, steps=1000, compile="off")
        return Config(model=MODEL, parallel=self.parallel, overlap=self.overlap, wire=self.wire, train=train)


def variants(ranks: int, node: int) -> list[Variant]:
    """Layouts of so many ranks in nodes of so many, each differing from one before it in one or two things."""
    inner = node if node > 1 else ranks  # ranks that share a layer
    together = ParallelConfig(dp=ranks // inner, node=inner, dispatch="all_gather")
    rows = replace(together, dispatch="all_to_all")
    tensor = replace(together, attention="tp", ffn="tp")
    data = ParallelConfig(dp=ranks, node=1, ep=1)
    spread_out = ParallelConfig(dp=ranks // node, node=node, ep=ranks, dispatch="all_to_all")
    stages = ParallelConfig(pp=ranks // node, dp=1, node=node)
    paper, scheduled = OverlapConfig(order="paper"), OverlapConfig(order="scheduled")
    largest = SEQUENCES // ranks  # micro-batch of data parallelism alone
    both = replace(together, ffn="ep+tp", ep=ranks // 2, etp=2)
    return [
        Variant("sp+ep, all-to-all", rows),
        Variant("sp+ep, all-gather", together),
        Variant("sp+tp", replace(tensor, attention="sp")),
        Variant("tp+ep", replace(together, attention="tp")),
        Variant("tp+tp", tensor),
        *([Variant("sp+ep+tp", both)] if ranks > 2 else []),
        Variant("sp+ep, all-to-all, micro-batches of 2", rows, micro_batch=2),
        *([Variant("sp+ep, all-to-all, micro-batches of 8", rows, micro_batch=8)] if inner == ranks else []),
        Variant("sp+ep, paper order", together, paper),
        Variant("sp+ep, scheduled", together, scheduled),
        Variant("tp+tp, scheduled", tensor, scheduled),
        Variant("sp+ep, scheduled, split in 2", together, replace(scheduled, split="2")),
        Variant("sp+ep, full remat", together, OverlapConfig(remat="full")),
        Variant("sp+ep, BF16 on the wire", together, wire=WireConfig(activations="bf16")),
        Variant("tp+tp, BF16 on the wire", tensor, wire=WireConfig(activations="bf16")),
        Variant("dp", data, micro_batch=largest),
        Variant("dp, hidden", data, scheduled, micro_batch=largest),
        Variant("dp, BF16 on the wire", data, wire=WireConfig(gradients="bf16", parameters="bf16"),
                micro_batch=largest),
        Variant("dp, ep over nodes, all-to-all", spread_out),
        Variant("dp, ep over nodes, all-gather, scheduled", replace(spread_out, dispatch="all_gather"), scheduled),
        Variant("pp, 1F1B", stages, micro_batch=2),
        Variant("pp, 1F1B, micro-batches of 4", stages),
        Variant("pp, interleaved", replace(stages, schedule="interleaved", virtual_stages=2), micro_batch=2),
        Variant("pp, zero bubble", replace(stages, schedule="zero_bubble"), micro_batch=2),
    ]  # fmt: skip


# --- on the ranks ----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """On rank 0."""
    if dist.get_rank() == 0:
        print(f"  {text}", file=sys.stderr, flush=True)


def meet(axes: Axes) -> None:
    """Let every group make its connections, whose threads then exist."""
    for axis in axes.values():
        if axis.group is not None:
            dist.barrier(axis.group)


def measured_profile(where: Cluster) -> MachineFigures:
    """The cluster's, on every rank."""
    shape = where.shape
    mesh = Mesh(dp=shape.ranks // shape.node, node=shape.node, ep=shape.node)
    axes = connect(mesh)
    meet(axes)
    cores.take(dist.get_rank())
    seen: set[str] = set()

    def progress(what: str, done: int, total: int) -> None:
        if what not in seen:
            say(what)
        seen.add(what)

    return MachineMeter(axes, mesh, CPU, "fp32", progress=progress).everything()


class Runner:
    """One layout on one rank."""

    def __init__(self, variant: Variant, ranks: int, made: dict[Any, Any]) -> None:
        self.config, self.ranks = variant.config, ranks
        self.mesh = mesh_of(variant.parallel, MODEL, ranks)
        self.axes = connect(self.mesh, made=made)
        meet(self.axes)
        self.trainer = Trainer(self.config, self.mesh, self.axes, CPU)
        self.trainer.initialise()
        self.done = 0

    def step(self) -> tuple[float, list[Event]]:
        """Seconds from a barrier to the end of the last rank, and this rank's events."""
        mine = batches(self.config, self.axes["tensor_data"].index, self.done)
        dist.barrier()
        start = now()
        result = self.trainer.step(mine, self.config.train.global_batch * MODEL.sequence_length)
        self.done += 1
        return over_ranks(now() - start, self.ranks), result.trace.events


def by_kind(trainer: Trainer, events: Sequence[Event], profile: Profile) -> dict[str, list[float]]:
    """Kind of operator -> [how many, seconds of a trace, seconds by their prices], to see what is mispriced."""
    train, mesh = trainer.config.train, trainer.mesh
    plan, _ = trainer.program(train.micro_batch, train.global_batch // mesh.dp // train.micro_batch, "train")
    hidden = trainer.optimizer.hidden(plan.ops) if trainer.hides else [*plan.ops, *trainer.optimizer.ops]
    prices, found = Prices.of(profile, trainer.dtype, mesh), dict[str, list[float]]()
    for op, event in zip(hidden, events, strict=True):
        name = " ".join(kind_of(op)[::-1]) + ("" if op.stream == Stream.COMPUTE else " *")
        numbers = found.setdefault(name, [0, 0.0, 0.0])
        for place, number in enumerate((1, event.end - event.start, prices.seconds(op))):
            numbers[place] = round(numbers[place] + number, 6)
    return found


def on_rank(chosen: Sequence[Variant], ranks: int, rounds: int, profile: Profile) -> dict[str, dict[str, Any]]:
    """Seconds of every round by variant, and where the last one's went; seconds are the same on every rank."""
    routing.route = balanced_route  # type: ignore[assignment]
    made: dict[Any, Any] = {}
    runners = {variant.name: Runner(variant, ranks, made) for variant in chosen}
    cores.take(dist.get_rank())
    for name, runner in runners.items():
        for _ in range(STEPS + 1 if runner.trainer.profiler else 1):
            took, _ = runner.step()
        say(f"{name}: {took:.2f} s")
    found: dict[str, dict[str, Any]] = {name: {"all": []} for name in runners}
    names = list(runners)
    for done in range(rounds):
        for place in range(len(names)):
            name = names[(place + done) % len(names)]
            took, events = runners[name].step()
            found[name]["all"].append(took)
            found[name]["kinds"] = by_kind(runners[name].trainer, events, profile)
        say(f"rounds: {done + 1} of {rounds}")
    return found


# --- what came out ---------------------------------------------------------------------------------------------------


def row(variant: Variant, found: dict[str, Any], ranks: int, profile: Profile) -> dict[str, Any]:
    """Of one layout."""
    said, took = price(variant.config, profile, ranks), median(found["all"])
    return {
        "variant": variant.name, "median": took, "spread": spread(found["all"]), "unit": "s", "all": found["all"],
        "predicted": said.seconds, "error": said.seconds / took - 1, "exposed_s": said.exposed,
        "synchronisation_s": said.synchronisation, "bubble": said.bubble,
    }  # fmt: skip


def ranking(numbers: Sequence[float]) -> list[int]:
    """The place of each among all."""
    order = sorted(numbers)
    return [order.index(number) for number in numbers]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all: errors, Spearman's rank correlation, and how far the layout predicted to be fastest is from the best."""
    errors = [abs(row["error"]) for row in rows]
    places = [ranking([row[key] for row in rows]) for key in ("predicted", "median")]
    count, best = len(rows), min(row["median"] for row in rows)
    apart = sum((said - took) ** 2 for said, took in zip(*places, strict=True))
    pick = min(rows, key=lambda row: row["predicted"])
    return {
        "layouts": count, "mean_error": fmean(errors), "worst_error": max(errors),
        "rank_correlation": 1 - 6 * apart / (count * (count * count - 1)), "pick": pick["variant"],
        "pick_over_best": pick["median"] / best - 1, "slowest_over_best": max(row["median"] for row in rows) / best,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people, fastest first."""
    heads = ("layout", "predicted ms", "measured ms", "spread ms", "error")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for found in sorted(rows, key=lambda row: row["median"]):
        numbers = (f"{found[key] * 1e3:.0f}" for key in ("predicted", "median", "spread"))
        lines.append(f"| {found['variant']} | {' | '.join(numbers)} | {found['error']:+.1%} |")
    return "\n".join(lines)


def sentence(found: dict[str, Any]) -> str:
    """The summary for people."""
    return (
        f"{found['layouts']} layouts, the slowest {found['slowest_over_best']:.2f} times the fastest: mean error "
        f"{found['mean_error']:.1%}, worst {found['worst_error']:.1%}, rank correlation "
        f"{found['rank_correlation']:.3f}; the pick ({found['pick']}) is {found['pick_over_best']:.1%} over the best"
    )


def show(found: dict[str, Any]) -> None:
    """Print it."""
    print(f"{table(found['rows'])}\n\n{sentence(found['summary'])}", flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """A profile and then the layouts, all on one cluster."""
    cores.check(options.ranks)
    flops = gemm_rates(options.ranks)
    links = balance(NODES["h800"], "fp32", flops, H_FFN / MODEL.ffn_hidden)
    rate = options.bits or links.intra
    between = rate / 4 if options.node > 1 else rate  # as a network card's to NVLink
    shape = Shape(options.ranks, options.node, rate, between)
    print(f"{flops['fp32'] / 1e9:.1f} GFLOP/s a rank, links {shape.intra / 1e6:.0f} and {shape.inter / 1e6:.0f} Mbit/s",
          file=sys.stderr, flush=True)  # fmt: skip
    chosen = [variant for variant in variants(options.ranks, options.node) if options.only in variant.name]
    with cluster(shape) as made:
        path = options.profile
        if path is None:
            found = run_on_cluster(made, measured_profile, made, timeout=300.0)[0]
            path = options.folder / f"profile-{options.ranks}x{options.node}.toml"
            path.write_text(profile(found, memory_of(CPU, options.ranks), header(CPU)), encoding="utf-8")
        measured_on = load(str(path))
        seconds = run_on_cluster(made, on_rank, chosen, options.ranks, options.rounds, measured_on, timeout=900.0)[0]
    rows = [row(variant, seconds[variant.name], options.ranks, measured_on) for variant in chosen]
    return {
        "name": "planner layouts", "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(sys.argv), "machine": header(CPU)[0], "torch": torch.__version__, "cores": os.cpu_count(),
        "ranks": options.ranks, "gemm_flops": flops, "links": asdict(shape), "model": asdict(MODEL),
        "sequences": SEQUENCES, "profile": path.read_text(encoding="utf-8"), "summary": summary(rows), "rows": rows,
        "kinds": {name: found["kinds"] for name, found in seconds.items()},
    }  # fmt: skip


def again(found: dict[str, Any], beside: float) -> dict[str, Any]:
    """Results with the predictions of today's code from their profile.

    Args:
        beside: microseconds of links whose profile does not say it (`planner.cluster.Link`).
    """
    lines = found["profile"].splitlines()
    if "beside_us" not in found["profile"]:
        lines = [f"{line}\nbeside_us = {beside:g}" if line.startswith("peer_us") else line for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.toml"
        path.write_text("\n".join(lines), encoding="utf-8")
        profile = load(str(path))
    known = {row["variant"]: row for row in found["rows"]}
    chosen = [each for each in variants(found["ranks"], found["links"]["node"]) if each.name in known]
    rows = [row(variant, known[variant.name], found["ranks"], profile) for variant in chosen]
    return found | {"rows": rows, "summary": summary(rows)}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="a core each, or as many for each")
    parser.add_argument("--node", type=int, default=1, help="ranks of a node; with 1 all messages leave it")
    parser.add_argument("--rounds", type=int, default=8, help="measured steps of each layout")
    parser.add_argument("--bits", type=float, help="bits/s of a link (default: in proportion)")
    parser.add_argument("--profile", type=Path, help="use this one, do not measure")
    parser.add_argument("--only", default="", help="layouts with this in their names")
    parser.add_argument("--folder", type=Path, default=HERE, help="of the profile and the results")
    parser.add_argument("--write", action="store_true", help="write results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print results and do nothing else")
    parser.add_argument("--again", action="store_true", help="with --table: predict again from the results' profile")
    parser.add_argument("--beside", type=float, default=0.0, metavar="US", help="with --again, of profiles without it")
    options = parser.parse_args()
    if options.table:
        found = json.loads(options.table.read_text(encoding="utf-8"))
        show(again(found, options.beside) if options.again else found)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    found = measure(options)
    show(found)
    if options.write:
        text = json.dumps(found) + "\n"
        (options.folder / f"results-{options.ranks}x{options.node}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
