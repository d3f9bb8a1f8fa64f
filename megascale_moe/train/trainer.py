"""One rank's model, optimizer and programs: what a step, an evaluation and a checkpoint are made of.

Holds no data pipeline, files or printing; the loop around it does that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megascale_moe.checkpoint import Checkpoint, TensorPiece
from megascale_moe.comm.axis import Axes
from megascale_moe.comm.collectives import all_reduce_sum
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ModelConfig, OverlapConfig, WireConfig, require
from megascale_moe.data import Batch
from megascale_moe.engine.executor import Observer, Program, resolve
from megascale_moe.engine.trace import Trace
from megascale_moe.kernels.allocator import keep_freed_memory
from megascale_moe.kernels.blocks import Fusion
from megascale_moe.model.counts import parameter_matrices, parameter_shapes
from megascale_moe.model.router import updated_bias
from megascale_moe.model.segments import Segments
from megascale_moe.optim.flat import FlatWeights, Slot
from megascale_moe.optim.groups import flat_groups
from megascale_moe.optim.registry import rule_of
from megascale_moe.optim.schedule import learning_rate
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.pipeline.batches import DTYPES
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.pipeline.step import SHARED, of_micro
from megascale_moe.strategies.model import (
    Head,
    auxiliary_names,
    buffer_shapes,
    buffers_of,
    load_names,
    local_inputs,
    moe_layers,
)
from megascale_moe.strategies.registry import slices_of, strategies_of
from megascale_moe.strategies.weights import initial, placements
from megascale_moe.train.profiling import STEPS, Profiler, needs_profile, plain


@dataclass
class StepResult:
    """Results of one update, the same on every rank except the trace.

    Attributes:
        loss: mean over the targets of the global batch. auxiliary: auxiliary losses, mean over its tokens.
        load: tokens per expert and MoE layer over the global batch, int64 [layers, experts].
    """

    loss: float
    auxiliary: float
    grad_norm: float
    learning_rate: float
    load: Tensor
    trace: Trace = field(default_factory=Trace)


class Trainer:
    """A rank of a training job.

    Attributes:
        steps: updates done so far.
        buffers: name -> state that is no weight (the router's correction bias), float32.
    """

    def __init__(self, config: Config, mesh: Mesh, axes: Axes, device: torch.device) -> None:
        self.config, self.mesh, self.axes, self.device = config, mesh, axes, device
        self.model: ModelConfig = config.model
        self.dtype = DTYPES[config.train.dtype]
        self.steps = 0
        self.stale = False
        if device.type == "cpu":
            keep_freed_memory()
        wanted = config.train.compile
        Fusion.enabled = wanted == "on" or (wanted == "auto" and (device.type != "cpu" or config.train.steps >= 500))
        self.profiler = Profiler() if needs_profile(config.overlap, config.wire) and device.type != "meta" else None
        self.overlap, self.wire = plain(config.overlap, config.wire) if self.profiler else (config.overlap, config.wire)
        self.profile = Profile()
        plan = self.plan(1)
        self.part, self.placements = plan.part, placements(self.model, plan.layout, plan.part)
        by_layer = config.overlap.hides_synchronisation
        groups = flat_groups(
            self.placements, axes, self.dtype, device, by_layer=by_layer, wire=config.wire, rule=rule_of(config.train)
        )
        self.optimizer = ShardedOptimizer(groups, axes, config.train)
        self.buffers = buffers_of(self.model, self.part, device)
        self.program = lru_cache(maxsize=None)(self._program)

    def plan(self, rows: int, micros: int = 1, head: Head = "train") -> StepPlan:
        """Return this rank's plan for `micros` micro-batches of `rows` sequences."""
        c = self.config
        training = head == "train"  # what is evaluated are the weights, without what hides or narrows communication
        return StepPlan(
            self.model, c.parallel, self.axes, self.dtype, rows, micros, head, self.device,
            self.overlap if training else OverlapConfig(), self.wire if training else WireConfig(), self.profile,
        )  # fmt: skip

    def initialise(self, seed: int | None = None) -> None:
        """Fill the weights from a seed, the config's unless another is given; the same whatever the layout."""
        seed = self.config.train.seed if seed is None else seed
        for group, slot in self._slots():
            value = initial(slot.name, slot.placement, self.model, seed)
            group.set(slot, value.to(self.device))
        self._as_others_have_them()

    def set_weights(self, parameters: Mapping[str, Tensor]) -> None:
        """Take weights of the whole model (our names, float32), for example from another library's checkpoint."""
        for group, slot in self._slots():
            group.set(slot, slot.placement.take(parameters[slot.name]).float().to(self.device))
        for name, value in self.buffers.items():
            value.copy_(parameters[name])
        self._as_others_have_them()

    def _as_others_have_them(self) -> None:
        """Round exact weights as those are that arrive in another format, which all ranks compute with."""
        if any(group.formats.parameters is not None for group in self.optimizer.groups):
            self.optimizer.settle()

    def _slots(self) -> Iterable[tuple[FlatWeights, Slot]]:
        return ((group, slot) for group in self.optimizer.groups for slot in group.slots)

    def settle(self) -> None:
        """Bring the weights up to date, of which a hidden step leaves those that other ranks own behind."""
        if self.stale:
            self.optimizer.settle()
            self.stale = False

    def _program(self, rows: int, micros: int, head: Head) -> tuple[StepPlan, Program]:
        plan = self.plan(rows, micros, head)
        if head == "train" and self.hides:
            optimizer = self.optimizer
            more = [*optimizer.given(0.0), *optimizer.updated()]
            return plan, plan.program(optimizer.hidden(plan.ops), more, ["norm"])
        return plan, plan.program()

    @property
    def hides(self) -> bool:
        """Whether synchronisation is among the operators of a step rather than behind them."""
        return self.overlap.hides_synchronisation

    def run(
        self, batches: Sequence[Batch], head: Head, shared: Mapping[str, Any] | None = None,
        trace: Trace | None = None, observe: Observer | None = None,
    ) -> dict[str, Any]:
        """Run a list on micro-batches of equal size; what is kept, by name.

        Args:
            shared: values that all micro-batches read (`pipeline.step.SHARED`).
        """
        rows, length = batches[0].tokens.shape
        plan, program = self.program(rows, len(batches), head)
        values: dict[str, Any] = dict.fromkeys(SHARED) | dict(shared or {})
        for micro, batch in enumerate(batches):
            segments = Segments(rows, length, batch.boundaries)
            tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
            inputs = local_inputs(tokens, targets, plan.layout, segments, self.model)
            values |= {of_micro(name, micro): value for name, value in inputs.items()}
        weights = self.optimizer.weights | self.buffers
        return program.run(values, weights, self.optimizer.gradients, trace, observe)

    def step(self, batches: Sequence[Batch], target_count: int, observe: Observer | None = None) -> StepResult:
        """One update from this rank's micro-batches of a global batch with `target_count` targets.

        Args:
            observe: see `Program.run`; not asked while the first steps are measured.
        """
        train, model = self.config.train, self.model
        tokens = train.global_batch * model.sequence_length
        scales: dict[str, Any] = {
            "loss_scale": 1.0 / max(target_count, 1),
            "auxiliary_scale": torch.tensor(1.0 / tokens, device=self.device),
        }
        places = {layer: place for place, layer in enumerate(moe_layers(model))}
        totals = torch.zeros(2 + len(places) * model.experts, dtype=torch.float64, device=self.device)
        load = totals[2:].view(len(places), model.experts)
        trace = Trace(device=self.device)
        rate = learning_rate(train, self.steps + 1)
        hidden = self.hides
        if hidden:
            scales |= self.optimizer.given(rate) | self.optimizer.updated()
        out = self.run(batches, "train", scales, trace, self.profiler.observe if self.profiler else observe)
        if self.profiler is not None:
            trace.settle()
            self._learn(self.profiler, trace, batches)
        for micro in range(len(batches)):
            if self.part.last:
                totals[0] += out[of_micro("loss", micro)]
            for name in auxiliary_names(model, self.part):
                totals[1] += out[of_micro(name, micro)]
            for layer, name in zip(moe_layers(model, self.part), load_names(model, self.part), strict=True):
                load[places[layer]] += resolve(out, of_micro(name, micro))
        self.steps += 1
        norm = self.optimizer.end(out["norm"]) if hidden else self.optimizer.step(rate, trace)
        self.stale = hidden
        trace.settle()
        all_reduce_sum(totals, self.axes["world"])
        load = load.long()
        if self.buffers:
            for layer, bias in zip(moe_layers(model, self.part), self.buffers.values(), strict=True):
                bias.copy_(updated_bias(bias, load[places[layer]], model.bias_update_rate))
        loss, auxiliary = float(totals[0]) / max(target_count, 1), float(totals[1]) / tokens
        return StepResult(loss, auxiliary, norm, rate, load.cpu(), trace)

    def _learn(self, profiler: Profiler, trace: Trace, batches: Sequence[Batch]) -> None:
        """Once enough steps have been measured, go over to what was asked for."""
        profiler.runs.append(list(trace.events))
        if len(profiler.runs) < STEPS:
            return
        plan, _ = self.program(len(batches[0].tokens), len(batches), "train")
        self.profile = profiler.profile(plan, self.config.overlap, self.axes["data"])
        self.overlap, self.wire, self.profiler = self.config.overlap, self.config.wire, None
        self.program.cache_clear()

    def evaluate(self, batches: Iterable[Batch], target_count: int) -> float:
        """Mean loss over held-out batches, of which every rank brings equally many."""
        self.settle()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            out = self.run([batch], "loss")
            if self.part.last:
                total += out[of_micro("loss", 0)]
        return float(all_reduce_sum(total, self.axes["world"])) / max(target_count, 1)

    def next_token_logits(self, tokens: list[int]) -> Tensor:
        """Logits float32 [vocab] for the token after `tokens` (at most a sequence); all ranks call it together."""
        length, node = self.model.sequence_length, self.axes["node"]
        self.settle()
        padded = torch.zeros(1, length, dtype=torch.long)
        padded[0, : len(tokens)] = torch.tensor(tokens)
        out = self.run([Batch(padded, padded, (0, length))], "logits")
        mine = torch.zeros(self.model.vocab, device=self.device)
        if self.part.last:
            logits = out[of_micro("logits", 0)]
            layout = self.program(1, 1, "logits")[0].layout
            part, place = slices_of(layout).place(len(tokens) - 1)
            if strategies_of(layout, self.model).vocabulary.gathers_tokens(layout):
                width = logits.shape[1]
                mine[node.index * width : (node.index + 1) * width] = logits[part * layout.tokens + place]
            elif part == node.index:
                mine.copy_(logits[place])
        return all_reduce_sum(all_reduce_sum(mine, node), self.axes["pp"]).cpu()

    # --- state -------------------------------------------------------------------------------------------------------

    def pieces(self) -> Iterable[TensorPiece]:
        """This rank's part of the training state, keyed by global names; all ranks' parts cover everything once."""
        for group, state in zip(self.optimizer.groups, self.optimizer.state(), strict=True):
            for slot in group.slots:
                whole = slot.placement.whole
                for owned in group.owned(slot):
                    for kind, tensor in {"parameters": group.master, **state}.items():
                        values = tensor[owned.place].cpu()
                        yield TensorPiece(f"{kind}.{slot.name}", whole, *owned.box, owned.first, values)
        if self.axes["data"].index == 0:
            for name, value in self.buffers.items():
                shape = tuple(value.shape)
                yield TensorPiece(f"buffers.{name}", shape, (0,) * len(shape), shape, 0, value.flatten().cpu())

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of any layout.

        Raises:
            ConfigError: it belongs to another model or another optimizer, or is damaged.
        """
        self._require(checkpoint)
        for group, state in zip(self.optimizer.groups, self.optimizer.state(), strict=True):
            for slot in group.slots:
                parts = [checkpoint.read(f"parameters.{slot.name}", *box).flatten() for box, _, _ in slot.ranges]
                group.set(slot, torch.cat(parts).view(slot.shape).to(self.device))
                for owned in group.owned(slot):
                    length = owned.last - owned.first
                    for kind, tensor in state.items():
                        part = checkpoint.read_flat(f"{kind}.{slot.name}", *owned.box, owned.first, length)
                        tensor[owned.place].copy_(part)
        for name, value in self.buffers.items():
            value.copy_(checkpoint.read(f"buffers.{name}", (0,), tuple(value.shape)))
        self.optimizer.restore(checkpoint.step)
        self._as_others_have_them()
        self.steps = checkpoint.step

    def _require(self, checkpoint: Checkpoint) -> None:
        expected = self.expected()
        saved, wanted = _state_kinds(checkpoint.tensors), _state_kinds(expected)
        here, there = (", ".join(kinds) or "nothing" for kinds in (wanted, saved))
        require(
            saved == wanted,
            f"{checkpoint.folder} is a checkpoint of another optimizer: it keeps {there} of each weight, "
            f"train.optimizer = {self.config.train.optimizer!r} keeps {here}; resume with the one that saved it",
        )
        checkpoint.require(expected)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and global shape of everything a checkpoint of this model and this optimizer holds."""
        rule, matrices = rule_of(self.config.train), parameter_matrices(self.model)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in parameter_shapes(self.model).items():
            kinds = ("parameters", *(state.name for state in rule.of(matrices[name]).state))
            shapes |= {f"{kind}.{name}": shape for kind in kinds}
        return shapes | {f"buffers.{name}": shape for _, name, shape in buffer_shapes(self.model)}


def _state_kinds(tensors: Iterable[str]) -> list[str]:
    """Return the sorted names under which a checkpoint holds an optimizer's state."""
    return sorted({name.partition(".")[0] for name in tensors} - {"parameters", "buffers"})
