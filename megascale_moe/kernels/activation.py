"""SwiGLU with the gating weight inside: silu(a) * b * gate, where x = [a, b] is one fused projection.

The clamped form of GPT-OSS is a * sigmoid(alpha * a) * (b + 1) * gate with a <= limit and -limit <= b <= limit; what is
cut off has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale_moe.config import LayerSpec
from megascale_moe.kernels.blocks import Rowwise


def _forward(x: Tensor, gate: Tensor | None) -> tuple[Tensor]:
    a, b = x.float().chunk(2, dim=-1)
    y = F.silu(a) * b
    return ((y if gate is None else y * gate[:, None]).to(x.dtype),)


def _backward(gradient: Tensor, x: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
    a, b = x.float().chunk(2, dim=-1)
    g = gradient.float()
    sigmoid = a.sigmoid()
    silu = a * sigmoid
    up = silu * g
    # d silu / d a = sigmoid * (1 + a * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
    down = torch.addcmul(sigmoid, silu, 1 - sigmoid) * b * g
    if gate is None:
        return (torch.cat((down, up), dim=-1).to(x.dtype),)
    weight = gate[:, None]
    return torch.cat((down * weight, up * weight), dim=-1).to(x.dtype), (up * b).sum(-1)


def _clamped_forward(x: Tensor, gate: Tensor | None, alpha: float, limit: float) -> tuple[Tensor]:
    a, b = x.float().chunk(2, dim=-1)
    a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    y = a * (alpha * a).sigmoid() * (b + 1)
    return ((y if gate is None else y * gate[:, None]).to(x.dtype),)


def _clamped_backward(
    gradient: Tensor, x: Tensor, gate: Tensor | None, alpha: float, limit: float
) -> tuple[Tensor, ...]:
    free_a, free_b = x.float().chunk(2, dim=-1)
    a, b = free_a.clamp(max=limit), free_b.clamp(-limit, limit)
    g = gradient.float()
    sigmoid = (alpha * a).sigmoid()
    glu = a * sigmoid
    # d a sigmoid(alpha a) / d a = sigmoid + alpha * a * sigmoid * (1 - sigmoid)
    down = (sigmoid + alpha * glu * (1 - sigmoid)) * (b + 1) * g * (free_a <= limit)
    up = glu * g * (free_b.abs() <= limit)
    if gate is None:
        return (torch.cat((down, up), dim=-1).to(x.dtype),)
    weight = gate[:, None]
    return torch.cat((down * weight, up * weight), dim=-1).to(x.dtype), (glu * (b + 1) * g).sum(-1)


_run_clamped_forward = Rowwise(_clamped_forward, shared=2)
_run_clamped_backward = Rowwise(_clamped_backward, shared=2)
_run_forward = Rowwise(_forward)
_run_backward = Rowwise(_backward)


@dataclass(frozen=True)
class Activation:
    """What stands between the two products of an FFN.

    Attributes:
        forward: from x [R, 2F] and gate float32 [R] or None to [R, F] of x's dtype.
        backward: from the result's gradient, x and gate to the gradients of x and of gate (None without one).
    """

    forward: Callable[[Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def activation_of(spec: LayerSpec) -> Activation:
    """Return the activation of a layer."""
    if spec.activation == "swiglu":
        return Activation(swiglu, swiglu_backward)
    alpha, limit = spec.swiglu_alpha, spec.swiglu_limit
    return Activation(
        lambda x, gate: clamped_swiglu(x, gate, alpha, limit),
        lambda gradient, x, gate: clamped_swiglu_backward(gradient, x, gate, alpha, limit),
    )


def swiglu(x: Tensor, gate: Tensor | None = None) -> Tensor:
    """x [R, 2F], gate float32 [R] or None -> [R, F] of x's dtype."""
    return _run_forward(x, gate)[0]


def swiglu_backward(gradient: Tensor, x: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Gradients of `swiglu`: (of x [R, 2F], of gate float32 [R] or None)."""
    dx, *dgate = _run_backward(gradient, x, gate)
    return dx, dgate[0] if dgate else None


def clamped_swiglu(x: Tensor, gate: Tensor | None, alpha: float, limit: float) -> Tensor:
    """x [R, 2F], gate float32 [R] or None -> [R, F] of x's dtype."""
    return _run_clamped_forward(x, gate, alpha, limit)[0]


def clamped_swiglu_backward(
    gradient: Tensor, x: Tensor, gate: Tensor | None, alpha: float, limit: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `clamped_swiglu`: (of x [R, 2F], of gate float32 [R] or None)."""
    dx, *dgate = _run_clamped_backward(gradient, x, gate, alpha, limit)
    return dx, dgate[0] if dgate else None
