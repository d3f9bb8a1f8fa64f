"""`megascale bench convergence`: does training in a narrower wire format reach the same loss; how wrong is a gradient?

The same model from the same seed on the same batches, once per format, on real ranks with real messages: whatever is
rounded in a run is rounded here. Formats of one seed follow each other, so that what is done when the command is
stopped can be compared, and goes on where it was when it is called again.

Beside the loss stands the error of gradients: at some steps a second gradient is taken of the same batch, with exact
weights and nothing narrowed on the way, and compared with the one that the step uses, layer by layer: relative error
|g - exact| / |exact| and cosine.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megascale_moe.bench.convergence_plots import can_draw, draw
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
from megascale_moe.train.progress import counted_progress

FILE = "convergence.json"
PROBES = 10
"""Steps of a run at which gradients are compared."""
DEFAULT = "fp32"
VARIANTS: dict[str, WireConfig] = {
    DEFAULT: WireConfig(),
    "gradients bf16": WireConfig(gradients="bf16"),
    "gradients fp8": WireConfig(gradients="fp8"),
    "gradients bf16_ring": WireConfig(gradients="bf16_ring"),
    "activations bf16": WireConfig(activations="bf16"),
    "activations fp8": WireConfig(activations="fp8"),
    "activations fp8_tensor": WireConfig(activations="fp8_tensor"),
    "activations fp8_cast": WireConfig(activations="fp8_cast"),
    "parameters bf16": WireConfig(parameters="bf16"),
    "parameters fp8": WireConfig(parameters="fp8"),
    "all bf16": WireConfig(gradients="bf16", activations="bf16", parameters="bf16"),
    "bf16 + activations fp8": WireConfig(gradients="bf16", activations="fp8", parameters="bf16"),
    "all fp8": WireConfig(gradients="fp8", activations="fp8", parameters="fp8"),
}
"""The variants that are trained, by name; the paper rejects those with "_"."""
CONTROLS = {f"fp32 other weights {number}": number for number in (1, 2, 3)}
"""FP32 on the same text from other initial weights: how far losses differ by luck, which a format must not exceed.
(Another seed has other held-out text as well, whose losses differ by far more.)"""
VARIANTS |= dict.fromkeys(CONTROLS, WireConfig())

Progress = Callable[[str, int, int], None]
Errors = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class ConvergenceOptions:
    """The arguments of the command.

    Attributes:
        variants: names of `VARIANTS`. seeds: how many; they count from the config's. folder: where results are kept.
    """

    variants: tuple[str, ...]
    seeds: int
    folder: Path

    @classmethod
    def of(cls, names: str, seeds: int, folder: Path) -> ConvergenceOptions:
        """From the command line; "" is all.

        Raises:
            ConfigError: a name that is none.
        """
        wanted = tuple(name.strip() for name in names.split(",")) if names else tuple(VARIANTS)
        for name in wanted:
            require(name in VARIANTS, f"--variants: {name!r} is unknown; known: {', '.join(VARIANTS)}")
        return cls(wanted, seeds, folder)


def bench(config: Config, nproc: int | None, order: ConvergenceOptions, *, as_json: bool) -> int:
    """The command, on forked ranks. The exit status.

    Raises:
        ConfigError: the config does not fit the ranks, or the folder holds results of another config.
    """
    world = nproc or local_rank_count(config)
    mesh = mesh_of(config.parallel, config.model, world)
    check_batches(config, mesh)
    kept(order.folder, config, world)
    order.folder.mkdir(parents=True, exist_ok=True)
    status = fork_ranks(world, lambda _: _rank(config, mesh, order), timeout=TIMEOUT.total_seconds())
    if status:
        return status
    found = kept(order.folder, config, world)
    drawn = draw(found["runs"], order.folder, DEFAULT, CONTROLS) if can_draw() else []
    if as_json:
        print(json.dumps(found))
    else:
        Console(highlight=False, width=120).print(table(found["rows"]))
        print(f"results: {order.folder / FILE}" + (f", plots: {', '.join(map(str, drawn))}" if drawn else ""))
        if not can_draw():
            print("no plots: matplotlib is missing; pip install 'megascale-moe[plots]'")
    return 0


def kept(folder: Path, config: Config, world: int) -> dict[str, Any]:
    """The document in a folder, or an empty one.

    Raises:
        ConfigError: it belongs to another config or number of ranks.
    """
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "ranks": world}
    fresh: dict[str, Any] = {
        "name": "convergence", "machine": machine, "config": described(config), "rows": [], "runs": [],
    }  # fmt: skip
    path = folder / FILE
    if not path.exists():
        return fresh
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = found["config"] == fresh["config"] and found["machine"]["ranks"] == world
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read; remove it or choose another --out") from error
    require(same, f"{path}: holds results of another config or number of ranks; choose another --out")
    return found


def described(config: Config) -> dict[str, Any]:
    """Return all that the losses depend on."""
    parts = {name: asdict(getattr(config, name)) for name in ("model", "parallel", "train", "data")}
    return json.loads(json.dumps(parts))  # type: ignore[no-any-return]


def _rank(config: Config, mesh: Mesh, order: ConvergenceOptions) -> None:
    job = join(config, mesh)
    document = kept(order.folder, config, job.world)
    done = {(run["variant"], run["seed"]) for run in document["runs"]}
    wanted = [(name, config.train.seed + seed) for seed in range(order.seeds) for name in order.variants]
    with contextlib.ExitStack() as stack:
        progress: Progress = stack.enter_context(counted_progress()) if job.leads else (lambda *_: None)
        for place, (name, seed) in enumerate(wanted):
            if (name, seed) in done:
                continue
            run = VariantRun(config, mesh, job, name, seed)
            document["runs"].append(run.trained(partial(progress, f"{name} ({place + 1} of {len(wanted)})")))
            if job.leads:
                document["rows"] = rows(document["runs"])
                _write(order.folder / FILE, document)


def _write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document), encoding="utf-8")
    part.replace(path)


class VariantRun:
    """One training run on one rank."""

    def __init__(self, config: Config, mesh: Mesh, job: Job, variant: str, seed: int) -> None:
        train = replace(config.train, seed=seed, checkpoint_every=0)
        self.config = replace(config, train=train, wire=VARIANTS[variant], overlap=OverlapConfig())
        self.variant, self.seed, self.job = variant, seed, job
        _, training, held_out = open_data(self.config, job)
        self.loop = Loop(self.config, mesh, job, training, held_out)
        self.probe = Probe(self.loop)

    def trained(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Train to the end; what happened."""
        loop, steps, every = self.loop, self.config.train.steps, self.config.train.eval_every
        loop.trainer.initialise(self.seed + 1000 * CONTROLS.get(self.variant, 0))
        losses: list[float] = []
        evaluations: dict[int, float | None] = {}
        errors: dict[int, Errors] = {}
        probes = {round(steps * place / PROBES) for place in range(PROBES)}
        while loop.trainer.steps < steps:
            step = loop.loader.next_step()
            batches = micro_batches(step.rows, loop.micro)
            if loop.trainer.steps in probes:
                errors[loop.trainer.steps] = self.probe.errors(batches, step.target_count)
            losses.append(loop.trainer.step(batches, step.target_count).loss)
            done = loop.trainer.steps
            if done == steps or (every and done % every == 0):
                evaluations[done] = loop.evaluate()
            progress(done, steps)
        return {
            "variant": self.variant, "seed": self.seed, "wire": asdict(self.config.wire), "losses": losses,
            "evaluations": evaluations, "gradient_errors": errors,
        }  # fmt: skip


