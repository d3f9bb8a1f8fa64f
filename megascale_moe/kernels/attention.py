"""The attention core: causal, inside documents, grouped-query heads.

Documents become separate calls rather than a mask: a mask costs the full square and leaves the fast kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: tuple[tuple[int, int, int], ...], scale: float, window: int
) -> Tensor:
    """q [rows, s, H, w], k [rows, s, G, w], v [rows, s, G, u] -> [rows, s, H, u].

    Args:
        spans: (row, first, last + 1) of each document, covering all rows; empty: every row is one document.
        window: a query sees at most this many tokens, itself included; 0: all.
    """
    if not spans:
        return _attend(q, k, v, scale, window)
    parts = [
        _attend(q[row : row + 1, a:b], k[row : row + 1, a:b], v[row : row + 1, a:b], scale, window)
        for row, a, b in spans
    ]
    return torch.cat([part.squeeze(0) for part in parts]).view(*q.shape[:3], v.shape[3])


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    length = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None
    if 0 < window < length:
        index = torch.arange(length, device=q.device)
        distance = index[:, None] - index
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
