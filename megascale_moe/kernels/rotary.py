"""Rotary embedding, and the fused projection split into heads with it, and back, each in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from megascale_moe.kernels.blocks import Rowwise


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of the last axis of x [T, heads, width] in its dtype; the inverse is `rotate(x, cos, -sin, ...)`."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return rotate(x.float(), cos, sin, interleaved).to(x.dtype)


def _split(x: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, int, int], interleaved: bool) -> tuple[Tensor, ...]:
    queries, keys, width = sizes
    q, k, v = x.split([queries * width, keys * width, x.shape[1] - (queries + keys) * width], dim=1)
    q, k = q.unflatten(1, (queries, width)), k.unflatten(1, (keys, width))
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved), v.unflatten(1, (keys, -1)).contiguous()


def _join(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor]:
    q, k = _rotate(dq, cos, -sin, interleaved), _rotate(dk, cos, -sin, interleaved)
    return (torch.cat((q.flatten(1), k.flatten(1), dv.flatten(1)), dim=1),)


_run_split = Rowwise(_split, shared=2)
_run_join = Rowwise(_join, shared=1)


def split_heads(
    qkv: Tensor, rope: tuple[Tensor, Tensor], sizes: tuple[int, int, int], interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the projection qkv [T, ...] into rotated q [T, H, w], rotated k [T, G, w] and v [T, G, u].

    Args:
        rope: cos and sin, float32 [T, w / 2].
        sizes: (H, G, w).
    """
    return _run_split(qkv, *rope, sizes, interleaved)  # type: ignore[return-value]


def split_heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, rope: tuple[Tensor, Tensor], interleaved: bool
) -> Tensor:
    """Return the gradient of qkv [T, ...] from those of the heads."""
    return _run_join(dq, dk, dv, *rope, interleaved)[0]
