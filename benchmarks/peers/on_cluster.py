"""Peers and our library on four ranks that talk over links of given rate (benchmarks/cluster). Linux and root only.

    sudo PEERS_VENVS=FOLDER ../../.venv/bin/python on_cluster.py
    ../../.venv/bin/python on_cluster.py --table results/cluster-*.json

As in run.py all sides are alive at once and take turns, as many as fit into memory: a heat. Here each rank is on a host
of its own, a network namespace, and all bytes cross a limited cable that counts them. Speed 1 is where computation and
communication of an expert stand as on a node of eight H800 with the real model: see README.md.
"""

import argparse
import itertools
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import case as common
from benchmarks.cluster.cluster import Cluster, Shape, cluster
from benchmarks.cluster.iso import NODES, balance, gemm_rates, ratio
from case import Case
from cluster_table import markdown, plain_table
from run import MEMORY_NEEDED, Field, describe, memory, run_or_print, say, start, working_folder
from sides import SIDES, choose
from table import summarize

RANKS = 4
BASELINE = "megascale-sp-ep"
HEATS = {
    "megatron": [BASELINE, "megatron-tp", "megatron-tp-ep", "megatron-tp2-ep", "megatron-ep"],
    "peers": [BASELINE, "megascale-ep", "megatron-ep", "torchtitan-ep", "transformers-ep"],
    "attribution": [
        BASELINE, "megascale-sp-ep-serial", "megascale-sp-ep-serial-gloo", "megascale-tp-serial",
        "megascale-tp-serial-gloo",
    ],
}  # fmt: skip
"""Sides that are alive at once: each takes 3 to 5 GiB. The baseline is in all of them."""
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}
"""What our library sets for itself on a CPU, for every side: it saves Megatron-Core about 5 % of its CPU time."""
NODE = "h800"
SPEEDS = "0.25,1,2.25"
"""The network cards of an H800 node (50 GB/s a GPU), its NVLink (200), and the NVLink of an H100 (450)."""
MIXTRAL = Case(
    layers=2, hidden=512, heads=16, kv_heads=4, experts=8, top_k=2, expert_width=1792, vocabulary=1024,
    sequence=1024, sequences=4, balanced=True,
)  # fmt: skip
CASES = {
    "mixtral": (MIXTRAL, 14336),
    "deepseekmoe": (replace(MIXTRAL, heads=8, kv_heads=8, experts=16, top_k=6, expert_width=352), 1408),
}
"""Copies in proportion (the second without shared experts, which Mixtral's form has not), and the real expert width."""


@dataclass(frozen=True)
class Links:
    """What a rank computes in a second, and the links that stand to it as the node's, times `speed`."""

    speed: float
    flops: float
    bits: float
    real_width: int

    def record(self, case: Case) -> dict[str, float]:
        """For the results: R, computation over communication of an expert, of the node over NVLink and here."""
        node = NODES[NODE]
        real = ratio(self.real_width, node.nvlink, node.peak, 2)
        here = ratio(case.expert_width, self.bits / 8, self.flops, 4)
        return {"speed": self.speed, "flops": self.flops, "bits_per_s": self.bits, "R_node": real, "R_cluster": here}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, side in SIDES.items() if RANKS in side.ranks]
    parser.add_argument("--heats", default=",".join(HEATS), help="what is measured together")
    parser.add_argument("--sides", help=f"one heat of these instead; comma-separated, of {', '.join(names)}")
    parser.add_argument("--speeds", default=SPEEDS, help=f"of the links, 1 being NVLink's; by default {SPEEDS}")
    parser.add_argument("--case", choices=CASES, default="mixtral")
    parser.add_argument("--layers", type=int, default=MIXTRAL.layers)
    parser.add_argument("--sequences", type=int, default=MIXTRAL.sequences, help="of a step")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="training steps per side and round")
    parser.add_argument("--warmup", type=int, default=6, help="unmeasured steps of each side; ours measures three")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds a side may stay silent")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print results files and do nothing else")
    return parser.parse_args()


def links_in_proportion(case: Case, real_width: int) -> tuple[float, float]:
    """FLOP/s of a rank, and bits/s of its link so that R is that of the node with the real width."""
    flops = gemm_rates(RANKS)
    return flops["fp32"], balance(NODES[NODE], "fp32", flops, real_width / case.expert_width).intra


def heats(options: argparse.Namespace) -> dict[str, list[str]]:
    """Sides by the name of the heat."""
    if options.sides:
        return {"chosen": choose(options.sides, "fp32", RANKS)}
    return {name: HEATS[name] for name in options.heats.split(",")}


def measure(options: argparse.Namespace, names: list[str], case: Case, links: Links) -> dict[str, Any]:
    """One heat on one speed: everything that goes into its results file."""
    steps = options.warmup + options.rounds * options.steps
    with cluster(Shape(RANKS, RANKS, links.bits, links.bits)) as made, working_folder() as work:
        common.write(work, case, steps, options.seed)
        field = Field(lambda: sum(host.sent for host in made.traffic()))
        try:
            enter_all(field, names, made, options, work)
            for number in range(options.rounds):
                say(f"x{links.speed:g}: round {number + 1} of {options.rounds}")
                field.round(number, options.steps)
        finally:
            field.close()
    found = describe(options, "fp32", RANKS, vars(case), field, "cpu")
    found |= {"command": " ".join(["python", "on_cluster.py", *sys.argv[1:]]), "baseline": BASELINE}
    return found | {"links": links.record(case)}


def enter_all(field: Field, names: list[str], made: Cluster, options: argparse.Namespace, work: Path) -> None:
    """Start the sides one after the other and let each warm up."""
    hosts = [host.name for host in made.hosts]
    for name in names:
        say(f"starting {name}")
        if (free := memory("MemAvailable")) < MEMORY_NEEDED:
            field.refuse(name, f"only {free:.1f} GiB of memory free")
            continue
        side = start(name, "fp32", RANKS, work, options.patience, hosts, made.hosts[0].interface)
        field.enter(side, options.warmup)


def run_speeds(options: argparse.Namespace) -> int:
    """One results file per speed and heat; 1 if a side failed or its losses differ."""
    os.environ |= KEEP_FREED
    case, real_width = CASES[options.case]
    case = replace(case, layers=options.layers, sequences=options.sequences)
    flops, bits = links_in_proportion(case, real_width)
    options.results.mkdir(parents=True, exist_ok=True)
    sound = True
    for speed, heat in itertools.product(map(float, options.speeds.split(",")), heats(options).items()):
        name, names = heat
        results = measure(options, names, case, Links(speed, flops, bits * speed, real_width))
        path = options.results / f"cluster-{options.case}-x{speed:g}-{name}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(plain_table(results), flush=True)
        sound = sound and not results["failures"] and all(row["agrees"] for row in summarize(results))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(run_or_print(read_options(), run_speeds, markdown))
