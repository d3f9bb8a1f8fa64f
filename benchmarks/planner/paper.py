"""The paper's own tables beside predictions, and every row of validation.csv: prints tables, writes paper.json.

    python benchmarks/planner/paper.py

Nothing is chosen here: profiles and habits are those of `megascale_moe/planner/stacks/`; what was in sight when they
were written is said in docs/planner.md. What the paper does not say and this file assumes stands in ASSUMED and goes
into the results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megascale_moe.config import Config, ModelConfig, OverlapConfig, ParallelConfig, TrainConfig, WireConfig
from megascale_moe.model.counts import counts
from megascale_moe.planner.cluster import Cluster, load
from megascale_moe.planner.step import StepPrice, memory, price
from megascale_moe.presets import PRESETS
from megascale_moe.tools.validation.validate import RowResult, Validation, validate
from megascale_moe.train.progress import counted_progress

HERE = Path(__file__).parent
OURS, MEGATRON = "megascale-moe-h800", "megatron-2024-h800"
ASSUMED = {
    "strong scaling": "MegaScale-MoE has two stages per pipeline rank, Megatron-LM one and full recomputation, without "
    "which its ranks need 78.0 of 76 GB by our count",
    "ablation": "all four with 720 sequences, gradients in BF16, the paper's rematerialization and hidden gradients",
    "parallelism": "352B: four layers, as many as a rank of the pipeline has; DeepSeekMoE: all; 32 sequences a step in "
    "micro-batches of one, nothing hidden, nothing recomputed",
    "mixtral": "the batch follows from MFU and step time, 64 sequences (rounded to a multiple of four) for either "
    "system; no pipeline, micro-batches of one; Megatron-LM recomputes where it must",
}


def config(
    model: ModelConfig, parallel: ParallelConfig, overlap: OverlapConfig, batch: int, gradients: str = "bf16"
) -> Config:
    """Of a run in BF16, in micro-batches of one sequence."""
    return Config(
        model=model, parallel=parallel, overlap=overlap, wire=WireConfig(gradients=gradients),  # type: ignore[arg-type]
        train=TrainConfig(dtype="bf16", global_batch=batch, micro_batch=1),
    )  # fmt: skip


def layout(attention: str, ffn: str, pp: int = 1, stages: int = 1) -> ParallelConfig:
    """In nodes of eight."""
    return ParallelConfig(
        pp=pp, node=8, attention=attention, ffn=ffn, vocabulary="sharded",  # type: ignore[arg-type]
        schedule="interleaved" if stages > 1 else "1f1b", virtual_stages=stages,
    )  # fmt: skip


def ablation(cluster: Cluster) -> list[dict[str, object]]:
    """Speed-ups on 240 H800, each step on top of the one before."""
    model = PRESETS["paper-internal-352b"]
    plain, between = OverlapConfig(remat="paper"), OverlapConfig(order="scheduled", remat="paper")
    steps = [
        ("TP+TP, no overlap", 1.00, layout("tp", "tp", 15, 2), plain),
        ("SP+EP", 1.13, layout("sp", "ep", 15, 2), plain),
        ("+ overlap between operators", 1.22, layout("sp", "ep", 15, 2), between),
        ("+ overlap inside operators", 1.28, layout("sp", "ep", 15, 2), replace(between, split="2")),
    ]
    seconds = [
        price(config(model, parallel, overlap, 720), cluster, 240, hides_synchronisation=True).seconds
        for _, _, parallel, overlap in steps
    ]
    return [
        {"variant": name, "published": published, "predicted": seconds[0] / took, "seconds": took}
        for (name, published, _, _), took in zip(steps, seconds, strict=True)
    ]


def parallelism(cluster: Cluster) -> list[dict[str, object]]:
    """MFU on one node relative to SP+EP, by layout alone (the paper's Figure 14)."""
    published = {
        "internal-352b": {"TP+TP": 0.858, "SP+TP": 0.915, "TP+EP": 0.941},
        "deepseek-moe": {"TP+TP": 0.752, "SP+TP": 0.800, "TP+EP": 0.938},
    }
    rows: list[dict[str, object]] = []
    for name, values in published.items():
        model = PRESETS[f"paper-{name}"]
        if name == "internal-352b":
            model = replace(model, layers=4)
        mfu = {}
        for variant in ("SP+EP", *values):
            attention, ffn = variant.lower().split("+")
            mfu[variant] = price(config(model, layout(attention, ffn), OverlapConfig(), 32), cluster, 8).mfu
        rows += [
            {"model": name, "variant": variant, "published": value, "predicted": mfu[variant] / mfu["SP+EP"]}
            for variant, value in values.items()
        ]
    return rows


def mixtral(ours: Cluster, megatron: Cluster) -> list[dict[str, object]]:
    """Mixtral-8x7B on 32 H800 (the paper's Figure 16)."""
    model = PRESETS["paper-mixtral-8x7b"]
    tokens = 0.278 * 989e12 * 32 * 4.88 / counts(model).flops_per_token
    batch = 4 * round(tokens / model.sequence_length / 4)
    best = config(model, layout("sp", "ep"), OverlapConfig(order="scheduled", split="2", remat="paper"), batch)
    theirs = config(model, layout("tp", "tp"), OverlapConfig(), batch, "fp32")
    room = megatron.memory - megatron.reserved
    if memory(theirs, megatron, 32).peak > room:
        theirs = replace(theirs, overlap=OverlapConfig(remat="full"))
    found = [
        ("Megatron-LM", 7.75, 2.8, 17.5, price(theirs, megatron, 32, hides_synchronisation=True)),
        ("MegaScale-MoE", 4.88, 0.53, 27.8, price(best, ours, 32)),
    ]
    return [_mixtral(name, batch, seconds, exposed, mfu, each) for name, seconds, exposed, mfu, each in found]


def _mixtral(name: str, batch: int, seconds: float, exposed: float, mfu: float, found: StepPrice) -> dict[str, object]:
    return {
        "system": name, "batch": batch, "seconds": seconds, "predicted_seconds": found.seconds, "exposed": exposed,
        "predicted_exposed": found.exposed, "mfu": mfu, "predicted_mfu": 100 * found.mfu,
    }  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines) + "\n"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f} %"


