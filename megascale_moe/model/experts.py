"""Feed-forward parts: the SwiGLU experts, written as the plainest possible loop, and the MoE layer around them.

This is the semantics that the grouped, distributed forms are compared with; it is not meant to be fast.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from megascale_moe.config import LayerSpec, ModelConfig
from megascale_moe.kernels.activation import Clamp
from megascale_moe.kernels.reference import swiglu
from megascale_moe.model.router import Router, balance_sum, balance_weights, within_capacity, z_sum
from megascale_moe.model.segments import Segments
from megascale_moe.model.weights import Kind


class DenseFFN(nn.Module):
    """A SwiGLU every token passes: the FFN of dense layers, and the shared experts (which may have a sigmoid gate)."""

    def __init__(self, hidden: int, width: int, gated: bool, clamp: Clamp = None) -> None:
        super().__init__()
        self.stacked, self.clamp = {"w13.weight": (width, width)}, clamp
        self.w13 = nn.Linear(hidden, 2 * width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(hidden, 1, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [T, hidden] -> [T, hidden]."""
        out: Tensor = self.w2(swiglu(self.w13(x), None, self.clamp))
        return out if self.gate is None else out * self.gate(x).sigmoid()


class Experts(nn.Module):
    """E SwiGLU experts: w13 [E, 2 * ffn_hidden, hidden] (gate rows first, then up rows), w2 [E, hidden, ffn_hidden];
    with biases b13 [E, 2 * ffn_hidden] and b2 [E, hidden].
    """

    kinds: ClassVar = {"w13": Kind.MATRIX, "w2": Kind.MATRIX, "b13": Kind.BIAS, "b2": Kind.BIAS}
    by_expert = True
    b13: Tensor | None
    b2: Tensor | None

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        c, self.clamp = config, spec.clamp
        self.stacked = {"w13": (c.ffn_hidden, c.ffn_hidden), "b13": (c.ffn_hidden, c.ffn_hidden)}
        self.w13 = nn.Parameter(torch.empty(c.experts, 2 * c.ffn_hidden, c.hidden))
        self.w2 = nn.Parameter(torch.empty(c.experts, c.hidden, c.ffn_hidden))
        for name, width in (("b13", 2 * c.ffn_hidden), ("b2", c.hidden)):
            bias = nn.Parameter(torch.empty(c.experts, width)) if spec.expert_bias else None
            self.register_parameter(name, bias)

    def forward(self, x: Tensor, choice: Tensor, gate: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the weighted sum of each token's experts: x [T, hidden], choice and gate [T, k], kept bool [T, k]."""
        out = torch.zeros_like(x)
        for e in range(len(self.w13)):
            hit = choice == e if kept is None else (choice == e) & kept
            token, slot = hit.nonzero(as_tuple=True)
            # The gating weight goes in before FC2: linear, so equal, and FC2's output need not be kept.
            weight = gate[token, slot, None].to(x.dtype)
            up = x[token] @ self.w13[e].T
            if self.b13 is not None:
                up = up + self.b13[e]
            down = (swiglu(up, None, self.clamp) * weight) @ self.w2[e].T
            if self.b2 is not None:
                down = down + weight * self.b2[e]
            out = out.index_add(0, token, down)
        return out


class MoE(nn.Module):
    """Router, routed experts and shared experts."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, spec)
        self.experts = Experts(config, spec)
        shared = config.shared_hidden
        self.shared = DenseFFN(config.hidden, shared, config.shared_gate, spec.clamp) if shared else None

    def forward(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Map x [T, hidden] -> ([T, hidden], auxiliary loss summed over tokens, a scalar)."""
        c = self.config
        gate, choice, probabilities, logits = self.router(x)
        kept = within_capacity(choice, gate, segments.rows, c) if c.capacity_factor else None
        out = self.experts(x, choice, gate, kept)
        if self.shared is not None:
            out = out + self.shared(x)
        documents = segments.documents().to(x.device)
        weights = balance_weights(choice, documents, segments.lengths, c)
        auxiliary = c.balance_loss * balance_sum(probabilities, documents, weights) + c.z_loss * z_sum(logits)
        return out, auxiliary
