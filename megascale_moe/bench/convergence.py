"""`megascale bench convergence`: does training in a narrower wire format reach the same loss; how wrong is a gradient?

The same model from the same seed on the same batches, once per format, on real ranks with real messages: whatever is
rounded in a run is rounded here. Formats of one seed follow each other, so that what is done when the command is
stopped can be compared, and goes on where it was when it is called again.

Beside the loss stands the error of gradients: at some steps a second gradient is taken of the same batch, with exact
weights and nothing narrowed on the way, and compared with the one that the step uses, layer by layer: relative error
|g - exact| / |exact| and cosine.
"""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megascale_moe.bench.convergence_plots import draw
from megascale_moe.bench.timed import machine
from megascale_moe.comm.collectives import all_reduce_sum
from megascale_moe.comm.local_ranks import fork_ranks
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, OverlapConfig, WireConfig, require
from megascale_moe.data import Batch, micro_batches
from megascale_moe.engine.executor import Program, resolve
from megascale_moe.model.counts import parameter_shapes
from megascale_moe.optim.flat import FlatWeights, Formats
from megascale_moe.optim.sharded import gather_all
from megascale_moe.optim.sync import given, reduce, shard_of, updated
from megascale_moe.pipeline.batches import check_batches
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.train.job import TIMEOUT, Job, join, local_rank_count
from megascale_moe.train.loop import Loop, open_data
from megascale_moe.train.output import pyplot, table
from megascale_moe.train.progress import counted_progress
from megascale_moe.train.trainer import Trainer

FILE = "convergence.json"
PROBES = 10
"""Steps of a run at which gradients are compared."""
DEFAULT = "fp32"
FORMATS = {
    "gradients": ("bf16", "fp8", "bf16_ring"), "activations": ("bf16", "fp8", "fp8_tensor", "fp8_cast"),
    "parameters": ("bf16", "fp8"),
}  # fmt: skip
VARIANTS = {DEFAULT: WireConfig()}
VARIANTS |= {
    f"{messages} {form}": replace(WireConfig(), **{messages: form})  # type: ignore[arg-type]
    for messages, forms in FORMATS.items() for form in forms
}  # fmt: skip
VARIANTS |= {
    "all bf16": WireConfig(gradients="bf16", activations="bf16", parameters="bf16"),
    "bf16 + activations fp8": WireConfig(gradients="bf16", activations="fp8", parameters="bf16"),
    "all fp8": WireConfig(gradients="fp8", activations="fp8", parameters="fp8"),
}
"""The variants that are trained, by name; the paper rejects those with "_"."""
CONTROLS = {f"fp32 other weights {number}": number for number in (1, 2, 3)}
"""FP32 on the same text from other initial weights: how far losses differ by luck, which a format must not exceed.
(Another seed has other held-out text as well, whose losses differ by far more.)"""
VARIANTS |= dict.fromkeys(CONTROLS, WireConfig())

Errors = dict[str, tuple[float, float]]


def bench(config: Config, nproc: int | None, names: str, seeds: int, folder: Path, *, as_json: bool) -> int:
    """Train every variant on forked ranks and compare them. Return the exit status.

    Args:
        names: of `VARIANTS`, comma-separated; "" is all. seeds: how many; they count from the config's.
        folder: where results are kept.

    Raises:
        ConfigError: an unknown name, the config does not fit the ranks, or the folder holds results of another config.
    """
    variants = [name.strip() for name in names.split(",")] if names else list(VARIANTS)
    for name in variants:
        require(name in VARIANTS, f"--variants: {name!r} is unknown; known: {', '.join(VARIANTS)}")
    world = nproc or local_rank_count(config)
    mesh = mesh_of(config.parallel, config.model, world)
    check_batches(config, mesh)
    _results(folder, config, world)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(name, config.train.seed + seed) for seed in range(seeds) for name in variants]
    status = fork_ranks(world, lambda _: _rank(config, mesh, wanted, folder), timeout=TIMEOUT.total_seconds())
    if status:
        return status
    document = _results(folder, config, world)
    plt = pyplot()
    drawn = draw(plt, document["runs"], folder, DEFAULT, CONTROLS) if plt else []
    if as_json:
        print(json.dumps(document))
        return 0
    _print(document["rows"])
    print(f"results: {folder / FILE}" + (f", plots: {', '.join(map(str, drawn))}" if drawn else ""))
    if not plt:
        print("no plots: matplotlib is missing; pip install 'megascale-moe[plots]'")
    return 0


