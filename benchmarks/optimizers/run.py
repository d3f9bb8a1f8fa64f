"""What an optimizer costs: training steps of the quickstart on four ranks, all optimizers side by side.

    .venv/bin/python benchmarks/optimizers/run.py --write      # a quarter of an hour on a quiet machine of two cores

Whole steps of `megascale train` (batch, forward, backward, synchronisation, update) by trainers that live side by side
in the same four processes, each with weights and data of its own from the same seed. Rounds are interleaved: one round
is a few steps of each optimizer, in an order that rotates, and each is compared with AdamW of the same round, so that
whatever else the machine does falls on all alike. Seconds are until the slowest rank is done, CPU seconds are of all
ranks together. Batches: the quickstart's 16 sequences, and eight times as many in eight micro-batches of the same size,
since an update costs the same whatever the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megascale_moe.comm.mesh import Mesh  # noqa: E402
from megascale_moe.config import Config, load  # noqa: E402
from megascale_moe.data import micro_batches  # noqa: E402
from megascale_moe.engine.trace import now  # noqa: E402
from megascale_moe.model.counts import counts, parameter_matrices, parameter_shapes  # noqa: E402
from megascale_moe.optim.muon import MUON  # noqa: E402
from megascale_moe.presets import PRESETS  # noqa: E402
from megascale_moe.strategies.fit import mesh_of  # noqa: E402
from megascale_moe.testing import run_ranks  # noqa: E402
from megascale_moe.train.job import join  # noqa: E402
from megascale_moe.train.loop import Loop, open_data  # noqa: E402

RANKS, MICRO = 4, 8
BATCHES = (16, 128)
BASELINE = "adamw"
OPTIMIZERS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "muon": {"optimizer": "muon"},
    "muon, BF16 steps": {"optimizer": "muon", "muon_dtype": "bf16"},
}


@dataclass
class Taken:
    """Of one optimizer's steps.

    Attributes:
        seconds: by round and step. cpu: of all ranks. update: seconds of a rank in the computing operators of the
            update, the mean of the ranks. losses: of the steps.
    """

    seconds: list[list[float]] = field(default_factory=list)
    cpu: list[list[float]] = field(default_factory=list)
    update: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def config_of(batch: int, optimizer: str) -> Config:
    """The quickstart with another batch and another optimizer; steps that are never reached."""
    config = load(HERE.parents[1] / "configs" / "quickstart.toml", None, PRESETS)
    train = replace(
        config.train, global_batch=batch, micro_batch=MICRO, steps=150, device="cpu", compile="off",
        **OPTIMIZERS[optimizer],
    )  # fmt: skip
    return replace(config, train=train)


def measured(batch: int, rounds: int, steps: int) -> dict[str, Taken]:
    """Train with all optimizers; on every rank."""
    config = config_of(batch, BASELINE)
    mesh: Mesh = mesh_of(config.parallel, config.model, RANKS)
    job = join(config, mesh)
    _, training, held_out = open_data(config, job)
    loops = {name: Loop(config_of(batch, name), mesh, job, training, held_out) for name in OPTIMIZERS}
    taken = {name: Taken() for name in OPTIMIZERS}
    for loop in loops.values():
        loop.trainer.initialise()
        for _ in range(2):
            step_of(loop)
    names = list(OPTIMIZERS)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found = [step_of(loops[name]) for _ in range(steps)]
            taken[name].seconds.append([each[0] for each in found])
            taken[name].cpu.append([each[1] for each in found])
            taken[name].update.append([each[2] for each in found])
            taken[name].losses += [each[3] for each in found]
    return taken


def step_of(loop: Loop) -> tuple[float, float, float, float]:
    """(seconds, CPU seconds of all ranks, seconds in the update, loss) of one step."""
    dist.barrier()
    start, cpu = now(), time.process_time()
    step = loop.loader.next_step()
    result = loop.trainer.step(micro_batches(step.rows, loop.micro), step.target_count)
    took, used = now() - start, time.process_time() - cpu
    update = sum(e.end - e.start for e in result.trace.events if e.name.startswith("update.") and not e.wire_bytes)
    slowest, total = torch.tensor([took]), torch.tensor([used, update / RANKS])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return float(slowest), float(total[0]), float(total[1]), result.loss


def quartiles(values: list[float]) -> float:
    """The distance between them."""
    low, _, high = quantiles(values, n=4)
    return high - low


def row(name: str, batch: int, taken: dict[str, Taken]) -> dict[str, Any]:
    """Medians over all steps, and of the rounds' ratios to the baseline."""
    tokens, mine, base = batch * config_of(batch, name).model.sequence_length, taken[name], taken[BASELINE]
    seconds, used, update = (list(chain(*rounds)) for rounds in (mine.seconds, mine.cpu, mine.update))
    rates = [tokens / each for each in seconds]
    ratios = [sum(b) / sum(a) for a, b in zip(mine.seconds, base.seconds, strict=True)]
    cpu = [sum(b) / sum(a) for a, b in zip(mine.cpu, base.cpu, strict=True)]
    return {
        "optimizer": name, "batch": batch, "tokens_per_s": median(rates), "spread": quartiles(rates),
        "of_adamw": median(ratios), "of_adamw_spread": quartiles(ratios), "of_adamw_by_cpu": median(cpu),
        "step_ms": 1e3 * median(seconds), "cpu_ms": 1e3 * median(used), "update_ms": 1e3 * median(update),
        "last_loss": mine.losses[-1],
    }  # fmt: skip


