"""AdamW whose state is split over the ranks that hold the same weights, as one list of operators.

A step is: gradients summed in float32 over each weight's own replicas, so that every rank has a shard of each group
(`sync`: inside of the node, then between nodes); one global norm over all shards (they are disjoint, so each element
counts once whatever the layout); clipping and AdamW on the shards by torch's fused kernel; weights gathered in the
compute dtype. In the list all reductions start before anything waits, and a group is gathered while the next one is
updated. It is built once, runs like any other list, and shows in the trace; on meta tensors it is a dry run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw  # the function: making torch's optimizer class imports the compiler, for seconds

from megascale_moe.comm.axis import Axes, Axis
from megascale_moe.comm.collectives import Pending, all_reduce
from megascale_moe.config import TrainConfig, WireConfig
from megascale_moe.engine.executor import Program
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Cost, Op, Phase, Stream
from megascale_moe.engine.trace import Trace
from megascale_moe.kernels.narrow import BFloat16, Float8, Format
from megascale_moe.optim.flat import FlatWeights, Formats
from megascale_moe.optim.hidden import hide, without_gathering
from megascale_moe.optim.sync import (
    CHUNK,
    arrived,
    gather,
    gather_job,
    given,
    pipelined,
    reduce,
    shard_of,
    updated,
    updated_of,
)
from megascale_moe.strategies.placement import Placement

NAMES = {
    ("node", "tensor_data"): "replicated",
    ("", "tensor_data"): "tensor",
    ("", "expert_data"): "experts",
    ("node", "tied"): "tied",
    ("", "tied"): "tied",
}
"""What a group is called, by the axes of its replicas (`Placement.replicas`)."""

NORM_BYTES = 16
"""Sent by a rank for the all-reduce of one float64: 8 bytes up and 8 bytes down a tree, at most."""


def flat_groups(
    placements: Mapping[str, Placement], axes: Axes, dtype: torch.dtype, device: torch.device, *,
    by_layer: bool = False, wire: WireConfig | None = None,
) -> list[FlatWeights]:  # fmt: skip
    """Weights by (replicas, with or without decay); vectors (norms) do not decay.

    Args:
        by_layer: also by layer, so that a layer's gradients can leave while the backward of others goes on.
        wire: how gradients and weights travel.

    The order of the groups is that of NAMES, not that of the weights: a rank of the first pipeline stage and one of
    the last, which share tied weights but no others, issue their communication in the same order.
    """
    wire = wire or WireConfig()
    groups: dict[Key, dict[str, Placement]] = {}
    for name, placement in placements.items():
        layer = ".".join(name.split(".")[:2]) + "." if by_layer and name.startswith("layers.") else ""
        groups.setdefault((layer, placement.replicas, len(placement.whole) > 1), {})[name] = placement
    found = []
    for layer, replicas, decay in sorted(groups, key=_order):
        intra, inter = (axes[axis] if axis else Axis(axis) for axis in replicas)
        name = layer + _name(replicas) + ("" if decay else ".vectors")
        members = groups[layer, replicas, decay]
        formats = Formats(_gradients(wire), _parameters(wire, dtype))
        found.append(
            FlatWeights(members, intra, inter, decay=decay, dtype=dtype, device=device, name=name, formats=formats)
        )
    return found


def _gradients(wire: WireConfig) -> str:
    """The form of the reduce-scatter. Nothing is measured for "auto": BF16 saves 2 bytes an element on the link and
    takes 8 of memory traffic, and a memory is more than four times as fast as a link between ranks."""
    return "bf16" if wire.gradients == "auto" else wire.gradients


def _parameters(wire: WireConfig, dtype: torch.dtype) -> Format | None:
    """How weights are written, if not in the compute dtype."""
    if wire.parameters == "fp8":
        return Float8("rows")
    return BFloat16() if wire.parameters in ("bf16", "auto") and dtype.itemsize > 2 else None


Key = tuple[str, tuple[str, str], bool]  # layer, replicas, decay


def _order(key: Key) -> tuple[int, tuple[str, str], bool, int]:
    layer, replicas, decay = key
    known = list(NAMES)
    number = int(layer.split(".")[1]) if layer else -1
    return known.index(replicas) if replicas in NAMES else len(known), replicas, not decay, number


def _name(replicas: tuple[str, str]) -> str:
    return NAMES.get(replicas) or "-".join(axis for axis in replicas if axis)


class ShardedAdamW:
    """Holds the weights' buffers and updates them.

    Args:
        world: all ranks; the norm is summed over it.
        chunk: elements of a shard that travel together, where they pass two links.

    Attributes:
        weights: name -> weight in the compute dtype. gradients: name -> `Gradient` in float32.
    """

    def __init__(self, groups: list[FlatWeights], world: Axis, config: TrainConfig, chunk: int = CHUNK) -> None:
        self.groups, self.world, self.config = groups, world, config
        self.weights: dict[str, Tensor] = {}
        self.gradients: dict[str, Gradient] = {}
        for group in groups:
            for name, weight, gradient in group.views():
                self.weights[name], self.gradients[name] = weight, gradient
        masters = [group.master for group in groups]
        self.exp_avg = [torch.zeros_like(master) for master in masters]
        self.exp_avg_sq = [torch.zeros_like(master) for master in masters]
        self.counts = [torch.zeros((), device=master.device) for master in masters]  # updates done
        self._chunk = chunk

    @cached_property
    def ops(self) -> list[Op]:
        """A step, from `given` to "norm"; changes weights, masters and moments."""
        reductions, gathers = reduce(self.groups, self._chunk), gather(self.groups, self._updates(), self._chunk)
        return [*reductions, *self._norm_ops(), *gathers]

    @cached_property
    def _program(self) -> Program:
        return Program(self.ops, self.given(0.0), ["norm"])

    def given(self, learning_rate: float) -> dict[str, Any]:
        """What `ops` read from outside, by name."""
        return {"learning_rate": learning_rate, **given(self.groups)}

    def hidden(self, step: Sequence[Op]) -> list[Op]:
        """The list of a whole training step: `step` (forward and backward) with synchronisation inside and the update.

        Reads what `given` and `updated` name; the weights of others arrive in the next step, or by `settle`.
        """
        rest = [*self._norm_ops(), *without_gathering(self._updates())]
        added = {name for op in step for name in op.gradients}
        untouched = [gradient for name, gradient in self.gradients.items() if name not in added]
        return [*([_clear(untouched)] if untouched else []), *hide(step, self.groups, rest)]

    def end(self, norm: float) -> float:
        """After a step: what was summed is spent; returns the norm."""
        for gradient in self.gradients.values():
            gradient.reset()
        return norm

    def updated(self) -> dict[str, Tensor]:
        """This rank's shards of the weights, by the names that gathers read."""
        return updated(self.groups)

    def settle(self, trace: Trace | None = None) -> None:
        """Bring all weights up to date after a hidden step."""
        gather_all(self.groups).run(updated(self.groups), {}, trace=trace)

    def step(self, learning_rate: float, trace: Trace | None = None) -> float:
        """Update the weights from the summed gradients.

        Args:
            trace: gets the operators' events after those it has; whoever brings it settles it.

        Returns:
            The global gradient norm before clipping; NaN on meta tensors.
        """
        for gradient in self.gradients.values():
            gradient.value()  # a weight nothing flowed into counts as zero
        return self.end(self._program.run(self.given(learning_rate), {}, trace=trace)["norm"])

    def state(self) -> dict[str, list[Tensor]]:
        """Optimizer tensors by name, one per group, shaped like its master shard; whoever resumes fills them."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def held_bytes(self) -> dict[str, int]:
        """Bytes that stay from step to step: of weights, gradient buffers, and masters and moments."""
        masters = [group.master for group in self.groups if not group.shares_memory]
        return {
            "parameters": sum(group.weights.nbytes for group in self.groups),
            "gradients": sum(group.gradients.nbytes for group in self.groups),
            "optimizer": sum(tensor.nbytes for tensor in [*masters, *self.exp_avg, *self.exp_avg_sq]),
        }

    def restore(self, step: int) -> None:
        """Continue after `step` updates with the tensors that `state` was filled with."""
        for count in self.counts:
            count.fill_(step)

    # --- operators ---------------------------------------------------------------------------------------------------

    def _norm_ops(self) -> list[Op]:
        return [
            *(_squares_op(group) for group in self.groups),
            _sum_op(self.groups, self.world),
            Op(name="gradients.norm", reads=("squares",), writes=("norm",), run=_root, phase=Phase.W),
        ]

    def _updates(self) -> dict[str, Op]:
        return {group.name: self._update_op(index) for index, group in enumerate(self.groups)}

    def _update_op(self, index: int) -> Op:
        """Clip, AdamW on the shard of one group, and round the masters to the compute dtype."""
        group = self.groups[index]
        arrives = group.formats.parameters is not None  # the weights are those that arrive, not copied here

        def run(gradient: Tensor, norm: float, learning_rate: float) -> Tensor:
            factor = self._factor(norm)
            # The sums are scaled in place, unlike what operators may do: this is their last reader.
            self._adamw(index, gradient if factor == 1.0 else gradient.mul_(factor), learning_rate)
            if arrives:
                return group.master
            mine = group.weights[group.shard]
            return mine if group.shares_memory else mine.copy_(group.master)

        # Weight and both moments are read and written, the gradient read; clipping reads and writes it once more.
        copied = 0 if group.shares_memory or arrives else 4 + group.weights.itemsize
        traffic = 28 + (8 if self.config.clip_norm else 0) + copied
        return Op(
            name=f"update.{group.name}", reads=(shard_of(group), "norm", "learning_rate"), writes=(updated_of(group),),
            run=run, phase=Phase.W, cost=Cost(memory_bytes=traffic * group.master.numel()),
        )  # fmt: skip

    def _factor(self, norm: float) -> float:
        clip = self.config.clip_norm
        return clip / (norm + 1e-6) if clip and norm > clip else 1.0

    def _adamw(self, index: int, gradient: Tensor, learning_rate: float) -> None:
        c, group = self.config, self.groups[index]
        adamw(
            [group.master], [gradient], [self.exp_avg[index]], [self.exp_avg_sq[index]], [], [self.counts[index]],
            fused=True, amsgrad=False, maximize=False, lr=learning_rate, beta1=c.beta1, beta2=c.beta2, eps=c.adam_eps,
            weight_decay=c.weight_decay if group.decay else 0.0,
        )  # fmt: skip


def gather_all(groups: Sequence[FlatWeights]) -> Program:
    """Fills all weights from the shards; reads `sync.updated`."""
    jobs = [gather_job(group) for group in groups]
    waiting = [group for group, job in zip(groups, jobs, strict=True) if job]
    return Program([*pipelined(jobs), *map(arrived, waiting)], updated(groups))


def _clear(gradients: Sequence[Gradient]) -> Op:
    """Zero what no operator of a step adds to: the buffers are sent from inside of it. All others are overwritten."""

    def run() -> None:
        for gradient in gradients:
            gradient.value()

    return Op(name="gradients.clear", reads=(), writes=(), run=run, phase=Phase.W)


def _squares_of(group: FlatWeights) -> str:
    return f"{group.name}.squares"


def _squares_op(group: FlatWeights) -> Op:
    """float64 [], of this rank's shard."""
    size = group.master.numel()
    return Op(
        name=f"gradients.{group.name}.squares", reads=(shard_of(group),), writes=(_squares_of(group),), run=_squares,
        phase=Phase.W, cost=Cost(2 * size, 4 * size),
    )  # fmt: skip


