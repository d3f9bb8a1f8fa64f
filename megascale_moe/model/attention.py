"""Attention in three stages: `heads` (projections, norms, rotary), `core`, `out`.

The cut is where parallelism happens: sequence parallelism puts an all-to-all on both sides of `core`.
Grouped-query and multi-head latent attention differ only in `heads`; both hand q, k, v to the same core.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale_moe.config import LayerSpec, ModelConfig
from megascale_moe.model.rotary import rotate, softmax_scale
from megascale_moe.model.segments import Segments
from megascale_moe.model.weights import Kind


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    kinds: ClassVar = {"weight": Kind.NORM}

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention; heads are rows of one fused projection, queries first, then keys, then values."""

    kinds: ClassVar = {"sinks": Kind.BIAS}
    sinks: Tensor | None

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        c, width = config, config.query_dim
        parts = (c.heads * width, c.kv_heads * width, c.kv_heads * c.value_dim)
        self.stacked = {"qkv.weight": parts, "qkv.bias": parts}
        self.qkv = nn.Linear(c.hidden, sum(parts), bias=spec.attention_bias)
        self.out = nn.Linear(c.heads * c.value_dim, c.hidden, bias=spec.attention_bias)
        self.register_parameter("sinks", nn.Parameter(torch.empty(c.heads)) if spec.sinks else None)
        if spec.qk_norm != "none":
            per_head = spec.qk_norm == "head"
            self.q_norm = RMSNorm(width if per_head else c.heads * width, c.norm_eps)
            self.k_norm = RMSNorm(width if per_head else c.kv_heads * width, c.norm_eps)

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> q [T, heads, width], k [T, kv heads, width], v [T, kv heads, value width]."""
        c, T = self.config, x.shape[0]
        q, k, v = self.qkv(x).split(self.stacked["qkv.weight"], dim=-1)
        if self.spec.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(T, c.heads, -1), k.view(T, c.kv_heads, -1), v.view(T, c.kv_heads, -1)
        if self.spec.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rope, c.rope_interleaved), rotate(k, *rope, c.rope_interleaved), v

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        heads = core(*self.heads(x, rope), segments, self.config, self.spec, self.sinks)
        return self.out(heads)  # type: ignore[no-any-return]


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values come from a low-rank latent."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        c = config
        if c.q_lora_rank:
            self.q_down = nn.Linear(c.hidden, c.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(c.q_lora_rank, 1e-6)
        self.stacked = {"kv_down.weight": (c.kv_lora_rank, c.qk_rope_head_dim)}
        self.q_up = nn.Linear(c.q_lora_rank or c.hidden, c.heads * c.query_dim, bias=False)
        self.kv_down = nn.Linear(c.hidden, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_up = nn.Linear(c.kv_lora_rank, c.heads * (c.qk_nope_head_dim + c.value_dim), bias=False)
        self.out = nn.Linear(c.heads * c.value_dim, c.hidden, bias=False)

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, hidden] -> q, k [T, heads, nope + rope width], v [T, heads, value width]."""
        c = self.config
        q = self.q_up(self.q_norm(self.q_down(x)) if c.q_lora_rank else x)
        latent, k_rope = self.kv_down(x).split(self.stacked["kv_down.weight"], dim=-1)
        return latent_heads(q, self.kv_up(self.kv_norm(latent)), k_rope, rope, c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        return self.out(core(*self.heads(x, rope), segments, self.config, self.spec))  # type: ignore[no-any-return]


def latent_heads(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: tuple[Tensor, Tensor], c: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Assemble MLA's heads: q [T, H * qk], kv [T, H * (nope + v)], one rotary key [T, rope] shared by all heads."""
    T = q.shape[0]
    q_nope, q_rope = torch.split(q.view(T, c.heads, -1), [c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
    k_nope, v = torch.split(kv.view(T, c.heads, -1), [c.qk_nope_head_dim, c.value_dim], dim=-1)
    q_rope = rotate(q_rope, *rope, c.rope_interleaved)
    k_shared = rotate(k_rope[:, None], *rope, c.rope_interleaved).expand(-1, c.heads, -1)
    return torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, k_shared), dim=-1), v.contiguous()


def core(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, config: ModelConfig, spec: LayerSpec,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention inside each document: q [T, H, w], k [T, G, w], v [T, G, u] -> [T, H * u], H a multiple of G.

    Args:
        sinks: a logit per head, [H], that takes its share of every softmax and adds nothing to the result.
    """
    q, k, v = (x.view(segments.rows, segments.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    mask, scale = visible(segments, spec.window).to(q.device), softmax_scale(config)
    if sinks is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, -math.inf)
        with_sinks = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
        out = with_sinks.softmax(-1)[..., :-1] @ v
    return out.transpose(1, 2).reshape(segments.rows * segments.length, -1)


def visible(segments: Segments, window: int) -> Tensor:
    """Which key (last axis) a query may see: bool [rows, 1, length, length]."""
    documents = segments.documents().view(segments.rows, 1, -1)
    index = torch.arange(segments.length)
    distance = index[:, None] - index
    allowed = (distance >= 0) & (distance < (window or segments.length))
    return (documents.transpose(1, 2) == documents)[:, None] & allowed
