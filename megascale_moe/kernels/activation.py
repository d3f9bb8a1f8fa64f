"""SwiGLU with the gating weight inside: silu(a) * b * gate, where x = [a, b] is one fused projection.

The clamped form of GPT-OSS is a * sigmoid(alpha * a) * (b + 1) * gate with a <= limit and -limit <= b <= limit; what is
cut off has no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale_moe.kernels.blocks import Rowwise

Clamp = tuple[float, float] | None
"""alpha and limit of the clamped form; None: the plain one."""


def _forward(x: Tensor, gate: Tensor | None, clamp: Clamp) -> tuple[Tensor]:
    a, b = x.float().chunk(2, dim=-1)
    if clamp is None:
        y = F.silu(a) * b
    else:
        alpha, limit = clamp
        a = a.clamp(max=limit)
        y = a * (alpha * a).sigmoid() * (b.clamp(-limit, limit) + 1)
    return ((y if gate is None else y * gate[:, None]).to(x.dtype),)


def _backward(gradient: Tensor, x: Tensor, gate: Tensor | None, clamp: Clamp) -> tuple[Tensor, ...]:
    a, b = x.float().chunk(2, dim=-1)
    g = gradient.float()
    if clamp is None:
        alpha, sigmoid = 1.0, a.sigmoid()
    else:
        alpha, limit = clamp
        a_inside, b_inside = a <= limit, b.abs() <= limit
        a, b = a.clamp(max=limit), b.clamp(-limit, limit) + 1
        sigmoid = (alpha * a).sigmoid()
    glu = a * sigmoid
    up = glu * g
    # d a sigmoid(alpha a) / d a = sigmoid + alpha * a * sigmoid * (1 - sigmoid)
    down = torch.addcmul(sigmoid, glu, 1 - sigmoid, value=alpha) * b * g
    dgate = () if gate is None else ((up * b).sum(-1),)
    if clamp is not None:
        down, up = down * a_inside, up * b_inside
    if gate is not None:
        down, up = down * gate[:, None], up * gate[:, None]
    return torch.cat((down, up), dim=-1).to(x.dtype), *dgate


_run_forward = Rowwise(_forward, shared=1)
_run_backward = Rowwise(_backward, shared=1)


def swiglu(x: Tensor, gate: Tensor | None = None, clamp: Clamp = None) -> Tensor:
    """Compute x [R, 2F], gate float32 [R] or None -> [R, F] of x's dtype."""
    return _run_forward(x, gate, clamp)[0]


def swiglu_backward(
    gradient: Tensor, x: Tensor, gate: Tensor | None = None, clamp: Clamp = None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `swiglu`: (of x [R, 2F], of gate float32 [R] or None)."""
    dx, *dgate = _run_backward(gradient, x, gate, clamp)
    return dx, dgate[0] if dgate else None
