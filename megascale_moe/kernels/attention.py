"""The attention core: causal, inside documents, grouped-query heads.

Documents become separate calls rather than a mask: a mask costs the full square and leaves the fast kernels. Forward is
torch's scaled_dot_product_attention. On a CPU its backward is the slowest kernel of a small model, so the backward
here is our own: blocks of queries against the keys they see, the scores recomputed, all heads of a key head in one
product. It keeps nothing but q, k, v, and takes 0.6-0.9x the time of torch's (benchmarks/kernels). On a GPU torch's
backward runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # queries: their scores against a few hundred keys stay in the L2 cache
Spans = tuple[tuple[int, int, int], ...]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window: int) -> Tensor:
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


def causal_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from that of the output [rows, s, H, u]."""
    if q.device.type != "cpu":
        return _library_backward(gradient, q, k, v, spans, scale, window)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for row, a, b in spans or tuple((row, 0, q.shape[1]) for row in range(q.shape[0])):
        part = (slice(row, row + 1), slice(a, b))
        d, *heads = (x[part].squeeze(0) for x in (gradient, q, k, v))
        for out, value in zip((dq, dk, dv), _document_backward(d, heads[0], heads[1], heads[2], scale, window), strict=True):
            out[part] = value
    return dq, dk, dv


def _library_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        out = causal_attention(q, k, v, spans, scale, window)
    return torch.autograd.grad(out, (q, k, v), gradient)  # type: ignore[return-value]


def _document_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One document: gradient [s, H, u], q [s, H, w], k [s, G, w], v [s, G, u]."""
    s, heads, width = q.shape
    groups = k.shape[1]
    queries = (q * scale).view(s, groups, -1, width).transpose(0, 1).contiguous()  # [G, s, H / G, w]
    slopes = gradient.reshape(s, groups, heads // groups, -1).transpose(0, 1).contiguous()
    keys, values = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()  # [G, s, w], [G, s, u]
    keys_t, values_t = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32) for x in (keys, values))
    for a in range(0, s, BLOCK):
        b, first = min(a + BLOCK, s), max(0, a - window + 1) if window else 0
        block, slope = queries[:, a:b].flatten(1, 2), slopes[:, a:b].flatten(1, 2)
        scores = torch.bmm(block, keys_t[:, :, first:b]).float()
        scores.view(groups, b - a, heads // groups, b - first).add_(_mask(a, b, first, window))
        p = scores.softmax(-1)
        dp = torch.bmm(slope, values_t[:, :, first:b]).float()
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, torch.float32).to(q.dtype)  # what autograd calls
        dv[:, first:b] += torch.bmm(p.to(q.dtype).transpose(1, 2), slope)
        dk[:, first:b] += torch.bmm(ds.transpose(1, 2), block)
        dq[:, a:b] = torch.bmm(ds, keys[:, first:b]).view(groups, b - a, heads // groups, width)
    return (dq * scale).transpose(0, 1).reshape(q.shape), dk.transpose(0, 1), dv.transpose(0, 1)


def _mask(a: int, b: int, first: int, window: int) -> Tensor:
    """0 or -inf for queries a .. b against keys first .. b, float32 [b - a, 1, b - first]."""
    distance = torch.arange(a, b)[:, None] - torch.arange(first, b)
    hidden = (distance < 0) if not window else (distance < 0) | (distance >= window)
    return torch.zeros(distance.shape).masked_fill_(hidden, float("-inf"))[:, None]
