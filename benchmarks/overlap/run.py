"""The ablation on wires in proportion: layouts, orders and splits of copies of two of the paper's layers.

    python benchmarks/overlap/run.py --write      # as root; a quarter of an hour on a quiet machine of two cores

Ranks on a cluster of network namespaces (benchmarks/cluster), four or with `--ranks 8` as many as a node of the paper
has. The layers are small copies with the proportions of
the paper's (experts, top-k, heads per key head, expert width per hidden size); the links are set so that R, the ratio
of computation to communication of an expert, is that of a rank of an 8-GPU H800 node with the real layer's width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.cluster.cluster import Shape, cluster  # noqa: E402
from benchmarks.cluster.iso import NODES, balance, gemm_rates, ratio  # noqa: E402
from benchmarks.cluster.ranks import run_on_cluster  # noqa: E402
from megascale_moe.bench.overlap import Variant, bench_overlap, document, variants  # noqa: E402
from megascale_moe.config import Config, ModelConfig, ParallelConfig, TrainConfig  # noqa: E402
from megascale_moe.kernels.allocator import keep_freed_memory  # noqa: E402
from megascale_moe.strategies import routing  # noqa: E402
from megascale_moe.train.hardware import available_cores  # noqa: E402

Chosen = Callable[[ParallelConfig], Sequence[Variant]]


@dataclass(frozen=True)
class Case:
    """A copy of a layer. `h_ffn` is the real layer's expert width."""

    model: ModelConfig
    h_ffn: int
    micros: int = 2


CASES = {
    "352B": Case(
        ModelConfig(
            layers=1, hidden=1024, heads=32, kv_heads=8, experts=8, top_k=3, ffn_hidden=3584, shared_experts=1,
            vocab=64, sequence_length=512, init_std=0.02, balance_loss=0.01,
        ),
        h_ffn=14336, micros=4,
    ),
    "DeepSeekMoE": Case(
        ModelConfig(
            layers=1, hidden=512, heads=8, kv_heads=8, experts=16, top_k=6, ffn_hidden=352, shared_experts=2,
            vocab=64, sequence_length=1024, init_std=0.02, balance_loss=0.01,
        ),
        h_ffn=1408, micros=4,
    ),
}  # fmt: skip


def balanced_route(logits: Tensor, bias: Tensor | None, c: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Every expert gets equally many tokens from every rank, as peers' options to force balance do.

    A router that was just initialised sends some ranks twice their share, and waiting for them would be taken for
    communication.
    """
    tokens = torch.arange(len(logits), device=logits.device)[:, None]
    choice = (tokens * c.top_k + torch.arange(c.top_k, device=logits.device)) % c.experts
    probabilities = logits.softmax(-1)
    return probabilities.gather(1, choice), choice, probabilities


def on_rank(config: Config, rounds: int, chosen: Chosen) -> list[dict[str, Any]]:
    """The rows, the same on every rank."""
    routing.route = balanced_route  # type: ignore[assignment]
    keep_freed_memory()
    lead = dist.get_rank() == 0

    def progress(what: str, done: int, total: int) -> None:
        if lead:
            print(f"  {what}: {done} of {total}", file=sys.stderr, flush=True)

    return bench_overlap(config, dist.get_world_size(), rounds, progress, chosen)


def measure(
    name: str, ranks: int, rounds: int, scale: float, dtype: str, chosen: Chosen = variants
) -> dict[str, Any]:
    """One case on links `scale` times those in proportion."""
    case = CASES[name]
    rates = gemm_rates(ranks)
    links = balance(NODES["h800"], dtype, rates, case.h_ffn / case.model.ffn_hidden)
    shape = Shape(ranks, ranks, links.intra * scale, links.inter * scale)
    node = NODES["h800"]
    real = ratio(case.h_ffn, node.nvlink, node.peak, 2)
    here = ratio(case.model.ffn_hidden, shape.intra / 8, rates[dtype], 4 if dtype == "fp32" else 2)
    print(
        f"{name}: {rates[dtype] / 1e9:.1f} GFLOP/s per rank, links {shape.intra / 1e6:.0f} Mbit/s; "
        f"R of the node {real:.2f}, of the cluster {here:.2f}", file=sys.stderr, flush=True,
    )  # fmt: skip
    config = Config(
        model=case.model, parallel=ParallelConfig(dp=1, node=ranks),
        train=TrainConfig(global_batch=case.micros, micro_batch=1, dtype=dtype),  # type: ignore[arg-type]
    )  # fmt: skip
    with cluster(shape) as made:
        before = made.traffic()
        rows = run_on_cluster(made, on_rank, config, rounds, chosen, timeout=1800.0)[0]
        sent = [asdict(now - then) for now, then in zip(made.traffic(), before, strict=True)]
    found = document(config, ranks, rows)
    return found | {
        "case": name, "gemm_flops": rates, "link_bits_per_s": shape.intra, "R_node": real, "R_cluster": here,
        "counters": sent, "link_scale": scale, "dtype": dtype, "cores": min(available_cores(), ranks),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """For people: tokens/s and ratios to the first variant."""
    rows = found["rows"]
    first = rows[0]
    heads = ("", "ms", "spread", "tokens/s", "x", "ranks wait ms", "of the first's", "cores idle ms", "of the first's",
             "alone: computing", "communicating", "ms over the longer")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [
        f"| {row['variant']} | {row['median'] * 1e3:.0f} | {row['spread'] * 1e3:.0f} | {row['tokens_per_s']:.0f} | "
        f"{first['median'] / row['median']:.2f} | {row['exposed_s'] * 1e3:.0f} | "
        f"{row['exposed_s'] / first['exposed_s']:.0%} | {idle(row, found) * 1e3:.0f} | "
        f"{idle(row, found) / idle(first, found):.0%} | "
        f"{row['computing_alone_s'] * 1e3:.0f} | "
        f"{row['communicating_alone_s'] * 1e3:.0f} | "
        f"{row['median'] / max(row['computing_alone_s'], row['communicating_alone_s']):.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def idle(row: dict[str, Any], found: dict[str, Any]) -> float:
    """Seconds of a step in which a core of this machine had nothing to do: ranks that share cores wait for each other
    also where every core is busy.
    """
    return float(row["median"] - row["cpu_s"] / found["cores"])


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--link-scale", type=float, default=1.0, help="links times this; 0.43: see README.md")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--write", action="store_true", help="write results-CASE.json")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print results and do nothing else")
    options = parser.parse_args()
    for path in options.table or []:
        found = json.loads(path.read_text(encoding="utf-8"))
        print(f"{path.name}\n\n{table(found)}\n")
    if options.table:
        return
    for name in CASES if options.case == "all" else [options.case]:
        found = measure(name, options.ranks, options.rounds, options.link_scale, options.dtype)
        print(f"\n{name}\n\n{table(found)}\n", flush=True)
        if options.write:
            path = HERE / f"results-{name}-{options.dtype}-{options.ranks}-ranks-x{options.link_scale:g}.json"
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
