"""Rotary position embedding, with YaRN for stretched contexts.

Angles are computed in float64 and rounded once: positions of 100,000 lose digits in float32. The table
is an input of the model's lists, computed per micro-batch from document positions, not a module's cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megascale_moe.config import ModelConfig


def frequencies(config: ModelConfig) -> Tensor:
    """Return the angle per position of each pair, float64 [rotary width / 2]."""
    width = config.qk_rope_head_dim if config.attention == "mla" else config.query_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    plain = config.rope_theta**-exponents
    if config.rope_factor <= 1:
        return plain
    # The pairs that make 32 full turns and one within the original context.
    turns = (math.log(config.rope_original_length / (count * 2 * math.pi)) for count in (32.0, 1.0))
    low, high = (width * turn / (2 * math.log(config.rope_theta)) for turn in turns)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain / config.rope_factor * ramp + plain * (1 - ramp)


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Return the factor on the attention scores: 1 / sqrt(width), corrected for YaRN as in DeepSeek."""
    return 1 / math.sqrt(config.query_dim) * _mscale(config.rope_factor, config.rope_mscale_all_dim) ** 2


def rotary_table(config: ModelConfig, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [T, rotary width / 2] each, for int64 positions [T]."""
    angles = positions.to(torch.float64)[:, None] * frequencies(config).to(positions.device)
    scale = 1.0 if config.rope_mscale_all_dim else _mscale(config.rope_factor, 1.0)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
