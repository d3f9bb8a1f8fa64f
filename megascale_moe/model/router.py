"""The router: which experts a token goes to and with which weight, and what keeps the experts balanced.

The functions here are the only statement of routing; the modules and the operator lists call the same ones.

Auxiliary losses are sums over tokens divided by a number the caller gives (all tokens of the global batch).
Balance is judged inside each document, as DeepSeek-V2 and V3 do: a document lies in exactly one micro-batch of one
data-parallel rank, so neither layout, nor the number of micro-batches, nor packing changes the gradient. A balance
loss over "the micro-batch" has none of these properties.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from megascale_moe.config import LayerSpec, ModelConfig
from megascale_moe.kernels.rows import count
from megascale_moe.model.weights import Kind


class Router(nn.Module):
    """Scores a token for every expert, in float32 whatever the model's dtype."""

    kinds: ClassVar = {"weight": Kind.MATRIX, "logits_bias": Kind.BIAS}
    bias: Tensor | None  # for choosing alone, and not trained by gradients
    logits_bias: Tensor | None

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden))
        self.register_parameter("logits_bias", nn.Parameter(torch.empty(config.experts)) if spec.router_bias else None)
        self.register_buffer("bias", torch.zeros(config.experts) if config.correction_bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map x [T, hidden] -> gate [T, k], choice [T, k], probabilities [T, E], logits [T, E]."""
        logits = x.float() @ self.weight.float().T
        if self.logits_bias is not None:
            logits = logits + self.logits_bias.float()
        return (*route(logits, self.bias, self.config), logits)


def route(logits: Tensor, bias: Tensor | None, c: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts.

    Args:
        logits: float32 [T, E].
        bias: added to the scores for choosing only (auxiliary-loss-free balancing), float32 [E] or None.

    Returns:
        gate float32 [T, k] (differentiable), choice int64 [T, k], probabilities float32 [T, E] that sum to one
        (for the balance loss).
    """
    scores = logits.softmax(-1) if c.score == "softmax" else logits.sigmoid()
    choice = choose(scores.detach(), bias, c)
    gate = scores.gather(1, choice)
    if c.norm_top_k:
        gate = gate / (gate.sum(-1, keepdim=True) + (1e-20 if c.score == "sigmoid" else 0.0))
    probabilities = scores if c.score == "softmax" else scores / scores.sum(-1, keepdim=True)
    return gate * c.routed_scaling, choice, probabilities


def choose(scores: Tensor, bias: Tensor | None, c: ModelConfig) -> Tensor:
    """Return the k experts of each token, int64 [T, k], best first, of its best groups where the model has groups."""
    ranked = scores if bias is None else scores + bias
    if c.expert_groups > 1:
        grouped = ranked.view(len(ranked), c.expert_groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1) if c.group_score == "top2" else grouped.amax(-1)
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(c.top_groups, dim=-1).indices, True)
        ranked = grouped.masked_fill(~chosen[..., None], -math.inf).view_as(ranked)
    return ranked.topk(c.top_k, dim=-1).indices


def balance_sum(probabilities: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
    """Sum probability x `weights` [documents, E] over tokens and experts: the balance loss before its normaliser.

    Linear in the probabilities, so ranks that hold parts of a document add their sums.
    """
    return (probabilities * weights[documents]).sum()


def balance_weights(choice: Tensor, documents: Tensor, lengths: Tensor, c: ModelConfig) -> Tensor:
    """Return how crowded each expert is within each document, float32 [documents, E]; 1 everywhere when balanced.

    Args:
        choice: int64 [T, k], the experts of *all* tokens of these documents.
        documents: int64 [T], the document of each token.
        lengths: int64 [documents], tokens per document.

    With c.balance_granularity "device" an expert counts as its device group's mean (DeepSeek-V2, section 2.2.3).
    """
    flat = documents[:, None] * c.experts + choice
    counts = count(flat.flatten(), len(lengths) * c.experts).view(len(lengths), c.experts)
    crowded = counts * (c.experts / c.top_k) / lengths[:, None].to(counts.device)
    if c.balance_granularity == "device":
        grouped = crowded.view(len(lengths), c.device_groups, -1)
        crowded = grouped.mean(-1, keepdim=True).expand_as(grouped).reshape_as(crowded)
    return crowded.float()


def z_sum(logits: Tensor) -> Tensor:
    """Sum logsumexp(logits)^2 over tokens: the z-loss before its normaliser."""
    return logits.logsumexp(-1).square().sum()


def within_capacity(choice: Tensor, gate: Tensor, rows: int, c: ModelConfig) -> Tensor:
    """Return which assignments survive device-level dropping, bool [T, k].

    In each row (sequence) a device group takes at most capacity_factor x its fair share; those with the lowest
    gate leave first, earlier tokens win ties. The unit is the row, so the layout does not change what is dropped.
    """
    T, k = choice.shape
    capacity = math.ceil(c.capacity_factor * (T // rows) * k / c.device_groups)
    row = torch.arange(rows, device=choice.device).repeat_interleave(T // rows)
    bucket = (row[:, None] * c.device_groups + choice // (c.experts // c.device_groups)).flatten()
    by_gate = gate.detach().flatten().argsort(descending=True, stable=True)
    order = by_gate[bucket[by_gate].argsort(stable=True)]
    sizes = count(bucket, rows * c.device_groups)
    position = torch.empty_like(order)
    position[order] = torch.arange(T * k, device=order.device)
    start = sizes.cumsum(0) - sizes
    return (position - start[bucket] < capacity).view(T, k)


def updated_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Take one step of auxiliary-loss-free balancing: experts above the mean load go down by `rate`, others up."""
    counts = counts.float()
    return bias + rate * torch.sign(counts.mean() - counts)