def _sum_op(groups: Sequence[FlatWeights], world: Axis) -> Op:
    """Squares of all groups, summed over all ranks: float64 [], the same bits on every rank."""

    def run(*squares: Tensor) -> Tensor | Pending:
        total = torch.stack(squares).sum()
        if world.size == 1:
            return total
        return all_reduce(total, world, NORM_BYTES)

    alone = world.size == 1
    return Op(
        name="gradients.sum_squares" if alone else "gradients.norm_all_reduce",
        reads=tuple(_squares_of(group) for group in groups), writes=("squares",), run=run, phase=Phase.W,
        stream=Stream.COMPUTE if alone else Stream.INTER,
        cost=Cost() if alone else Cost(wire_bytes=NORM_BYTES, axis=world.name),
    )  # fmt: skip


def _root(squares: Tensor) -> float:
    """The norm as a number of the host, where clipping is decided; a meta tensor has none."""
    return math.nan if squares.is_meta else float(squares.sqrt())


def _squares(x: Tensor, row: int = 1024) -> Tensor:
    """Sum of squares, float64, of a float32 vector: in float32 within rows, in float64 over them.

    torch's norm of the whole keeps one running float32 sum per vector lane on a CPU: 1 % too small for 16 million
    elements, and another clipping for another number of shards.
    """
    whole = len(x) // row * row
    parts = torch.linalg.vector_norm(x[:whole].view(-1, row), dim=1), torch.linalg.vector_norm(x[whole:])[None]
    return torch.cat(parts).double().square().sum()
