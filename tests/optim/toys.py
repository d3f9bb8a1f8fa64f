"""Optimizers from outside of the package: what somebody writes who adds one, as small as it can be."""

from __future__ import annotations

import torch
from torch import Tensor

from megascale_moe.config import TrainConfig
from megascale_moe.engine.op import Cost, Work
from megascale_moe.optim.rule import MatrixRule, Rule, State, WeightShard, Whole

KEPT = 0.9
"""Of the velocity, from step to step."""


def decayed(weight: Tensor, rate: float, config: TrainConfig, *, decay: bool) -> Tensor:
    return weight * (1.0 - rate * config.weight_decay) if decay else weight


class HeavyBall(Rule):
    """Gradient descent with momentum; one number of state where AdamW has two."""

    name = "heavy_ball"
    state = (State("velocity"),)

    def update(self, shard: WeightShard, change: Tensor, rate: float, config: TrainConfig) -> None:
        velocity = shard.state["velocity"].mul_(KEPT).add_(change)
        shard.master.copy_(decayed(shard.master, rate, config, decay=shard.decay)).sub_(velocity, alpha=rate)

    def cost(self, elements: int) -> Cost:
        return Cost(memory_bytes=20 * elements)

    def plain(self, whole: Whole, rate: float, config: TrainConfig) -> Tensor:
        velocity = KEPT * whole.state["velocity"] + whole.gradient
        return decayed(whole.weight, rate, config, decay=whole.decay) - rate * velocity


def cubed(matrices: Tensor) -> Tensor:
    """X X^T X of matrices [..., rows, columns] divided by their norms: nothing of a wrong matrix cancels."""
    x = matrices / matrices.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-20)
    return x @ x.mT @ x


class Cubed(MatrixRule):
    """The velocity of every whole matrix, cubed; heavy ball for the rest."""

    name = "cubed"
    state = (State("speed"),)

    def of(self, matrices: tuple[int, ...]) -> Rule:
        return self if matrices else HEAVY_BALL

    def prepare(self, shard: WeightShard, gradient: Tensor, config: TrainConfig) -> Tensor:
        return gradient.copy_(shard.state["speed"].mul_(KEPT).add_(gradient))

    def transform(self, matrices: Tensor, config: TrainConfig) -> Tensor:
        return cubed(matrices)

    def update(self, shard: WeightShard, change: Tensor, rate: float, config: TrainConfig) -> None:
        shard.master.copy_(decayed(shard.master, rate, config, decay=shard.decay)).sub_(change, alpha=rate)

    def dtype(self, device: torch.device, config: TrainConfig) -> torch.dtype:
        return torch.float32

    def prepare_cost(self, elements: int) -> Cost:
        return Cost(memory_bytes=24 * elements)

    def transform_cost(self, rows: int, columns: int) -> Cost:
        return Cost(4.0 * rows * rows * columns, 16.0 * rows * columns, work=Work.PRODUCT, size=float(rows))

    def cost(self, elements: int) -> Cost:
        return Cost(memory_bytes=12 * elements)

    def plain(self, whole: Whole, rate: float, config: TrainConfig) -> Tensor:
        speed = KEPT * whole.state["speed"] + whole.gradient
        change = torch.cat([cubed(part) for part in speed.split(list(whole.matrices), dim=-2)], dim=-2)
        return decayed(whole.weight, rate, config, decay=whole.decay) - rate * change


HEAVY_BALL, CUBED = HeavyBall(), Cubed()