class Probe:
    """Compares the gradient of a step with an exact one; a run is afterwards where it was."""

    def __init__(self, loop: Loop) -> None:
        self.trainer = loop.trainer
        self.exact = [_exact(group) for group in loop.trainer.optimizer.groups]

    def errors(self, batches: Sequence[Batch], target_count: int) -> Errors:
        """(relative error, cosine) by layer, of this batch at these weights."""
        own = self._sums(batches, target_count, self.trainer.optimizer.groups, self.trainer.config.wire)
        with self._exact_weights():
            exact = self._sums(batches, target_count, self.exact, WireConfig())
        return self._compared(own, exact)

    def _sums(
        self, batches: Sequence[Batch], target_count: int, groups: Sequence[FlatWeights], wire: WireConfig
    ) -> dict[str, Tensor]:
        """Summed gradients of this rank's shards, by group."""
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

    @contextlib.contextmanager
    def _exact_weights(self) -> Iterator[None]:
        """Weights as the masters are, on all ranks."""
        rounded = [group for group in self.trainer.optimizer.groups if group.formats.parameters is not None]
        names = {group.name for group in rounded}
        exact = [group for group in self.exact if group.name in names]
        for group in exact:
            group.weights[group.shard] = group.master
        gather_all(exact).run(updated(exact), {})
        yield
        if rounded:
            self.trainer.optimizer.settle()

    def _compared(self, own: dict[str, Tensor], exact: dict[str, Tensor]) -> Errors:
        names = sorted({layer_of(name) for name in parameter_shapes(self.trainer.model)})
        totals = torch.zeros(len(names), 4, dtype=torch.float64)  # |a - b|^2, ab, a^2, b^2
        for group in self.trainer.optimizer.groups:
            for slot in group.slots:
                for owned in group.owned(slot):
                    a, b = own[group.name][owned.place].double(), exact[group.name][owned.place].double()
                    parts = torch.stack([(a - b).square().sum(), a @ b, a @ a, b @ b])
                    totals[names.index(layer_of(slot.name))] += parts.cpu()
        all_reduce_sum(totals, self.trainer.axes["world"])
        return {
            name: (math.sqrt(gap / bb), dot / math.sqrt(aa * bb)) if aa and bb else (math.nan, math.nan)
            for name, (gap, dot, aa, bb) in zip(names, totals.tolist(), strict=True)
        }