def _results(folder: Path, config: Config, world: int) -> dict[str, Any]:
    """Return the document in a folder, or an empty one.

    Raises:
        ConfigError: it belongs to another config or number of ranks.
    """
    path = folder / FILE
    described = {name: asdict(getattr(config, name)) for name in ("model", "parallel", "train", "data")}
    described = json.loads(json.dumps(described))  # all that losses depend on, as it is read again
    if not path.exists():
        return {"name": "convergence", "machine": machine(world), "config": described, "rows": [], "runs": []}
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = document["config"] == described and document["machine"]["ranks"] == world
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read; remove it or choose another --out") from error
    require(same, f"{path}: holds results of another config or number of ranks; choose another --out")
    return document


def _rank(config: Config, mesh: Mesh, wanted: Sequence[tuple[str, int]], folder: Path) -> None:
    """Train those (variant, seed) that the folder does not have yet."""
    job = join(config, mesh)
    document = _results(folder, config, job.world)
    done = {(run["variant"], run["seed"]) for run in document["runs"]}
    with counted_progress(shown=job.leads) as progress:
        for number, (name, seed) in enumerate(wanted, 1):
            if (name, seed) in done:
                continue
            show = partial(progress, f"{name} ({number} of {len(wanted)})")
            document["runs"].append(_trained(config, mesh, job, name, seed, show))
            if job.leads:
                document["rows"] = rows(document["runs"])
                part = (folder / FILE).with_suffix(".part")  # whole or not at all
                part.write_text(json.dumps(document), encoding="utf-8")
                part.replace(folder / FILE)


