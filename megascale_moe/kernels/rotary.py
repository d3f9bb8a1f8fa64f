"""Rotary embedding applied out of place, in two passes per half instead of a chain of temporaries."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor, inverse: bool = False) -> Tensor:
    """Rotate pairs of x [T, heads, w] by angles [T, w / 2] into `out` of the same shape; `inverse` rotates back."""
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    sign = -1.0 if inverse else 1.0
    (a, b), (p, q) = _pairs(x, interleaved), _pairs(out, interleaved)
    torch.mul(a, c, out=p).addcmul_(b, s, value=-sign)
    torch.mul(b, c, out=q).addcmul_(a, s, value=sign)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