def flops() -> dict[str, float]:
    """Of Newton-Schulz steps over all matrices, and of a step's tokens, forward and backward."""
    model = config_of(BATCHES[0], BASELINE).model
    matrices, shapes = parameter_matrices(model), parameter_shapes(model)
    whole = sum(
        MUON.transform_cost(rows, shapes[name][-1]).flops * (shapes[name][0] if len(shapes[name]) == 3 else 1)
        for name, heights in matrices.items() for rows in heights
    )  # fmt: skip
    return {"newton_schulz": whole} | {
        f"step of {batch}": counts(model).flops_per_token * batch * model.sequence_length for batch in BATCHES
    }


def show(rows: list[dict[str, Any]]) -> None:
    """As a table."""
    heads = ("batch", "optimizer", "tokens/s", "spread", "of AdamW", "spread", "by CPU time", "step ms", "CPU ms",
             "update ms")  # fmt: skip
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for r in rows:
        print(
            f"| {r['batch']} | {r['optimizer']} | {r['tokens_per_s']:,.0f} | {r['spread']:,.0f} | "
            f"{r['of_adamw']:.3f} | {r['of_adamw_spread']:.3f} | {r['of_adamw_by_cpu']:.3f} | {r['step_ms']:,.0f} | "
            f"{r['cpu_ms']:,.0f} | {r['update_ms']:,.0f} |"
        )


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Optimizers side by side on the quickstart.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of each optimizer in a round")
    parser.add_argument("--batch", type=int, action="append", help="sequences; more than once for several")
    parser.add_argument("--write", action="store_true", help="keep the results in results.json")
    options = parser.parse_args()
    rows, raw = [], {}
    for batch in options.batch or BATCHES:
        taken: dict[str, Taken] = run_ranks(RANKS, measured, batch, options.rounds, options.steps, timeout=3600.0)[0]
        rows += [row(name, batch, taken) for name in OPTIMIZERS]
        raw[str(batch)] = {name: vars(each) for name, each in taken.items()}
    print(json.dumps(flops()))
    show(rows)
    if options.write:
        cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ": ?")
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
        about = {
            "command": " ".join(["benchmarks/optimizers/run.py", *sys.argv[1:]]), "commit": commit.stdout.strip(),
            "cpu": cpu.partition(":")[2].strip(), "cores": os.cpu_count(), "torch": torch.__version__,
            "python": platform.python_version(), "flops": flops(),
        }  # fmt: skip
        (HERE / "results.json").write_text(json.dumps(about | {"rows": rows, "raw": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