def _trained(
    config: Config, mesh: Mesh, job: Job, variant: str, seed: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Train a variant to the end on one rank and return what happened."""
    train = replace(config.train, seed=seed, checkpoint_every=0)
    config = replace(config, train=train, wire=VARIANTS[variant], overlap=OverlapConfig())
    _, training, held_out = open_data(config, job)
    loop = Loop(config, mesh, job, training, held_out)
    trainer, probe, steps = loop.trainer, Probe(loop.trainer), train.steps
    trainer.initialise(seed + 1000 * CONTROLS.get(variant, 0))
    losses: list[float] = []
    evaluations: dict[int, float | None] = {}
    errors: dict[int, Errors] = {}
    probes = {round(steps * number / PROBES) for number in range(PROBES)}
    while trainer.steps < steps:
        step = loop.loader.next_step()
        batches = micro_batches(step.rows, loop.micro)
        if trainer.steps in probes:
            errors[trainer.steps] = probe.errors(batches, step.target_count)
        losses.append(trainer.step(batches, step.target_count).loss)
        done = trainer.steps
        if done == steps or (train.eval_every and done % train.eval_every == 0):
            evaluations[done] = loop.evaluate()
        progress(done, steps)
    return {
        "variant": variant, "seed": seed, "wire": asdict(config.wire), "losses": losses,
        "evaluations": evaluations, "gradient_errors": errors,
    }  # fmt: skip


class Probe:
    """Compares the gradient of a step with an exact one; a run is afterwards where it was."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.groups = trainer, trainer.optimizer.groups
        self.exact = [copy.copy(group) for group in self.groups]  # the same buffers, with nothing narrowed on the way
        for group in self.exact:
            group.formats = Formats()

    def errors(self, batches: Sequence[Batch], target_count: int) -> Errors:
        """Return (relative error, cosine) by layer, of this batch at these weights."""
        own = self._sums(batches, target_count, self.groups, self.trainer.config.wire)
        rounded = [
            exact for group, exact in zip(self.groups, self.exact, strict=True) if group.formats.parameters is not None
        ]
        for group in rounded:  # weights as the masters are, on all ranks
            group.weights[group.shard] = group.master
        gather_all(rounded).run(updated(rounded), {})
        exact = self._sums(batches, target_count, self.exact, WireConfig())
        if rounded:
            self.trainer.optimizer.settle()
        return self._compared(own, exact)

    def _sums(
        self, batches: Sequence[Batch], target_count: int, groups: Sequence[FlatWeights], wire: WireConfig
    ) -> dict[str, Tensor]:
        """Return the summed gradients of this rank's shards, by group."""
        trainer, formats = self.trainer, self.trainer.wire
        tokens = trainer.config.train.global_batch * trainer.model.sequence_length
        scales = {
            "loss_scale": 1.0 / max(target_count, 1),
            "auxiliary_scale": torch.tensor(1.0 / tokens, device=trainer.device),
        }
        trainer.wire = wire
        trainer.program.cache_clear()
        trainer.run(batches, "train", scales)
        trainer.wire = formats
        trainer.program.cache_clear()
        for gradient in trainer.optimizer.gradients.values():
            gradient.value()
        names = [shard_of(group) for group in groups]
        values = Program(reduce(groups), given(groups), names).run(dict(given(groups)), {})
        sums = {group.name: resolve(values, shard_of(group)).clone() for group in groups}
        trainer.optimizer.end(0.0)
        return sums

    def _compared(self, own: dict[str, Tensor], exact: dict[str, Tensor]) -> Errors:
        names = sorted({layer_of(name) for name in parameter_shapes(self.trainer.model)})
        totals = torch.zeros(len(names), 4, dtype=torch.float64)  # |a - b|^2, ab, a^2, b^2
        for group in self.groups:
            for slot in group.slots:
                for owned in group.owned(slot):
                    a, b = own[group.name][owned.place].double(), exact[group.name][owned.place].double()
                    products = torch.stack([(a - b).square().sum(), a @ b, a @ a, b @ b])
                    totals[names.index(layer_of(slot.name))] += products.cpu()
        all_reduce_sum(totals, self.trainer.axes["world"])
        return {
            name: (math.sqrt(gap / bb), dot / math.sqrt(aa * bb)) if aa and bb else (math.nan, math.nan)
            for name, (gap, dot, aa, bb) in zip(names, totals.tolist(), strict=True)
        }


def layer_of(name: str) -> str:
    """Return "3 ffn" of "layers.3.ffn.router.weight", "head" of "head.weight"."""
    parts = name.split(".")
    return " ".join(parts[1:3]).replace("_norm", "") if parts[0] == "layers" else parts[0]


# --- results ---------------------------------------------------------------------------------------------------------


def rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one per variant: the last validation loss over seeds, its distance to FP32's, gradient errors."""
    by_variant: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        by_variant[run["variant"]].append(run)
    plain = {run["seed"]: _last_loss(run) for run in runs if run["variant"] == DEFAULT}
    results = []
    for name, same in by_variant.items():
        losses = {run["seed"]: _last_loss(run) for run in same}
        gaps = [loss - plain[seed] for seed, loss in losses.items() if seed in plain]
        errors = [error for run in same for probe in run["gradient_errors"].values() for error in probe.values()]
        error, cosine = map(median, zip(*errors, strict=True))
        results.append({
            "variant": name, "median": median(losses.values()), "unit": "nats", "seeds": len(same),
            "spread": max(losses.values()) - min(losses.values()), "to_fp32": fmean(gaps) if gaps else None,
            "gradient_error": error, "gradient_cosine": cosine,
        })  # fmt: skip
    return results


def _last_loss(run: dict[str, Any]) -> float:
    """Return the loss that a run ended with: on held-out text, or, without any, the mean of its last twentieth."""
    evaluations = [loss for loss in run["evaluations"].values() if loss is not None]
    return float(evaluations[-1]) if evaluations else fmean(run["losses"][-max(len(run["losses"]) // 20, 1) :])


def _print(rows: Sequence[dict[str, Any]]) -> None:
    """Print for people."""
    heads = ("format", "seeds", "loss", "over seeds", "to fp32", "gradient error", "cosine")
    lines = [
        [row["variant"], str(row["seeds"]), f"{row['median']:.4f}", f"{row['spread']:.4f}",
         "" if row["to_fp32"] is None else f"{row['to_fp32']:+.4f}", f"{row['gradient_error']:.2e}",
         f"{row['gradient_cosine']:.6f}"]
        for row in rows
    ]  # fmt: skip
    Console(highlight=False, width=120).print(table(heads, lines, text=("format",)))
