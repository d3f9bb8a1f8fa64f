"""AdamW whose state is split over the ranks that hold the same weights.

A step is: gradients reduce-scattered in float32 over each weight's own axis, one global norm over all shards (they are
disjoint, so each element counts once whatever the layout), AdamW on the shards by torch's fused kernel, weights
all-gathered in the compute dtype.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw  # the function: making torch's optimizer class imports the compiler, for seconds

from megascale_moe.comm.axis import Axes, Axis
from megascale_moe.comm.collectives import Pending, all_gather_in_place, all_reduce_sum, reduce_scatter, tag_of
from megascale_moe.config import TrainConfig
from megascale_moe.engine.gradient import Gradient
from megascale_moe.optim.flat import FlatWeights


def flat_groups(
    shapes: Mapping[str, torch.Size], axes: Axes, dtype: torch.dtype, device: torch.device
) -> list[FlatWeights]:
    """Weights by (axis of replicas, with or without decay); vectors (norms) do not decay."""
    groups: dict[tuple[str, bool], dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        axis = "expert_data" if ".experts." in name else "data"
        groups.setdefault((axis, len(shape) > 1), {})[name] = shape
    return [FlatWeights(members, axes[axis], decay, dtype, device) for (axis, decay), members in groups.items()]


class ShardedAdamW:
    """Holds the weights' buffers and updates them.

    Attributes:
        weights: name -> weight in the compute dtype. gradients: name -> `Gradient` in float32.
    """

    def __init__(self, groups: list[FlatWeights], world: Axis, config: TrainConfig) -> None:
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
        self.wire_bytes = 0  # sent by the last step
        self.comm_s = 0.0  # seconds the last step waited for communication

    def step(self, learning_rate: float) -> float:
        """Update the weights from the summed gradients; returns the global gradient norm before clipping."""
        for gradient in self.gradients.values():
            gradient.value()  # a weight nothing flowed into counts as zero
        pending = [(group, self._reduce(group)) for group in self.groups]
        self.wire_bytes = sum(work.wire_bytes for _, work in pending if isinstance(work, Pending))
        start = time.perf_counter()
        shards = [work.wait() if isinstance(work, Pending) else work for _, work in pending]
        self.comm_s = time.perf_counter() - start
        norm = self._norm(shards)
        clip = self.config.clip_norm
        factor = clip / (norm + 1e-6) if clip and norm > clip else 1.0
        for index, shard in enumerate(shards):
            self._update(index, shard if factor == 1.0 else shard.mul_(factor), learning_rate)
        self.publish()
        for gradient in self.gradients.values():
            gradient.reset()
        return norm

    def _update(self, index: int, gradient: Tensor, learning_rate: float) -> None:
        """AdamW on this rank's shard of one group."""
        c, group = self.config, self.groups[index]
        adamw(
            [group.master], [gradient], [self.exp_avg[index]], [self.exp_avg_sq[index]], [], [self.counts[index]],
            fused=True, amsgrad=False, maximize=False, lr=learning_rate, beta1=c.beta1, beta2=c.beta2, eps=c.adam_eps,
            weight_decay=c.weight_decay if group.decay else 0.0,
        )

    def publish(self) -> None:
        """Bring every rank's weights up to date with the masters."""
        works = []
        for index, group in enumerate(self.groups):
            mine = group.weights[group.shard]
            if mine.data_ptr() != group.master.data_ptr():
                mine.copy_(group.master)
            if group.axis.size > 1:
                works.append(all_gather_in_place(group.weights, group.axis, tag_of(f"weights {index}")))
        self.wire_bytes += sum(work.wire_bytes for work in works)
        start = time.perf_counter()
        for work in works:
            work.wait()
        self.comm_s += time.perf_counter() - start

    def _reduce(self, group: FlatWeights) -> Pending | Tensor:
        if group.axis.size == 1:
            return group.gradients
        return reduce_scatter(group.gradients, group.axis, tag_of(f"gradients {self.groups.index(group)}"))

    def _norm(self, shards: list[Tensor]) -> float:
        squares = torch.stack([_squares(shard) for shard in shards]).sum()
        return float(all_reduce_sum(squares, self.world).sqrt())

    def state(self) -> dict[str, list[Tensor]]:
        """Optimizer tensors by name, one per group, shaped like its master shard; whoever resumes fills them."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def restore(self, step: int) -> None:
        """Continue after `step` updates with the tensors that `state` was filled with."""
        for count in self.counts:
            count.fill_(step)


def _squares(x: Tensor, row: int = 1024) -> Tensor:
    """Sum of squares, float64, of a float32 vector: in float32 within rows, in float64 over them.

    torch's norm of the whole keeps one running float32 sum per vector lane on a CPU: 1 % too small for 16 million
    elements, and another clipping for another number of shards.
    """
    whole = len(x) // row * row
    parts = torch.linalg.vector_norm(x[:whole].view(-1, row), dim=1), torch.linalg.vector_norm(x[whole:])[None]
    return torch.cat(parts).double().square().sum()
