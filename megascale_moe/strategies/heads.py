"""Heads: which a rank attends with, and how they come out of the fused projection where the model norms them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.model.rotary import rotate


def heads_of_rank(rank: int, size: int, c: ModelConfig) -> tuple[range, Sequence[int]]:
    """Query heads and key heads a rank attends with.

    Where ranks outnumber key heads several ranks get the same one. Where the shares do not align with the groups of
    query heads, each query head brings its own copy.
    """
    mine = range(rank * c.heads // size, (rank + 1) * c.heads // size)
    per_key = c.heads // c.key_heads
    if len(mine) % per_key == 0 or per_key % len(mine) == 0:
        return mine, range(mine[0] // per_key, mine[-1] // per_key + 1)
    return mine, [head // per_key for head in mine]


def head_norm(
    qkv: Tensor, rope: tuple[Tensor, Tensor], wq: Tensor, wk: Tensor, c: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Projection qkv [T, ...] to normed and rotated q [T, H, w] and k [T, G, w], and v [T, G, u]."""
    q, k, v = qkv.split([c.heads * c.query_dim, c.kv_heads * c.query_dim, c.kv_heads * c.value_dim], dim=-1)
    q, k, v = q.unflatten(1, (c.heads, -1)), k.unflatten(1, (c.kv_heads, -1)), v.unflatten(1, (c.kv_heads, -1))
    q, k = _normed(q, wq, c), _normed(k, wk, c)
    return rotate(q, *rope, c.rope_interleaved), rotate(k, *rope, c.rope_interleaved), v


def _normed(x: Tensor, weight: Tensor, c: ModelConfig) -> Tensor:
    """RMSNorm over each head, or over all heads at once where the weight spans them."""
    flat = x if c.qk_norm == "head" else x.flatten(1)
    return F.rms_norm(flat, (flat.shape[-1],), weight, c.norm_eps).view(x.shape)
