"""One rank's model, optimizer and programs: what a step, an evaluation and a checkpoint are made of.

Holds no data pipeline, files or printing; the loop around it does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from megascale_moe.optim.flat import Slot
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

TEMPERATURE = 0.7
"""Of the text that `Trainer.generate` draws."""


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
        self._fill(lambda slot: initial(slot.name, slot.placement, self.model, seed))

    def set_weights(self, parameters: Mapping[str, Tensor]) -> None:
        """Take weights of the whole model (our names, float32), for example from another library's checkpoint."""
        self._fill(lambda slot: slot.placement.take(parameters[slot.name]).float())
        for name, value in self.buffers.items():
            value.copy_(parameters[name])

    def _fill(self, value_of: Callable[[Slot], Tensor]) -> None:
        for group in self.optimizer.groups:
            for slot in group.slots:
                group.set(slot, value_of(slot).to(self.device))
        # All ranks compute with weights as they arrive: rounded, where they travel in another format.
        if any(group.formats.parameters is not None for group in self.optimizer.groups):
            self.optimizer.settle()

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
        self,
        batches: Sequence[Batch],
        head: Head,
        shared: Mapping[str, Any] | None = None,
        trace: Trace | None = None,
        observe: Observer | None = None,
    ) -> dict[str, Any]:
        """Run a list on micro-batches of equal size; return the values that outlive it, by name.

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
        """Do one update from this rank's micro-batches of a global batch with `target_count` targets.

        Args:
            observe: see `Program.run`; not asked while the first steps are measured.
        """
        train, model, optimizer = self.config.train, self.model, self.optimizer
        tokens = train.global_batch * model.sequence_length
        rate = learning_rate(train, self.steps + 1)
        values: dict[str, Any] = {
            "loss_scale": 1.0 / max(target_count, 1),
            "auxiliary_scale": torch.tensor(1.0 / tokens, device=self.device),
        }
        hidden = self.hides
        if hidden:
            values |= optimizer.given(rate) | optimizer.updated()
        trace = Trace(device=self.device)
        out = self.run(batches, "train", values, trace, self.profiler.observe if self.profiler else observe)
        if self.profiler is not None:
            trace.settle()
            self._learn(self.profiler, trace, batches)
        layers = moe_layers(model)
        rows = [layers.index(layer) for layer in moe_layers(model, self.part)]
        totals = torch.zeros(2 + len(layers) * model.experts, dtype=torch.float64, device=self.device)
        load = totals[2:].view(len(layers), model.experts)
        for micro in range(len(batches)):
            if self.part.last:
                totals[0] += out[of_micro("loss", micro)]
            for name in auxiliary_names(model, self.part):
                totals[1] += out[of_micro(name, micro)]
            for row, name in zip(rows, load_names(model, self.part), strict=True):
                load[row] += resolve(out, of_micro(name, micro))
        self.steps += 1
        norm = optimizer.end(out["norm"]) if hidden else optimizer.step(rate, trace)
        self.stale = hidden
        trace.settle()
        all_reduce_sum(totals, self.axes["world"])
        load = load.long()
        if self.buffers:
            for row, bias in zip(rows, self.buffers.values(), strict=True):
                bias.copy_(updated_bias(bias, load[row], model.bias_update_rate))
        loss, auxiliary = float(totals[0]) / max(target_count, 1), float(totals[1]) / tokens
        return StepResult(loss, auxiliary, norm, rate, load.cpu(), trace)

    def _learn(self, profiler: Profiler, trace: Trace, batches: Sequence[Batch]) -> None:
        """Change to the configured overlap and formats once enough steps have been measured."""
        profiler.runs.append(list(trace.events))
        if len(profiler.runs) < STEPS:
            return
        plan, _ = self.program(len(batches[0].tokens), len(batches), "train")
        self.profile = profiler.profile(plan, self.config.overlap, self.axes["data"])
        self.overlap, self.wire, self.profiler = self.config.overlap, self.config.wire, None
        self.program.cache_clear()

    def evaluate(self, batches: Iterable[Batch], target_count: int) -> float:
        """Return the mean loss over held-out batches, of which every rank brings equally many."""
        self.settle()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            out = self.run([batch], "loss")
            if self.part.last:
                total += out[of_micro("loss", 0)]
        return float(all_reduce_sum(total, self.axes["world"])) / max(target_count, 1)

    def next_token_logits(self, tokens: list[int]) -> Tensor:
        """Return logits, float32 [vocab], for the token after `tokens`, a sequence at most; all ranks call it."""
        length, node, sequence = self.model.sequence_length, self.axes["node"], self.axes["sequence"]
        self.settle()
        padded = torch.zeros(1, length, dtype=torch.long)
        padded[0, : len(tokens)] = torch.tensor(tokens)
        out = self.run([Batch(padded, padded, (0, length))], "logits")
        mine = torch.zeros(self.model.vocab, device=self.device)
        if self.part.last:
            logits = out[of_micro("logits", 0)]
            layout = self.program(1, 1, "logits")[0].layout
            part, place = slices_of(layout).place(len(tokens) - 1)
            holder, inside = divmod(part, node.size)  # the node that has the token, and the rank in it
            if strategies_of(layout, self.model).vocabulary.gathers_tokens(layout):
                width = logits.shape[1]
                if holder == layout.cp.index:
                    mine[node.index * width : (node.index + 1) * width] = logits[inside * layout.tokens + place]
            elif part == sequence.index:
                mine.copy_(logits[place])
        return all_reduce_sum(all_reduce_sum(mine, sequence), self.axes["pp"]).cpu()

    def generate(self, prompt: list[int], count: int, end: int) -> list[int]:
        """Continue `prompt` by up to `count` tokens; all ranks call it together and get the same result.

        The whole sequence is run again for every token: no cache, so that text comes from the very lists that train.
        """
        generator = torch.Generator().manual_seed(self.config.train.seed)
        tokens = list(prompt)
        for _ in range(min(count, self.model.sequence_length - len(prompt))):
            probabilities = (self.next_token_logits(tokens) / TEMPERATURE).softmax(-1)
            if not probabilities.isfinite().all():  # training diverged, which the losses say
                break
            token = int(torch.multinomial(probabilities, 1, generator=generator))
            if token == end:
                break
            tokens.append(token)
        return tokens[len(prompt) :]

    # --- state -------------------------------------------------------------------------------------------------------

    def pieces(self) -> Iterable[TensorPiece]:
        """Yield this rank's part of the training state by global names; all ranks' parts cover everything once."""
        for group, state in zip(self.optimizer.groups, self.optimizer.state(), strict=True):
            for slot in group.slots:
                for owned in group.owned(slot):
                    for kind, tensor in {"parameters": group.master, **state}.items():
                        name, values = f"{kind}.{slot.name}", tensor[owned.place].cpu()
                        yield TensorPiece(name, slot.placement.whole, *owned.box, owned.first, values)
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

        def weight(slot: Slot) -> Tensor:
            name, placement = f"parameters.{slot.name}", slot.placement
            return torch.cat([checkpoint.read(name, *box).flatten() for box in placement.boxes]).view(placement.shape)

        self._fill(weight)
        for group, state in zip(self.optimizer.groups, self.optimizer.state(), strict=True):
            for slot in group.slots:
                for owned in group.owned(slot):
                    for kind, tensor in state.items():
                        length = owned.last - owned.first
                        values = checkpoint.read_flat(f"{kind}.{slot.name}", *owned.box, owned.first, length)
                        tensor[owned.place].copy_(values)
        for name, value in self.buffers.items():
            value.copy_(checkpoint.read(f"buffers.{name}", (0,), tuple(value.shape)))
        self.optimizer.restore(checkpoint.step)
        self.steps = checkpoint.step

    def _require(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint without the tensors of this model and this optimizer, or with others."""
        rule, matrices = rule_of(self.config.train), parameter_matrices(self.model)
        shapes = {f"buffers.{name}": shape for _, name, shape in buffer_shapes(self.model)}
        for name, shape in parameter_shapes(self.model).items():
            kinds = ("parameters", *(state.name for state in rule.of(matrices[name]).state))
            shapes |= {f"{kind}.{name}": shape for kind in kinds}
        saved, kept = (
            sorted({name.partition(".")[0] for name in names} - {"parameters", "buffers"})
            for names in (checkpoint.tensors, shapes)
        )
        require(
            saved == kept,
            f"{checkpoint.folder} is a checkpoint of another optimizer: it keeps {', '.join(saved) or 'nothing'} of "
            f"each weight, train.optimizer = {self.config.train.optimizer!r} keeps {', '.join(kept) or 'nothing'}; "
            "resume with the one that saved it",
        )
        checkpoint.require(shapes)