def _exact(group: FlatWeights) -> FlatWeights:
    """The same buffers, with nothing narrowed on the way."""
    same = copy.copy(group)
    same.formats = Formats()
    return same


def layer_of(name: str) -> str:
    """"layers.3.ffn.router.weight" -> "3 ffn", "head.weight" -> "head"."""
    parts = name.split(".")
    return " ".join(parts[1:3]).replace("_norm", "") if parts[0] == "layers" else parts[0]


# --- results ---------------------------------------------------------------------------------------------------------


def rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One per variant: the last validation loss over seeds, how far from FP32 of the same seed, gradient errors."""
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], []).append(run)
    plain = {run["seed"]: last(run) for run in by_variant.get(DEFAULT, [])}
    found = []
    for name, same in by_variant.items():
        losses = [last(run) for run in same]
        gaps = [last(run) - plain[run["seed"]] for run in same if run["seed"] in plain]
        errors = [error for run in same for probe in run["gradient_errors"].values() for error in probe.values()]
        found.append({
            "variant": name, "median": median(losses), "spread": max(losses) - min(losses), "unit": "nats",
            "seeds": len(same), "to_fp32": sum(gaps) / len(gaps) if gaps else None,
            "gradient_error": median(error for error, _ in errors), "gradient_cosine": median(c for _, c in errors),
        })  # fmt: skip
    return found


def last(run: dict[str, Any]) -> float:
    """The loss that a run ended with: on held-out text, or, without any, the mean of its last twentieth."""
    ends = [loss for loss in run["evaluations"].values() if loss is not None]
    if ends:
        return float(ends[-1])
    tail = run["losses"][-max(len(run["losses"]) // 20, 1) :]
    return float(sum(tail) / len(tail))


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For people."""
    heads = ("format", "seeds", "loss", "over seeds", "to fp32", "gradient error", "cosine")
    found = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for column in found.columns[1:]:
        column.justify = "right"
    for row in rows:
        gap = "" if row["to_fp32"] is None else f"{row['to_fp32']:+.4f}"
        found.add_row(
            row["variant"], str(row["seeds"]), f"{row['median']:.4f}", f"{row['spread']:.4f}", gap,
            f"{row['gradient_error']:.2e}", f"{row['gradient_cosine']:.6f}",
        )  # fmt: skip
    return found
