"""Two nodes with slower links between them: is data-parallel synchronisation hidden, are pipeline transfers?

    python benchmarks/overlap/nodes.py --layout dp --write      # as root; and --layout pp; a quarter of an hour each

Whole training steps (optimizer included) of a small copy of Internal-352B on two "nodes" of two ranks, links in
proportion to an H800 node and its network cards. What communication between nodes costs a step cannot be read off a
trace: who waits for a neighbouring stage waits for its computation as well. So every step is measured twice, with these
links and with links between nodes so fast that they cost nothing; the difference is what is exposed. Beside it stands
the time that the link needs for the bytes that its own counter saw: 1 - exposed / needed is hidden.

Transfers of a pipeline are so few bytes that with links in proportion they are lost in the noise of a step: for these
the links between nodes are ten times slower still.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.cluster.cluster import Cluster, Shape, cluster  # noqa: E402
from benchmarks.cluster.iso import NODES, balance, gemm_rates, ratio  # noqa: E402
from benchmarks.cluster.ranks import run_on_cluster  # noqa: E402
from benchmarks.overlap.run import balanced_route  # noqa: E402
from megascale_moe.bench.timed import over_ranks, spread  # noqa: E402
from megascale_moe.comm.axis import connect  # noqa: E402
from megascale_moe.config import Config, ModelConfig, OverlapConfig, ParallelConfig, TrainConfig  # noqa: E402
from megascale_moe.data import Batch  # noqa: E402
from megascale_moe.engine.trace import now  # noqa: E402
from megascale_moe.strategies import routing  # noqa: E402
from megascale_moe.strategies.fit import mesh_of  # noqa: E402
from megascale_moe.train.profiling import STEPS  # noqa: E402
from megascale_moe.train.trainer import Trainer  # noqa: E402

RANKS, NODE, H_FFN = 4, 2, 14336
FAST = 8e9
"""Bits/s between nodes that cost nothing beside those in proportion."""
MODEL = ModelConfig(
    layers=8, hidden=256, heads=8, kv_heads=2, experts=8, top_k=3, ffn_hidden=896, shared_experts=1, vocab=256,
    sequence_length=512, init_std=0.02, balance_loss=0.01,
)  # fmt: skip
SERIAL = OverlapConfig()
SCHEDULED = OverlapConfig(order="scheduled")
TOGETHER = OverlapConfig(order="scheduled", micro_batches=2)


@dataclass(frozen=True)
class Variant:
    """A way to train: layout and passes."""

    name: str
    parallel: ParallelConfig
    overlap: OverlapConfig = SERIAL
    micro_batch: int = 1
    links: str = "in proportion"


DATA = ParallelConfig(dp=2, node=2, ep=2)
STAGES = ParallelConfig(pp=2, dp=1, node=2, ep=2)
INTERLEAVED = replace(STAGES, schedule="interleaved", virtual_stages=2)
TENTH, FREE = "a tenth", "free"
VARIANTS = (
    Variant("dp 2, after the step", DATA, micro_batch=4),
    Variant("dp 2, hidden", DATA, SCHEDULED, micro_batch=4),
    Variant("pp 2, 1F1B", STAGES, SCHEDULED, links=TENTH),
    Variant("pp 2, interleaved", INTERLEAVED, SCHEDULED, links=TENTH),
    Variant("pp 2, two micro-batches", STAGES, TOGETHER, links=TENTH),
)


def batches(config: Config, data: int, seed: int) -> list[Batch]:
    """A data-parallel rank's micro-batches."""
    generator = torch.Generator().manual_seed(seed * 100 + data)
    length, rows = config.model.sequence_length, config.train.micro_batch
    share = config.train.global_batch // config.parallel.dp
    found = []
    for _ in range(share // rows):
        tokens = torch.randint(0, config.model.vocab, (rows, length), generator=generator)
        found.append(Batch(tokens, tokens.roll(-1, 1), tuple(range(0, rows * length + 1, length))))
    return found


class Runner:
    """One variant on one rank."""

    def __init__(self, variant: Variant, sequences: int, made: dict[Any, Any]) -> None:
        train = TrainConfig(global_batch=sequences, micro_batch=variant.micro_batch, steps=1000, compile="off")
        self.config = Config(model=MODEL, parallel=variant.parallel, overlap=variant.overlap, train=train)
        mesh = mesh_of(variant.parallel, MODEL, RANKS)
        self.axes = connect(mesh, made=made)
        self.trainer = Trainer(self.config, mesh, self.axes, torch.device("cpu"))
        self.trainer.initialise()
        self.done = 0

    def step(self) -> float:
        """Seconds from a barrier to the end of the last rank."""
        mine = batches(self.config, self.axes["tensor_data"].index, self.done)
        dist.barrier()
        start = now()
        self.trainer.step(mine, self.config.train.global_batch * MODEL.sequence_length)
        self.done += 1
        return over_ranks(now() - start, RANKS)


def on_rank(
    where: Cluster, variants: Sequence[Variant], sequences: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds of every round and bytes between nodes of one step, by variant; the same on every rank but for bytes."""
    routing.route = balanced_route  # type: ignore[assignment]
    made: dict[Any, Any] = {}
    runners = {variant.name: Runner(variant, sequences, made) for variant in variants}
    sent = {}
    for name, runner in runners.items():
        for _ in range(STEPS + 1):
            runner.step()
        before = where.traffic()[dist.get_rank()].sent_inter
        runner.step()
        sent[name] = where.traffic()[dist.get_rank()].sent_inter - before
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    for done in range(rounds):
        for place in range(len(names)):
            name = names[(place + done) % len(names)]
            seconds[name].append(runners[name].step())
    return {name: {"seconds": seconds[name], "sent": sent[name]} for name in names}


def measure(layout: str, sequences: int, rounds: int, passes: int) -> dict[str, Any]:
    """Alternately on links in proportion and on those where only traffic between nodes is free."""
    rates = gemm_rates(RANKS)
    links = balance(NODES["h800"], "fp32", rates, H_FFN / MODEL.ffn_hidden)
    shapes = {
        "in proportion": Shape(RANKS, NODE, links.intra, links.inter),
        TENTH: Shape(RANKS, NODE, links.intra, links.inter / 10),
        FREE: Shape(RANKS, NODE, links.intra, FAST),
    }
    print(
        f"links {shapes[FREE].intra / 1e6:.0f} and {shapes['in proportion'].inter / 1e6:.0f} Mbit/s; R inside a node "
        f"{ratio(MODEL.ffn_hidden, shapes[FREE].intra / 8, rates['fp32'], 4):.2f}, between nodes "
        f"{ratio(MODEL.ffn_hidden, shapes['in proportion'].inter / 8, rates['fp32'], 4):.2f}", file=sys.stderr,
    )  # fmt: skip
    chosen = [variant for variant in VARIANTS if variant.name.startswith(layout)]
    seconds: dict[str, dict[str, list[float]]] = {v.name: {kind: [] for kind in shapes} for v in chosen}
    sent: dict[str, int] = {}
    for turn in range(passes):
        for kind, shape in shapes.items():
            variants = [variant for variant in chosen if kind in (variant.links, FREE)]
            if not variants:
                continue
            with cluster(shape) as made:
                ranks = run_on_cluster(made, on_rank, made, variants, sequences, rounds, timeout=1800.0)
            for name, found in ranks[0].items():
                seconds[name][kind] += found["seconds"]
                sent[name] = max(rank[name]["sent"] for rank in ranks)  # the busiest link's
            print(f"  {kind}: {turn + 1} of {passes}", file=sys.stderr, flush=True)
    rows = [
        row(variant, seconds[variant.name], sent[variant.name] * 8 / shapes[variant.links].inter)
        for variant in chosen
    ]
    return {
        "name": "overlap between nodes", "torch": torch.__version__, "ranks": RANKS, "gemm_flops": rates,
        "links": {kind: asdict(shape) for kind, shape in shapes.items()}, "model": asdict(MODEL),
        "sequences": sequences, "rows": rows,
    }  # fmt: skip


def row(variant: Variant, seconds: dict[str, list[float]], needed: float) -> dict[str, Any]:
    """Of one variant; `needed`: seconds in which the link carries what it sends."""
    with_links, free = (median(seconds[kind]) for kind in (variant.links, FREE))
    exposed = with_links - free
    return {
        "variant": variant.name, "links": variant.links, "unit": "s",
        "median": with_links, "spread": spread(seconds[variant.links]), "free_s": free,
        "exposed_s": exposed, "needed_s": needed, "hidden": 1 - exposed / needed, "all": seconds,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    heads = ("", "links", "ms", "spread", "ms with free links", "exposed ms", "the link needs", "hidden")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        numbers = (row[key] * 1e3 for key in ("median", "spread", "free_s", "exposed_s", "needed_s"))
        cells = [row["variant"], row["links"], *(f"{number:.0f}" for number in numbers), f"{row['hidden']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=["dp", "pp"], required=True, help="what is between the nodes")
    parser.add_argument("--sequences", type=int, default=8, help="of a step")
    parser.add_argument("--rounds", type=int, default=4, help="measured steps of each variant and pass")
    parser.add_argument("--passes", type=int, default=3, help="turns of both kinds of links")
    parser.add_argument("--write", action="store_true", help="write results-nodes-LAYOUT.json")
    options = parser.parse_args()
    found = measure(options.layout, options.sequences, options.rounds, options.passes)
    print(table(found["rows"]), flush=True)
    if options.write:
        (HERE / f"results-nodes-{options.layout}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
