"""An optimizer from outside of the package: what somebody writes who adds one, as small as it can be."""

from __future__ import annotations

from torch import Tensor

from megascale_moe.config import TrainConfig
from megascale_moe.engine.op import Cost
from megascale_moe.optim.rule import Rule, Shard, State, Whole

KEPT = 0.9
"""Of the velocity, from step to step."""


def decayed(weight: Tensor, rate: float, config: TrainConfig, *, decay: bool) -> Tensor:
    return weight * (1.0 - rate * config.weight_decay) if decay else weight


class HeavyBall(Rule):
    """Gradient descent with momentum; one number of state where AdamW has two."""

    name = "heavy_ball"
    state = (State("velocity"),)

    def update(self, shard: Shard, change: Tensor, rate: float, config: TrainConfig) -> None:
        velocity = shard.state["velocity"].mul_(KEPT).add_(change)
        shard.master.copy_(decayed(shard.master, rate, config, decay=shard.decay)).sub_(velocity, alpha=rate)

    def cost(self, elements: int) -> Cost:
        return Cost(memory_bytes=20 * elements)

    def plain(self, whole: Whole, rate: float, config: TrainConfig) -> Tensor:
        velocity = KEPT * whole.state["velocity"] + whole.gradient
        return decayed(whole.weight, rate, config, decay=whole.decay) - rate * velocity


HEAVY_BALL = HeavyBall()
