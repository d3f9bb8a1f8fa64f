"""Dispatch plus combine by all-to-all against all-gather plus reduce-scatter, for k = 1 .. 8 (paper, Figure 7).

    python benchmarks/dispatch/run.py [--ranks 2] [--tokens 1024] [--hidden 1024]

Forks gloo ranks on this machine and moves the messages of one MoE layer with balanced routing. The crossing point and
the ratio of time per byte are what `megascale_moe.strategies.layout.cheaper_dispatch` rests on. Writes results-N.json
beside this file with --write.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from megascale_moe.comm.axis import Axis, connect
from megascale_moe.comm.collectives import Pending, all_gather, exchange, reduce_scatter
from megascale_moe.comm.mesh import Mesh
from megascale_moe.testing import run_ranks
from megascale_moe.train.hardware import cpu_model

TOP_K = (1, 2, 3, 4, 5, 6, 7, 8)


def forms(axis: Axis, tokens: int, hidden: int) -> dict[str, Callable[[], list[Pending]]]:
    """What one layer sends, by form; each call waits for both directions."""
    x = torch.randn(tokens, hidden)
    everyone = torch.randn(tokens * axis.size, hidden)

    def swap(k: int) -> list[Pending]:
        rows = torch.randn(1, hidden).expand(tokens * k, hidden).contiguous().split(tokens * k // axis.size)
        out, back = (exchange(rows, [torch.empty_like(part) for part in rows], axis, tag) for tag in (1, 2))
        out.wait()
        back.wait()
        return [out, back]

    def gather() -> list[Pending]:
        out = all_gather(x, axis, 3)
        out.wait()
        back = reduce_scatter(everyone, axis, 4)
        back.wait()
        return [out, back]

    return {f"all_to_all k={k}": (lambda k=k: swap(k)) for k in TOP_K} | {"all_gather": gather}


def rank_times(tokens: int, hidden: int, ranks: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Median milliseconds and bytes sent of each form on this rank; forms interleaved."""
    axis = connect(Mesh(node=ranks, ep=ranks))["ep"]
    work = forms(axis, tokens, hidden)
    times: dict[str, list[float]] = {name: [] for name in work}
    sent: dict[str, int] = {}
    for _ in range(rounds + 1):
        for name, call in work.items():
            torch.distributed.barrier(axis.group)
            start = time.perf_counter()
            sent[name] = sum(pending.wire_bytes for pending in call())
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (median(values[1:]), sent[name]) for name, values in times.items()}


def main() -> None:
    """Measure, print, and with --write keep the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="per rank")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true")
    o = parser.parse_args()
    results = run_ranks(o.ranks, rank_times, o.tokens, o.hidden, o.ranks, o.rounds, timeout=300)
    rows = [
        {"form": name, "ms": round(max(r[name][0] for r in results), 2), "bytes": results[0][name][1]}
        for name in results[0]
    ]
    for row in rows:
        print(f"{row['form']:16} {row['ms']:8.2f} ms {row['bytes'] / 1e6:8.2f} MB sent per rank")
    if o.write:
        document = {
            "command": f"python benchmarks/dispatch/run.py --ranks {o.ranks} --tokens {o.tokens} --hidden {o.hidden}",
            "machine": cpu_model(),
            "torch": torch.__version__,
            "link": "loopback",
            "rows": rows,
        }
        path = Path(__file__).parent / f"results-{o.ranks}.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
