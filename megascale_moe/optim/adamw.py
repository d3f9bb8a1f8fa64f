"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), by torch's fused kernel."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.optim.adamw import adamw  # the function: making torch's optimizer class imports the compiler, for seconds

from megascale_moe.config import TrainConfig
from megascale_moe.engine.op import Cost
from megascale_moe.optim.rule import Rule, State, WeightShard, Whole


class AdamW(Rule):
    """Adam with decoupled weight decay; vectors (norms) do not decay."""

    name = "adamw"
    state = (State("exp_avg"), State("exp_avg_sq", signed=False))

    def update(self, shard: WeightShard, change: Tensor, rate: float, config: TrainConfig) -> None:
        """See `Rule.update`; `change` is only read."""
        adamw(
            [shard.master], [change], [shard.state["exp_avg"]], [shard.state["exp_avg_sq"]], [], [shard.count],
            fused=True, amsgrad=False, maximize=False, lr=rate, beta1=config.beta1, beta2=config.beta2,
            eps=config.adam_eps, weight_decay=config.weight_decay if shard.decay else 0.0,
        )  # fmt: skip

    def cost(self, elements: int) -> Cost:
        """Return the traffic of one pass: weight and both moments are read and written, the gradient is read."""
        return Cost(memory_bytes=28 * elements)

    def plain(self, whole: Whole, rate: float, config: TrainConfig) -> Tensor:
        """See `Rule.plain`."""
        beta1, beta2, gradient, steps = config.beta1, config.beta2, whole.gradient, whole.count + 1
        mean = beta1 * whole.state["exp_avg"] + (1 - beta1) * gradient
        square = beta2 * whole.state["exp_avg_sq"] + (1 - beta2) * gradient.square()
        mean, square = mean / (1 - beta1**steps), square / (1 - beta2**steps)
        decay = rate * config.weight_decay if whole.decay else 0.0
        return whole.weight * (1.0 - decay) - rate * mean / (square.sqrt() + config.adam_eps)

    def comparable(self, config: TrainConfig) -> TrainConfig:
        """Return a config with an epsilon of the size of one, which keeps the update smooth in the gradient.

        With a small one an element moves by the learning rate whatever the size of its gradient, and the sign of one
        that is only rounding decides where to.
        """
        return replace(config, adam_eps=1.0)


ADAMW = AdamW()
