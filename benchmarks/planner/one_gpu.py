"""Does a profile of one GPU predict its training steps and its memory? Measured on the GPU at hand.

    python benchmarks/planner/one_gpu.py --base h100 --write      # three minutes; base: the hardware's shipped profile

First the GPU is measured as `megascale bench profile --nproc 1` does it, from operators alone; then whole training
steps (clipping and optimizer included) of models that are none of those operators' models, in BF16, and the memory that
torch's allocator gave out. Links have no part in it, there is one GPU. Routing is balanced, as the planner takes it to
be.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402

from benchmarks.overlap.nodes import batches  # noqa: E402
from benchmarks.overlap.run import balanced_route  # noqa: E402
from benchmarks.planner.layouts import by_kind, sentence, summary, table  # noqa: E402
from megascale_moe.bench.machine import MachineMeter, random_weights  # noqa: E402
from megascale_moe.bench.profile import header, memory_of, profile  # noqa: E402
from megascale_moe.bench.timed import spread  # noqa: E402
from megascale_moe.comm.axis import single  # noqa: E402
from megascale_moe.config import Config, ModelConfig, OverlapConfig, ParallelConfig, TrainConfig  # noqa: E402
from megascale_moe.engine.trace import now  # noqa: E402
from megascale_moe.planner.cluster import Cluster, load  # noqa: E402
from megascale_moe.planner.step import memory, price  # noqa: E402
from megascale_moe.strategies import routing  # noqa: E402
from megascale_moe.strategies.fit import mesh_of  # noqa: E402
from megascale_moe.train.hardware import peak_memory  # noqa: E402
from megascale_moe.train.trainer import Trainer  # noqa: E402

WARM = 3


def model(layers: int, hidden: int, experts: int, top_k: int, ffn: int, length: int, shared: int = 0) -> ModelConfig:
    """Heads of 128, four to a key head."""
    heads = hidden // 128
    return ModelConfig(
        layers=layers, hidden=hidden, heads=heads, kv_heads=max(heads // 4, 1), experts=experts, top_k=top_k,
        ffn_hidden=ffn, shared_experts=shared, vocab=32768, sequence_length=length, init_std=0.02, balance_loss=0.01,
    )  # fmt: skip


MIXTRAL = model(2, 4096, 8, 2, 14336, 4096)
QWEN = model(4, 2048, 128, 8, 768, 4096)
DEEPSEEK = model(4, 2048, 64, 6, 1408, 4096, shared=2)
SMALL = model(8, 1024, 8, 2, 2048, 1024)


@dataclass(frozen=True)
class Variant:
    """A way to train on one GPU."""

    name: str
    model: ModelConfig
    micro_batch: int
    global_batch: int = 0
    overlap: OverlapConfig = field(default_factory=OverlapConfig)

    @property
    def config(self) -> Config:
        """Of a run."""
        batch = self.global_batch or self.micro_batch
        train = TrainConfig(global_batch=batch, micro_batch=self.micro_batch, dtype="bf16", steps=1000)
        return Config(model=self.model, parallel=ParallelConfig(dp=1), overlap=self.overlap, train=train)


FULL, PAPER = OverlapConfig(remat="full"), OverlapConfig(order="paper")
VARIANTS = [
    Variant("small, 8 layers of 1,024, micro-batch 1", SMALL, 1),
    Variant("small, 8 layers of 1,024, micro-batch 8", SMALL, 8),
    Variant("small, 8 layers of 1,024, micro-batch 32", SMALL, 32),
    Variant("small, 8 layers of 1,024, 8 micro-batches of 4", SMALL, 4, 32),
    Variant("Qwen3-30B-A3B, 4 layers, micro-batch 1", QWEN, 1),
    Variant("Qwen3-30B-A3B, 4 layers, micro-batch 2", QWEN, 2),
    Variant("Qwen3-30B-A3B, 4 layers, micro-batch 2, full remat", QWEN, 2, overlap=FULL),
    Variant("Qwen3-30B-A3B, 4 layers, micro-batch 2, paper order", QWEN, 2, overlap=PAPER),
    Variant("Qwen3-30B-A3B, 4 layers, 4 micro-batches of 2", QWEN, 2, 8),
    Variant("DeepSeek-V2-Lite, 4 layers, micro-batch 1", DEEPSEEK, 1),
    Variant("DeepSeek-V2-Lite, 4 layers, micro-batch 2", DEEPSEEK, 2),
    Variant("DeepSeek-V2-Lite, 4 layers, micro-batch 4, full remat", DEEPSEEK, 4, overlap=FULL),
    Variant("Mixtral-8x7B, 2 layers, micro-batch 1", MIXTRAL, 1),
    Variant("Mixtral-8x7B, 2 layers, micro-batch 2", MIXTRAL, 2),
    Variant("Mixtral-8x7B, 2 layers, micro-batch 2, full remat", MIXTRAL, 2, overlap=FULL),
    Variant("Mixtral-8x7B, 2 layers, 4 micro-batches of 1", MIXTRAL, 1, 4),
]


def measured(variant: Variant, rounds: int, device: torch.device, cluster: Cluster) -> dict[str, Any]:
    """A row of the results."""
    config = variant.config
    mesh = mesh_of(config.parallel, config.model, 1)
    trainer = Trainer(config, mesh, single(), device)
    random_weights(trainer.optimizer.groups, trainer.model.init_std)
    times: list[float] = []
    mine, events = batches(config, 0, 0), []
    for done in range(WARM + rounds):
        if done == WARM:
            torch.cuda.reset_peak_memory_stats(device)
        begin = now()
        events = trainer.step(mine, config.train.global_batch * config.model.sequence_length).trace.events
        if done >= WARM:
            times.append(now() - begin)
    held = peak_memory(device)
    said, bytes_said = price(config, cluster, 1), memory(config, cluster, 1).peak
    took = median(times)
    tokens = config.train.global_batch * config.model.sequence_length
    return {
        "variant": variant.name, "median": took, "spread": spread(times), "unit": "s", "all": times,
        "predicted": said.seconds, "error": said.seconds / took - 1, "tokens_per_s": tokens / took,
        "bytes": held, "predicted_bytes": bytes_said, "bytes_error": bytes_said / held - 1,
        "kinds": by_kind(trainer, events, cluster),
    }  # fmt: skip


def run(options: argparse.Namespace, chosen: Sequence[Variant], device: torch.device) -> dict[str, Any]:
    """The profile, then every variant; one that fails is named, the others go on."""
    begin = now()
    path: Path = options.profile or options.folder / f"profile-{options.base}.toml"
    if options.profile is None:
        found = MachineMeter(single(), mesh_of(ParallelConfig(dp=1), SMALL, 1), device, "bf16",
                      progress=lambda what, done, total: None).everything()  # fmt: skip
        text = profile(found, memory_of(device, 1), header(device), options.base)
        path.write_text(text, encoding="utf-8")
        say(f"profile: {path}")
    cluster = load(str(path))
    routing.route = balanced_route  # type: ignore[assignment]
    gc.collect()  # lists refer to themselves, with all their weights
    rows, failures = [], {}
    for variant in chosen:
        if now() - begin > options.limit:
            failures[variant.name] = "no time left"
            continue
        try:
            rows.append(measured(variant, options.rounds, device, cluster))
            row = rows[-1]
            say(f"{variant.name}: {row['median'] * 1e3:.1f} ms, predicted {row['predicted'] * 1e3:.1f}; "
                f"{row['bytes'] / 1e9:.2f} GB, predicted {row['predicted_bytes'] / 1e9:.2f}")  # fmt: skip
        except torch.OutOfMemoryError as error:
            failures[variant.name] = str(error).split(". ")[0]
            say(f"{variant.name}: {failures[variant.name]}")
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "name": "planner one GPU", "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(sys.argv), "machine": header(device), "models": {
            variant.name: asdict(variant.model) for variant in chosen
        }, "profile": path.read_text(encoding="utf-8"), "summary": summary(rows), "rows": rows, "failures": failures,
    }  # fmt: skip


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def show(found: dict[str, Any]) -> None:
    """Print the table, memory too."""
    print(f"{table(found['rows'])}\n\n{sentence(found['summary'])}")
    errors = [abs(row["bytes_error"]) for row in found["rows"]]
    print(f"memory: mean error {fmean(errors):.1%}, worst {max(errors):.1%}")
    for name, reason in found["failures"].items():
        print(f"- {name}: {reason}")


def show_kinds(rows: Sequence[dict[str, Any]]) -> None:
    """Print where the seconds of all variants together went, by kind of operator, beside their prices."""
    total: dict[str, list[float]] = {}
    for row in rows:
        for name, numbers in row["kinds"].items():
            total[name] = [a + b for a, b in zip(total.get(name, [0.0] * 3), numbers, strict=True)]
    print("\n| operators | how many | measured ms | predicted ms | error |\n|---|---|---|---|---|")
    for name, (count, took, said) in sorted(total.items(), key=lambda item: -item[1][1]):
        print(f"| {name} | {count:.0f} | {took * 1e3:.2f} | {said * 1e3:.2f} | {said / took - 1:+.0%} |")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="h100", help="shipped profile of the hardware")
    parser.add_argument("--profile", type=Path, help="use this one, do not measure")
    parser.add_argument("--rounds", type=int, default=8, help="measured steps of each variant")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which no more variants are begun")
    parser.add_argument("--only", default="", help="variants with this in their names")
    parser.add_argument("--folder", type=Path, default=HERE, help="of the profile and the results")
    parser.add_argument("--write", action="store_true", help="write results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print results and do nothing else")
    options = parser.parse_args()
    if options.table:
        found = json.loads(options.table.read_text(encoding="utf-8"))
        show(found)
        show_kinds([row for row in found["rows"] if options.only in row["variant"]])
        return
    if not torch.cuda.is_available():
        raise SystemExit("one_gpu.py: no GPU is visible")
    device = torch.device("cuda", 0)
    found = run(options, [variant for variant in VARIANTS if options.only in variant.name], device)
    show(found)
    if options.write:
        (options.folder / f"results-{options.base}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
