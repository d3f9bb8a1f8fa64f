"""Learning rate as a pure function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from megascale_moe.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of the `step`-th update (first is 1): linear warm-up, then cosine, warm-up-stable-decay or constant."""
    c = config
    if step <= c.warmup:
        return c.learning_rate * step / c.warmup
    if c.lr_schedule == "constant":
        return c.learning_rate
    before = step - 1  # the first update after warm-up has the full rate, the last a little
    if c.lr_schedule == "cosine":
        done = (before - c.warmup) / max(c.steps - c.warmup, 1)
        share = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    else:
        decay = c.decay or max(c.steps // 5, 1)
        share = min(1.0, max(0.0, (c.steps - before) / decay))
    return c.min_learning_rate + (c.learning_rate - c.min_learning_rate) * share
