"""Learning rate as a pure function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from megascale_moe.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of update `step`, counted from 1: linear warm-up, then cosine, stable-decay or constant."""
    most, least, warmup = config.learning_rate, config.min_learning_rate, config.warmup
    if step <= warmup:
        return most * step / warmup
    if config.lr_schedule == "constant":
        return most
    before = step - 1  # the first update after warm-up has the full rate, the last a little
    if config.lr_schedule == "cosine":
        done = (before - warmup) / max(config.steps - warmup, 1)
        share = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    else:
        decay = config.decay or max(config.steps // 5, 1)
        share = min(1.0, max(0.0, (config.steps - before) / decay))
    return least + (most - least) * share
