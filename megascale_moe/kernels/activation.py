"""SwiGLU with the gating weight inside: silu(a) * b * gate, where x = [a, b] is one fused projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale_moe.kernels.blocks import row_blocks


def swiglu(x: Tensor, gate: Tensor | None = None) -> Tensor:
    """x [R, 2F], gate float32 [R] or None -> [R, F] of x's dtype."""
    width = x.shape[1] // 2
    out = x.new_empty(x.shape[0], width)
    for rows in row_blocks(x):
        a, b = x[rows, :width].float(), x[rows, width:].float()
        y = F.silu(a).mul_(b)
        out[rows] = y if gate is None else y.mul_(gate[rows, None])
    return out


def swiglu_backward(gradient: Tensor, x: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Gradients of `swiglu`: (of x [R, 2F], of gate float32 [R] or None)."""
    width = x.shape[1] // 2
    out = torch.empty_like(x)
    gate_gradient = None if gate is None else torch.empty_like(gate)
    for rows in row_blocks(x):
        a, b, g = x[rows, :width].float(), x[rows, width:].float(), gradient[rows].float()
        sigmoid = a.sigmoid()
        silu = a * sigmoid
        if gate is not None and gate_gradient is not None:
            gate_gradient[rows] = torch.linalg.vecdot(silu * b, g)
            g = g * gate[rows, None]
        out[rows, width:] = silu * g
        # d silu / d a = sigmoid * (1 + a * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        out[rows, :width] = slope.mul_(b).mul_(g)
    return out, gate_gradient
