"""A Mixtral-style decoder in plain PyTorch with a loop over its experts: what anybody would write first.

Module names follow the Mixtral checkpoint, so its weights load without renaming.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case import Case


def rotary_table(case: Case) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (sequence, head size)."""
    frequencies = case.rope_theta ** (-torch.arange(0, case.head_size, 2) / case.head_size)
    angles = torch.outer(torch.arange(case.sequence), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, the two halves of a head paired."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.head_size = case.head_size
        kv_width = case.kv_heads * case.head_size
        self.q_proj = nn.Linear(case.hidden, case.hidden, bias=False)
        self.k_proj = nn.Linear(case.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(case.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(case.hidden, case.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (t.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for t in projections)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    """SwiGLU."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.w1 = nn.Linear(case.hidden, case.expert_width, bias=False)
        self.w2 = nn.Linear(case.expert_width, case.hidden, bias=False)
        self.w3 = nn.Linear(case.hidden, case.expert_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """Top-k routing, then one expert after the other over the tokens that chose it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.top_k = case.top_k
        self.gate = nn.Linear(case.hidden, case.experts, bias=False)
        self.experts = nn.ModuleList(Expert(case) for _ in range(case.experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens).float().softmax(dim=-1).topk(self.top_k)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            out.index_add_(0, token, (expert(tokens[token]) * weights[token, slot, None]).to(x.dtype))
        return out.view_as(x)


class Block(nn.Module):
    """Attention and experts, each behind a norm and beside a residual."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(case.hidden, eps=case.norm_eps)
        self.self_attn = Attention(case)
        self.post_attention_layernorm = nn.RMSNorm(case.hidden, eps=case.norm_eps)
        self.block_sparse_moe = Experts(case)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(case.vocabulary, case.hidden)
        self.layers = nn.ModuleList(Block(case) for _ in range(case.layers))
        self.norm = nn.RMSNorm(case.hidden, eps=case.norm_eps)
        self.cos, self.sin = rotary_table(case)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.norm(x)


class Decoder(nn.Module):
    """Tokens to logits."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model = Trunk(case)
        self.lm_head = nn.Linear(case.hidden, case.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens))
