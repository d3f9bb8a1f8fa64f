"""The decoder: embedding, blocks, norm, head. `Block.forward` is the reference semantics of a layer.

Parameters are initialised from (seed, parameter name, expert index) alone, so any rank can create its own part of
any layout and two layouts start from identical weights without sending them.
"""

from __future__ import annotations

import hashlib
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale_moe.config import LayerSpec, ModelConfig
from megascale_moe.model.attention import GroupedQueryAttention, LatentAttention
from megascale_moe.model.experts import DenseFFN, MoE
from megascale_moe.model.rotary import rotary_table
from megascale_moe.model.segments import Segments
from megascale_moe.model.weights import Kind, Weight, weights_of


class Block(nn.Module):
    """One layer: attention and FFN, each behind a norm and a residual connection."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        c = config
        self.attention_norm = nn.RMSNorm(c.hidden, c.norm_eps)
        self.attention = LatentAttention(c, spec) if spec.attention == "mla" else GroupedQueryAttention(c, spec)
        self.ffn_norm = nn.RMSNorm(c.hidden, c.norm_eps)
        self.ffn = DenseFFN(c.hidden, c.dense_ffn_hidden, False, spec.clamp) if spec.dense else MoE(c, spec)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], segments: Segments) -> tuple[Tensor, Tensor]:
        """Map hidden [T, hidden] -> (hidden, auxiliary loss summed over tokens)."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rope, segments)
        x = self.ffn_norm(hidden)
        if isinstance(self.ffn, DenseFFN):
            return hidden + self.ffn(x), hidden.new_zeros((), dtype=torch.float32)
        out, auxiliary = self.ffn(x, segments)
        return hidden + out, auxiliary


class Transformer(nn.Module):
    """A decoder-only language model."""

    kinds: ClassVar = {"head.weight": Kind.HEAD}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.config = config
        # No constructor: it draws values that `initialise` replaces, which on the meta device imports torch's compiler.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(c.vocab, c.hidden), freeze=False)
        self.layers = nn.ModuleList(Block(c, spec) for spec in c.layer_specs)
        self.norm = nn.RMSNorm(c.hidden, c.norm_eps)
        self.head = None if c.tied_embeddings else nn.Linear(c.hidden, c.vocab, bias=False)

    def hidden(self, tokens: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Map tokens int64 [T] -> (last hidden state after the norm [T, hidden], auxiliary loss summed over tokens)."""
        rope = rotary_table(self.config, segments.positions().to(tokens.device))
        x = self.embedding(tokens)
        auxiliary = x.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            x, more = layer(x, rope, segments)
            auxiliary = auxiliary + more
        return self.norm(x), auxiliary

    def forward(self, tokens: Tensor, segments: Segments | None = None) -> Tensor:
        """Map tokens int64 [rows, length] -> logits [rows, length, vocab]."""
        segments = segments or Segments.whole_rows(*tokens.shape)
        x, _ = self.hidden(tokens.flatten(), segments)
        return self.logits(x).view(*tokens.shape, -1)

    def logits(self, x: Tensor) -> Tensor:
        """Map x [T, hidden] -> [T, vocab]."""
        return F.linear(x, self.embedding.weight if self.head is None else self.head.weight)

    def losses(self, tokens: Tensor, targets: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
        """Return sums over tokens of (cross-entropy, auxiliary losses); targets of -100 do not count."""
        segments = segments or Segments.whole_rows(*tokens.shape)
        x, auxiliary = self.hidden(tokens.flatten(), segments)
        loss = F.cross_entropy(self.logits(x).float(), targets.flatten(), ignore_index=-100, reduction="sum")
        return loss, auxiliary


def initialise(
    name: str, parameter: Tensor, weight: Weight, config: ModelConfig, seed: int, first_expert: int = 0
) -> None:
    """Fill one parameter in place from (seed, name); stacked experts row by row from their global index.

    Norms start at one, biases at zero; matrices at normal(0, init_std), those that write into the residual stream
    scaled down by sqrt(2 * layers) as in GPT-2.

    Args:
        parameter: the whole weight, or some experts of it from `first_expert` on. weight: what it is.
    """
    if weight.kind in (Kind.NORM, Kind.BIAS):
        parameter.fill_(1.0 if weight.kind is Kind.NORM else 0.0)
        return
    writes_residual = name.endswith(("attention.out.weight", ".w2", ".w2.weight"))
    std = config.init_std / (math.sqrt(2 * config.layers) if writes_residual else 1.0)
    for index, matrix in enumerate(parameter.unbind() if weight.by_expert else (parameter,)):
        key = f"{seed}/{name}/{first_expert + index if weight.by_expert else ''}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        matrix.copy_(torch.empty(matrix.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """Return a model with its initial weights, float32, on the CPU."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    weights = weights_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initialise(name, parameter, weights[name], config, seed)
        for buffer in model.buffers():
            buffer.zero_()
    return model