def _row(row: RowResult) -> list[object]:
    return [row.id, row.reference, row.predicted, row.unit, _percent(row.error), row.use]


def printed(found: Validation, paper: dict[str, list[dict[str, object]]]) -> str:
    """All tables."""
    priced = [row for row in found.rows if row.use != "excluded"]
    parts = [table(["stack", "test rows", "mean", "worst"], (
        [name, number, f"{100 * mean:.1f} %", f"{100 * worst:.1f} %"] for name, number, mean, worst in found.by_stack()
    ))]  # fmt: skip
    for name in dict.fromkeys(row.stack for row in priced):
        head = ["row", "published", "predicted", "unit", "error", "use"]
        parts.append(f"{name}\n\n" + table(head, (_row(row) for row in priced if row.stack == name)))
    left_out = [[row.id, row.reason] for row in found.rows if row.use == "excluded"]
    parts.append(table(["excluded", "why"], left_out))
    for name, rows in paper.items():
        parts.append(f"{name}\n\n" + table(list(rows[0]), [list(row.values()) for row in rows]))
    return "\n".join(parts)


def main() -> None:
    """Price, print, write."""
    with counted_progress() as progress:
        found = validate(HERE / "validation.csv", progress)
    ours, megatron = load(OURS), load(MEGATRON)
    paper = {
        "ablation": ablation(ours), "parallelism": parallelism(ours), "mixtral": mixtral(ours, megatron),
    }  # fmt: skip
    print(printed(found, paper))
    document = {
        "command": "python benchmarks/planner/paper.py", "torch": torch.__version__, "assumed": ASSUMED, **paper,
        **found.document(),
        "stacks": [
            {"stack": name, "test_rows": number, "mean_error": mean, "worst_error": worst}
            for name, number, mean, worst in found.by_stack()
        ],
    }  # fmt: skip
    (HERE / "paper.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
