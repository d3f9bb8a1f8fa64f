"""What compression brings on top of overlap, and whether communication gets shorter as its messages do.

    python benchmarks/wire/run.py --write      # as root; twenty minutes on a quiet machine of two cores

Inside a node: the layers and links of benchmarks/overlap, the same steps with activations and their gradients in other
formats. Between nodes: the synchronisation of a copy of Internal-352B over two nodes of two ranks, nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.cluster.cluster import Cluster, Shape, cluster  # noqa: E402
from benchmarks.cluster.iso import NODES, balance, gemm_rates  # noqa: E402
from benchmarks.cluster.ranks import run_on_cluster  # noqa: E402
from benchmarks.overlap.nodes import DATA, H_FFN, MODEL, NODE, RANKS  # noqa: E402
from benchmarks.overlap.run import CASES, measure  # noqa: E402
from megascale_moe.bench.overlap import Variant  # noqa: E402
from megascale_moe.bench.timed import over_ranks, spread  # noqa: E402
from megascale_moe.comm import collectives  # noqa: E402
from megascale_moe.comm.axis import connect  # noqa: E402
from megascale_moe.config import OverlapConfig, ParallelConfig, WireConfig  # noqa: E402
from megascale_moe.engine.executor import Program, resolve  # noqa: E402
from megascale_moe.engine.trace import Trace, now  # noqa: E402
from megascale_moe.optim import narrow_sums  # noqa: E402
from megascale_moe.optim.groups import flat_groups  # noqa: E402
from megascale_moe.optim.sharded import gather_all  # noqa: E402
from megascale_moe.optim.sync import given, reduce, shard_of, updated  # noqa: E402
from megascale_moe.pipeline.program import StepPlan  # noqa: E402
from megascale_moe.strategies.fit import mesh_of  # noqa: E402
from megascale_moe.strategies.weights import placements  # noqa: E402

FORMATS = ("fp32", "bf16", "fp8")
SCHEDULED = OverlapConfig(order="scheduled")
TOGETHER = OverlapConfig(order="scheduled", micro_batches=2)


def variants(parallel: ParallelConfig) -> list[Variant]:
    """Overlap alone, and with each format; the Megatron-style layout first."""

    def of(attention: str, ffn: str) -> ParallelConfig:
        return replace(parallel, attention=attention, ffn=ffn, ep=0 if ffn == "ep" else 1)  # type: ignore[arg-type]

    found = []
    for name, layout, overlap in (
        ("tp+tp", of("tp", "tp"), OverlapConfig()), ("sp+ep, scheduled", of("sp", "ep"), SCHEDULED),
        ("sp+ep, two micro-batches", of("sp", "ep"), TOGETHER),
    ):  # fmt: skip
        for wire in FORMATS:
            label = name if wire == "fp32" else f"{name}, {wire}"
            found.append(Variant(label, layout, overlap, WireConfig(activations=wire)))  # type: ignore[arg-type]
    return found


def inside_table(found: dict[str, Any]) -> str:
    """For people; the ratio of communication is to the same variant in FP32."""
    heads = ("", "ms", "spread", "tokens/s", "x", "MB sent", "communicating alone ms", "of fp32's bytes",
             "of fp32's time", "ms over the longer")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for place, row in enumerate(found["rows"]):
        plain = found["rows"][place // len(FORMATS) * len(FORMATS)]
        alone = row["communicating_alone_s"]
        lines.append(
            f"| {row['variant']} | {row['median'] * 1e3:.0f} | {row['spread'] * 1e3:.0f} | {row['tokens_per_s']:.0f} | "
            f"{found['rows'][0]['median'] / row['median']:.2f} | {row['wire_bytes'] / 1e6:.1f} | {alone * 1e3:.0f} | "
            f"{row['wire_bytes'] / plain['wire_bytes']:.2f} | {alone / plain['communicating_alone_s']:.2f} | "
            f"{row['median'] / max(row['computing_alone_s'], alone):.2f} |"
        )
    return "\n".join(lines)


# --- between nodes ---------------------------------------------------------------------------------------------------


def sync_on_rank(where: Cluster, rounds: int) -> list[dict[str, Any]]:
    """Seconds of the reduction of all gradients and of the gathering of all weights, by format."""
    axes = connect(mesh_of(DATA, MODEL, RANKS))
    plan = StepPlan(MODEL, DATA, axes, torch.float32, 1)
    weights = placements(MODEL, plan.layout, plan.part)
    programs: dict[tuple[str, str], tuple[Program, dict[str, Any]]] = {}
    for name in FORMATS:
        wire = WireConfig(gradients=name, parameters=name)  # type: ignore[arg-type]
        groups = flat_groups(weights, axes, torch.float32, torch.device("cpu"), wire=wire)
        reductions = Program(reduce(groups), given(groups), [shard_of(group) for group in groups])
        programs["gradients", name] = reductions, given(groups)
        programs["parameters", name] = gather_all(groups), updated(groups)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    alone: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    sent: dict[tuple[str, str], list[int]] = {}
    messages = {key: messages_of(program, values) for key, (program, values) in programs.items()}
    for done in range(rounds + 1):
        for key, (program, values) in programs.items():
            alone[key].append(communicating(messages[key]))
            dist.barrier()
            before, start, trace = where.traffic()[dist.get_rank()], now(), Trace()
            left = program.run(dict(values), {}, trace=trace)
            for name in list(left):
                resolve(left, name)
            took = over_ranks(now() - start, RANKS)
            if done:
                seconds[key].append(took)
            on_link = where.traffic()[dist.get_rank()].sent_inter - before.sent_inter
            sent[key] = [sum(trace.wire_bytes().values()), on_link]
    return [
        {"what": what, "format": name, "median": median(times), "spread": spread(times), "unit": "s",
         "communicating_alone_s": median(alone[what, name][1:]), "all_communicating_alone": alone[what, name][1:],
         "wire_bytes": sent[what, name][0], "inter_bytes_on_the_link": sent[what, name][1], "all": times}
        for (what, name), times in seconds.items()
    ]  # fmt: skip


def messages_of(program: Program, values: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What the list exchanges: arguments of `exchange`, in order."""
    found: list[tuple[Any, ...]] = []
    right = collectives.exchange

    def noted(*arguments: Any) -> Any:
        found.append(arguments)
        return right(*arguments)

    with mock.patch.object(collectives, "exchange", noted), mock.patch.object(narrow_sums, "exchange", noted):
        left = program.run(dict(values), {})
        for name in list(left):
            resolve(left, name)
    return found


