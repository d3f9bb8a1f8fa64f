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

from megascale_moe.comm.axis import Axes
from megascale_moe.comm.collectives import all_reduce_sum
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ModelConfig
from megascale_moe.engine.executor import Program, resolve
from megascale_moe.engine.op import backward
from megascale_moe.engine.trace import Trace
from megascale_moe.kernels.allocator import keep_freed_memory
from megascale_moe.kernels.blocks import Fusion
from megascale_moe.model.counts import parameter_shapes
from megascale_moe.model.rotary import rotary_table
from megascale_moe.model.router import updated_bias
from megascale_moe.model.segments import Segments
from megascale_moe.model.transformer import initialise
from megascale_moe.optim.flat import FlatWeights, Slot
from megascale_moe.optim.schedule import learning_rate
from megascale_moe.optim.sharded_adamw import ShardedAdamW, flat_groups
from megascale_moe.parallel.layout import Layout
from megascale_moe.parallel.model import INPUTS, Head, auxiliary_names, load_names, local_inputs, model_ops
from megascale_moe.train.checkpoint import Checkpoint, Piece
from megascale_moe.train.data import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class StepResult:
    """What one update did, the same on every rank except the trace.

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
        if device.type == "cpu":
            keep_freed_memory()
        wanted = config.train.compile
        Fusion.enabled = wanted == "on" or (wanted == "auto" and (device.type != "cpu" or config.train.steps >= 500))
        groups = flat_groups(local_shapes(self.model, mesh.ep), axes, self.dtype, device)
        self.optimizer = ShardedAdamW(groups, axes["world"], config.train)
        self.buffers: dict[str, Tensor] = {}
        if self.model.correction_bias:
            for index in range(self.model.dense_layers, self.model.layers):
                bias = torch.zeros(self.model.experts, device=device)
                self.buffers[f"layers.{index}.ffn.router.bias"] = bias
        self.program = lru_cache(maxsize=None)(self._program)

    def initialise(self) -> None:
        """Fill the weights from the seed; the same whatever the layout."""
        first = self.axes["ep"].index * (self.model.experts // self.mesh.ep)
        for group, slot in self._slots():
            value = torch.empty(slot.shape)
            initialise(slot.name, value, self.model, self.config.train.seed, first)
            group.set(slot, value.to(self.device))

    def set_weights(self, parameters: Mapping[str, Tensor]) -> None:
        """Take weights of the whole model (our names, float32), for example from another library's checkpoint."""
        for group, slot in self._slots():
            _, offset, size = self._box(slot)
            group.set(slot, parameters[slot.name][offset[0] : offset[0] + size[0]].float().to(self.device))
        for name, value in self.buffers.items():
            value.copy_(parameters[name])

    def _slots(self) -> Iterable[tuple[FlatWeights, Slot]]:
        return ((group, slot) for group in self.optimizer.groups for slot in group.slots)

    def _program(self, rows: int, head: Head) -> tuple[Layout, Program]:
        c = self.config
        layout = Layout(rows, self.model.sequence_length, self.axes, self.dtype, c.parallel.dispatch)
        ops = model_ops(self.model, layout, head)
        kept = {"train": ["loss", *auxiliary_names(self.model), *load_names(self.model)], "loss": ["loss"],
                "logits": ["logits"]}[head]
        if head == "train":
            ops = [*ops, *backward(ops)]
        return layout, Program(ops, INPUTS, kept)

    def _run(self, batch: Batch, head: Head, trace: Trace | None = None, **more: Any) -> dict[str, Any]:
        rows, length = batch.tokens.shape
        layout, program = self.program(rows, head)
        segments = Segments(rows, length, batch.boundaries)
        node = self.axes["node"]
        rope = rotary_table(self.model, segments.positions(node.index, node.size).to(self.device))
        values = local_inputs(batch.tokens.to(self.device), batch.targets.to(self.device), layout, rope, segments)
        weights = self.optimizer.weights | self.buffers
        return program.run(values | more, weights, self.optimizer.gradients, trace)

    def step(self, batches: Sequence[Batch], target_count: int) -> StepResult:
        """One update from this rank's micro-batches of a global batch with `target_count` targets."""
        train, model = self.config.train, self.model
        tokens = train.global_batch * model.sequence_length
        scales = {
            "loss_scale": 1.0 / max(target_count, 1),
            "auxiliary_scale": torch.tensor(1.0 / tokens, device=self.device),
        }
        layers = model.layers - model.dense_layers
        totals = torch.zeros(2 + layers * model.experts, dtype=torch.float64, device=self.device)
        trace = Trace()
        for batch in batches:
            out = self._run(batch, "train", trace, **scales)
            totals[0] += out["loss"]
            for name in auxiliary_names(model):
                totals[1] += out[name]
            if layers:
                totals[2:] += torch.stack([resolve(out, name) for name in load_names(model)]).flatten()
        self.steps += 1
        rate = learning_rate(train, self.steps)
        norm = self.optimizer.step(rate)
        all_reduce_sum(totals, self.axes["world"])
        load = totals[2:].view(layers, model.experts).long()
        for bias, counts in zip(self.buffers.values(), load, strict=bool(self.buffers)):
            bias.copy_(updated_bias(bias, counts, model.bias_update_rate))
        loss, auxiliary = float(totals[0]) / max(target_count, 1), float(totals[1]) / tokens
        return StepResult(loss, auxiliary, norm, rate, load.cpu(), trace)

    def evaluate(self, batches: Iterable[Batch], target_count: int) -> float:
        """Mean loss over held-out batches, of which every rank brings equally many."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            total += self._run(batch, "loss")["loss"]
        return float(all_reduce_sum(total, self.axes["world"])) / max(target_count, 1)

    def next_token_logits(self, tokens: list[int]) -> Tensor:
        """Logits float32 [vocab] for the token after `tokens` (at most a sequence); all ranks call it together."""
        length, node = self.model.sequence_length, self.axes["node"]
        padded = torch.zeros(1, length, dtype=torch.long)
        padded[0, : len(tokens)] = torch.tensor(tokens)
        logits = self._run(Batch(padded, padded, (0, length)), "logits")["logits"]
        owner, place = divmod(len(tokens) - 1, length // node.size)
        mine = logits[place] if node.index == owner else torch.zeros_like(logits[0])
        return all_reduce_sum(mine.contiguous(), node).cpu()

    # --- state -------------------------------------------------------------------------------------------------------

    def pieces(self) -> Iterable[Piece]:
        """This rank's part of the training state, keyed by global names; all ranks' parts cover everything once."""
        state = {"parameters": [group.master for group in self.optimizer.groups], **self.optimizer.state()}
        for index, group in enumerate(self.optimizer.groups):
            for slot in group.slots:
                inside = group.overlap(slot)
                if inside is not None:
                    for kind, tensors in state.items():
                        values = group.master_part(slot, *inside, of=tensors[index]).cpu()
                        yield Piece(f"{kind}.{slot.name}", *self._box(slot), inside[0], values)
        if self.axes["world"].index == 0:
            for name, value in self.buffers.items():
                shape = tuple(value.shape)
                yield Piece(f"buffers.{name}", shape, (0,) * len(shape), shape, 0, value.flatten().cpu())

    def _box(self, slot: Slot) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(global shape, offset, size) of a weight: experts are a slice of the stack of all."""
        size, offset = tuple(slot.shape), (0,) * len(slot.shape)
        if ".experts." not in slot.name:
            return size, offset, size
        ep = self.axes["ep"]
        return (size[0] * ep.size, *size[1:]), (ep.index * size[0], *offset[1:]), size

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of any layout.

        Raises:
            ConfigError: it belongs to another model, or is damaged.
        """
        checkpoint.require(self.expected())
        state = self.optimizer.state()
        for index, group in enumerate(self.optimizer.groups):
            for slot in group.slots:
                _, offset, size = self._box(slot)
                group.set(slot, checkpoint.read(f"parameters.{slot.name}", offset, size).to(self.device))
                inside = group.overlap(slot)
                if inside is not None:
                    first, last = inside
                    for kind, tensors in state.items():
                        part = checkpoint.read_flat(f"{kind}.{slot.name}", offset, size, first, last - first)
                        group.master_part(slot, first, last, of=tensors[index]).copy_(part)
        for name, value in self.buffers.items():
            value.copy_(checkpoint.read(f"buffers.{name}", (0,), tuple(value.shape)))
        self.optimizer.restore(checkpoint.step)
        self.steps = checkpoint.step

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and global shape of everything a checkpoint of this model holds."""
        kinds = ("parameters", "exp_avg", "exp_avg_sq")
        shapes = {
            f"{kind}.{name}": shape for kind in kinds for name, shape in parameter_shapes(self.model).items()
        }
        return shapes | {f"buffers.{name}": tuple(value.shape) for name, value in self.buffers.items()}


def local_shapes(config: ModelConfig, ep: int) -> dict[str, torch.Size]:
    """Shapes of one rank's weights: everything, and its share of the experts."""
    return {
        name: torch.Size((shape[0] // ep, *shape[1:]) if ".experts." in name else shape)
        for name, shape in parameter_shapes(config).items()
    }
