"""Attention in three stages: `heads` (projections, norms, rotary), `core`, `out`.

The cut is where parallelism happens: sequence parallelism puts an all-to-all on both sides of `core`.
Grouped-query and multi-head latent attention differ only in `heads`; both hand q, k, v to the same core.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from megascale_moe.config import LayerSpec, ModelConfig
from megascale_moe.kernels.reference import masked_attention
from megascale_moe.kernels.rotary import rotate
from megascale_moe.model.rotary import softmax_scale
from megascale_moe.model.segments import Segments
from megascale_moe.model.weights import Kind


class Attention(nn.Module):
    """Attention whatever the form of its heads."""

    kinds: ClassVar = {"sinks": Kind.BIAS}
    sinks: Tensor | None
    out: nn.Linear

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.register_parameter("sinks", nn.Parameter(torch.empty(config.heads)) if spec.sinks else None)

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Map x [T, hidden] to q [T, heads, width], k [T, key heads, width], v [T, key heads, value width]."""
        raise NotImplementedError

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """Map x [T, hidden] -> [T, hidden]."""
        heads = core(*self.heads(x, rope), segments, self.config, self.spec, self.sinks)
        return self.out(heads)  # type: ignore[no-any-return]


class GroupedQueryAttention(Attention):
    """Grouped-query attention; heads are rows of one fused projection, queries first, then keys, then values."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        c, width = config, config.query_dim
        parts = (c.heads * width, c.kv_heads * width, c.kv_heads * c.value_dim)
        self.stacked = {"qkv.weight": parts, "qkv.bias": parts}
        self.qkv = nn.Linear(c.hidden, sum(parts), bias=spec.attention_bias)
        self.out = nn.Linear(c.heads * c.value_dim, c.hidden, bias=spec.attention_bias)
        if spec.qk_norm != "none":
            per_head = spec.qk_norm == "head"
            self.q_norm = nn.RMSNorm(width if per_head else c.heads * width, c.norm_eps)
            self.k_norm = nn.RMSNorm(width if per_head else c.kv_heads * width, c.norm_eps)

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        c, T = self.config, x.shape[0]
        q, k, v = self.qkv(x).split(self.stacked["qkv.weight"], dim=-1)
        if self.spec.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(T, c.heads, -1), k.view(T, c.kv_heads, -1), v.view(T, c.kv_heads, -1)
        if self.spec.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rope, c.rope_interleaved), rotate(k, *rope, c.rope_interleaved), v


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values come from a low-rank latent."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        c = config
        if c.q_lora_rank:
            self.q_down = nn.Linear(c.hidden, c.q_lora_rank, bias=False)
            self.q_norm = nn.RMSNorm(c.q_lora_rank, 1e-6)
        self.stacked = {"kv_down.weight": (c.kv_lora_rank, c.qk_rope_head_dim)}
        self.q_up = nn.Linear(c.q_lora_rank or c.hidden, c.heads * c.query_dim, bias=False)
        self.kv_down = nn.Linear(c.hidden, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_up = nn.Linear(c.kv_lora_rank, c.heads * (c.qk_nope_head_dim + c.value_dim), bias=False)
        self.out = nn.Linear(c.heads * c.value_dim, c.hidden, bias=False)

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        q = self.q_up(self.q_norm(self.q_down(x)) if c.q_lora_rank else x)
        latent, k_rope = self.kv_down(x).split(self.stacked["kv_down.weight"], dim=-1)
        return latent_heads(q, self.kv_up(self.kv_norm(latent)), k_rope, rope, c)


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
    """Compute causal attention inside each document: q [T, H, w], k [T, G, w], v [T, G, u] -> [T, H * u].

    Args:
        sinks: a logit per head, [H], that takes its share of every softmax and adds nothing to the result.
    """
    q, k, v = (x.view(segments.rows, segments.length, *x.shape[1:]) for x in (q, k, v))
    mask = visible(segments, spec.window).to(q.device)
    return masked_attention(q, k, v, mask, softmax_scale(config), sinks).flatten(0, 1).flatten(1)


def visible(segments: Segments, window: int) -> Tensor:
    """Return which key (last axis) a query may see: bool [rows, length, length]."""
    documents = segments.documents().view(segments.rows, 1, -1)
    index = torch.arange(segments.length)
    distance = index[:, None] - index
    allowed = (distance >= 0) & (distance < (window or segments.length))
    return (documents.transpose(1, 2) == documents) & allowed
