"""What the paper's model, and others, take on clusters that are not here: every dry run that the documents cite.

    .venv/bin/python benchmarks/dryrun/run.py           # five minutes on one core; prints tables, writes results.json

Nothing here is a time on a GPU. Bytes, FLOPs and memory are counted from the operators that a rank would run; only the
seconds that the dry run itself takes are measured.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megascale_moe.config import load
from megascale_moe.presets import PRESETS
from megascale_moe.tools.dryrun.step import dry_run

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "internal-352b.toml"
STRATEGIES = [("sp", "ep"), ("sp", "tp"), ("tp", "ep"), ("tp", "tp")]

CASES: dict[str, tuple[int, list[str]]] = {
    **{
        f"Internal-352B, {attention}+{ffn}": (1440, [f"parallel.attention={attention}", f"parallel.ffn={ffn}"])
        for attention, ffn in STRATEGIES
    },
    "Internal-352B, 12,288 ranks": (12288, ["parallel.pp=16", "train.global_batch=6144"]),
    "Qwen3-235B-A22B, experts over 4 nodes": (
        1024, ["model.preset=qwen3-235b-a22b", "parallel.pp=8", "parallel.ep=32", "train.global_batch=1024"],
    ),
    "Qwen3-235B-A22B, 12,288 ranks": (
        12288, ["model.preset=qwen3-235b-a22b", "parallel.pp=8", "parallel.ep=32", "train.global_batch=6144"],
    ),
    "DeepSeekMoE, 64 ranks": (64, ["model.preset=paper-deepseek-moe", "parallel.pp=1", "train.global_batch=64"]),
    "DeepSeekMoE, 12,288 ranks": (
        12288, ["model.preset=paper-deepseek-moe", "parallel.pp=1", "train.global_batch=12288"],
    ),
}  # fmt: skip


MESSAGES_OF = {"Internal-352B, 12,288 ranks"}
"""Cases of more than 2,000 ranks whose messages are compared all the same: it takes minutes."""


def run(gpus: int, overrides: list[str], messages: bool) -> dict[str, Any]:
    """One dry run of rank 0."""
    start = time.monotonic()
    config = load(CONFIG, overrides, PRESETS)
    found = dry_run(config, gpus, 0, all_ranks=messages).document()
    return {"gpus": gpus, "overrides": overrides, "seconds": time.monotonic() - start, **found}


def per_layer(case: dict[str, Any], names: tuple[str, ...], phase: str) -> float:
    """Bytes that some operators send in one layer of one micro-batch."""
    messages = [wire for wire in case["rank"]["wire"] if wire["op"] in names and wire["phase"] == phase]
    return sum(wire["bytes"] / wire["count"] for wire in messages)


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Memory of rank 0, GB."""
    heads = ["", "parameters", "gradients", "optimizer", "activations", "buffers", "peak", "bubble", "messages agree"]
    lines = ["| " + " | ".join([*heads, "seconds"]) + " |", "|---" * 10 + "|"]
    for name, case in cases.items():
        memory = " | ".join(f"{value / 1e9:.2f}" for value in case["rank"]["memory"].values())
        agreement = case["agreement"]
        agreed = "not asked" if agreement is None else agreement["disagreement"] or f"{agreement['ranks']:,} ranks"
        lines.append(f"| {name} | {memory} | {case['bubble']:.1%} | {agreed} | {case['seconds']:.0f} |")
    return "\n".join(lines)


ATTENTION = ("scatter_heads", "gather_heads", "gather_tokens", "scatter_tokens")
FFN = ("dispatch_all_to_all", "combine_all_to_all", "dispatch_all_gather", "combine_reduce_scatter")


def volumes(cases: dict[str, dict[str, Any]]) -> str:
    """Forward bytes of a layer, counted, beside the paper's formulas (elements of two bytes, b s h of one sequence)."""
    bsh, n, m, k = 8192 * 4096, 8, 4, 3
    formulas = {
        "sp": (2 + 2 / m) * (n - 1) / n**2, "tp": 2 * (n - 1) / n, "ep": 2 * k / n * (n - 1) / n,
    }  # fmt: skip
    lines = ["| | attention MB | formula | FFN MB | formula |", "|---" * 5 + "|"]
    for attention, ffn in STRATEGIES:
        case = cases[f"Internal-352B, {attention}+{ffn}"]
        cells = []
        for names, strategy in ((ATTENTION, attention), (FFN, ffn)):
            cells += [f"{per_layer(case, names, 'F') / 1e6:.2f}", f"{2 * bsh * formulas[strategy] / 1e6:.2f}"]
        lines.append(f"| {attention}+{ffn} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all, print, and write results.json."""
    cases = {}
    for name, (gpus, overrides) in CASES.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        cases[name] = run(gpus, overrides, gpus <= 2000 or name in MESSAGES_OF)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(table(cases), volumes(cases), sep="\n\n")
    print(f"\nlargest memory of this process: {peak / 1e9:.2f} GB")
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    document = {"command": "python benchmarks/dryrun/run.py", "machine": machine, "process_peak_bytes": peak,
                "cases": cases}  # fmt: skip
    (HERE / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