def communicating(messages: list[tuple[Any, ...]]) -> float:
    """Seconds of the same messages one after the other, nothing cast or summed."""
    dist.barrier()
    start = now()
    for arguments in messages:
        collectives.exchange(*arguments).wait()
    return over_ranks(now() - start, RANKS)


def between_nodes(rounds: int) -> dict[str, Any]:
    """The synchronisation on links in proportion to an H800 node and its network cards."""
    rates = gemm_rates(RANKS)
    links = balance(NODES["h800"], "fp32", rates, H_FFN / MODEL.ffn_hidden)
    shape = Shape(RANKS, NODE, links.intra, links.inter)
    with cluster(shape) as made:
        rows = run_on_cluster(made, sync_on_rank, made, rounds, timeout=1800.0)[0]
    return {
        "name": "wire between nodes", "torch": torch.__version__, "links": asdict(shape), "model": asdict(MODEL),
        "rows": rows,
    }  # fmt: skip


def between_table(found: dict[str, Any]) -> str:
    """For people."""
    heads = ("", "format", "ms", "spread", "of fp32's", "MB sent", "of fp32's bytes", "communicating alone ms",
             "of fp32's time")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    plain = {row["what"]: row for row in found["rows"] if row["format"] == "fp32"}
    for row in found["rows"]:
        first = plain[row["what"]]
        lines.append(
            f"| {row['what']} | {row['format']} | {row['median'] * 1e3:.0f} | {row['spread'] * 1e3:.0f} | "
            f"{row['median'] / first['median']:.2f} | {row['wire_bytes'] / 1e6:.1f} | "
            f"{row['wire_bytes'] / first['wire_bytes']:.2f} | {row['communicating_alone_s'] * 1e3:.0f} | "
            f"{row['communicating_alone_s'] / first['communicating_alone_s']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "nodes", "all"], default="all")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--write", action="store_true", help="write results-CASE.json")
    options = parser.parse_args()
    work = {name: partial(measure, name, options.ranks, options.rounds, 1.0, "fp32", variants) for name in CASES}
    chosen: Sequence[str] = [*CASES, "nodes"] if options.case == "all" else [options.case]
    for name in chosen:
        found = between_nodes(options.rounds) if name == "nodes" else work[name]()
        print(f"\n{name}\n\n{between_table(found) if name == 'nodes' else inside_table(found)}\n", flush=True)
        if options.write:
            path = HERE / f"results-{name}{'' if name == 'nodes' else f'-{options.ranks}-ranks'}.json"
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
