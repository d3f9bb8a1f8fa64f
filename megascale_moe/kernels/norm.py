"""RMSNorm with explicit backward; the gradient of a skip connection is added in the same pass.

The weight is cloned first: it is a view into a buffer of many, and torch.compile would compile again for each offset.
"""

from __future__ import annotations

from torch import Tensor

from megascale_moe.kernels.blocks import Rowwise


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (wide * scale * weight.float()).to(x.dtype), scale


def _backward(
    gradient: Tensor, x: Tensor, scale: Tensor, skip: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor]:
    normed, g = x.float() * scale, gradient.float()
    product = g * normed
    w = weight.float()
    mean = (product * w).mean(-1, keepdim=True)
    dx = (g * w - normed * mean) * scale
    if skip is not None:
        dx = dx + skip.float()
    return dx.to(x.dtype), product.sum(0)


_run_forward = Rowwise(_forward, shared=2)
_run_backward = Rowwise(_backward, shared=1, sums=1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x / rms * weight [T, D], 1 / rms float32 [T, 1]) of x [T, D]."""
    return _run_forward(x, weight.clone(), eps)  # type: ignore[return-value]


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `rms_norm`: (of x, with `skip` added, [T, D]; of weight, float32 [D])."""
    return _run_backward(gradient, x, scale, skip, weight.clone())  # type: ignore[return-value]


def add_rms_norm(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a + b and its RMSNorm: (sum [T, D], normed [T, D], 1 / rms float32 [T, 1])."""
    return _run_add(a, b, weight.clone(), eps)  # type: ignore[return-value]


def _add(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    total = a + b
    return (total, *_forward(total, weight, eps))


_run_add = Rowwise(_add, shared=2)

