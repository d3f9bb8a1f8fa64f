"""RMSNorm with explicit backward; the gradient of a skip connection is added in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from megascale_moe.kernels.blocks import row_blocks


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, D] -> (x / rms * weight [T, D], 1 / rms float32 [T, 1])."""
    out = torch.empty_like(x)
    scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    w = weight.float()
    for rows in row_blocks(x):
        part = x[rows].float()
        s = torch.linalg.vector_norm(part, dim=-1, keepdim=True).square_().div_(x.shape[1]).add_(eps).rsqrt_()
        scale[rows] = s
        out[rows] = torch.mul(part, s).mul_(w)
    return out, scale


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm`: (of x, with `skip` added, [T, D]; of weight, float32 [D])."""
    out = torch.empty_like(x)
    width = x.shape[1]
    w = weight.float()
    weight_gradient = torch.zeros(width, dtype=torch.float32, device=x.device)
    for rows in row_blocks(x):
        normed = torch.mul(x[rows].float(), scale[rows])
        g = gradient[rows].float()
        product = g * normed
        weight_gradient += product.sum(0)
        mean = (product @ w).div_(width)[:, None]
        dx = torch.mul(g, w).sub_(normed.mul_(mean)).mul_(scale[rows])
        if skip is not None:
            dx += skip[rows]
        out[rows] = dx
    return out, weight_gradient
