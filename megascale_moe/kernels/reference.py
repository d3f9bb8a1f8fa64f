"""The slow twins: every kernel of this package once more, as plain as it can be written, under the same name.

They say what a kernel computes. Each is differentiable, so torch autograd of the twin is what the explicit backward is
compared with; that is why there are no twins of the backward kernels. Arithmetic is in float32 (float64 stays), with
one rounding to the input's dtype at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megascale_moe.kernels.attention import QueryBlock, Spans
from megascale_moe.kernels.grouped import Groups
from megascale_moe.kernels.rows import RowMap


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, D] -> (x / rms * weight [T, D], 1 / rms [T, 1])."""
    wide = _wide(x)
    scale = 1 / torch.sqrt((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + eps)
    return (wide * scale * _wide(weight)).to(x.dtype), scale


def add_rms_norm(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """a + b and its RMSNorm: (sum [T, D], normed [T, D], 1 / rms [T, 1])."""
    return (a + b, *rms_norm(a + b, weight, eps))


def swiglu(x: Tensor, gate: Tensor | None = None) -> Tensor:
    """x [R, 2F], gate [R] or None -> a / (1 + exp(-a)) * b * gate for x = [a, b], [R, F]."""
    width = x.shape[-1] // 2
    a, b = _wide(x[:, :width]), _wide(x[:, width:])
    y = a / (1 + torch.exp(-a)) * b
    return (y if gate is None else y * gate[:, None]).to(x.dtype)


def clamped_swiglu(x: Tensor, gate: Tensor | None, alpha: float, limit: float) -> Tensor:
    """x [R, 2F], gate [R] or None -> a / (1 + exp(-alpha a)) * (b + 1) * gate, [R, F].

    x = [a, b]; a no larger than `limit`, b between -limit and limit.
    """
    width = x.shape[-1] // 2
    a = _wide(x[:, :width]).clamp(max=limit)
    b = _wide(x[:, width:]).clamp(-limit, limit)
    y = a / (1 + torch.exp(-alpha * a)) * (b + 1)
    return (y if gate is None else y * gate[:, None]).to(x.dtype)


def split_heads(
    qkv: Tensor, rope: tuple[Tensor, Tensor], sizes: tuple[int, int, int], interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Projection qkv [T, ...] to rotated q [T, H, w], rotated k [T, G, w] and v [T, G, u]; pairs as complex numbers."""
    queries, keys, width = sizes
    ends = queries * width, (queries + keys) * width
    q, k, v = qkv[:, : ends[0]], qkv[:, ends[0] : ends[1]], qkv[:, ends[1] :]
    turn = torch.complex(_wide(rope[0]), _wide(rope[1]))[:, None]

    def rotate(x: Tensor, heads: int) -> Tensor:
        x = x.reshape(len(qkv), heads, width)
        even, odd = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : width // 2], x[..., width // 2 :])
        turned = torch.complex(_wide(even), _wide(odd)) * turn
        axis = -1 if interleaved else -2
        return torch.stack((turned.real, turned.imag), dim=axis).reshape(x.shape).to(x.dtype)

    return rotate(q, queries), rotate(k, keys), v.reshape(len(qkv), keys, v.shape[1] // keys)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window: int, sinks: Tensor | None = None
) -> Tensor:
    """q [rows, s, H, w], k [rows, s, G, w], v [rows, s, G, u] -> [rows, s, H, u]; the whole square under a mask.

    Args:
        sinks: logits [H] of one more key per head, whose value is zero.
    """
    rows, length, heads = q.shape[:3]
    document = torch.zeros(rows, length, dtype=torch.long, device=q.device)
    for index, (row, first, last) in enumerate(spans):
        document[row, first:last] = index
    place = torch.arange(length, device=q.device)
    distance = place[:, None] - place
    near = (distance >= 0) & (distance < (window or length))
    visible = near & (document[:, :, None] == document[:, None, :])
    k, v = (_wide(x).repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhw,bkhw->bhqk", _wide(q), k) * scale
    weights = scores.masked_fill(~visible[:, None], float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    p = weights / (total if sinks is None else total + _wide(sinks).exp()[:, None, None])
    return torch.einsum("bhqk,bkhu->bqhu", p, v).to(q.dtype)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[QueryBlock], scale: float, window: int,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [rows, t, H, w], k [rows, s, G, w], v [rows, s, G, u] -> [rows, t, H, u]; the whole rectangle under a mask."""
    heads, visible = q.shape[2], torch.zeros(len(q), q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    for rows, queries, keys in blocks:
        for query in range(queries.start, queries.stop):
            position = keys.stop - queries.stop + query
            first = max(keys.start, position - window + 1) if window else keys.start
            visible[rows, query, first : position + 1] = True
    k, v = (_wide(x).repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhw,bkhw->bhqk", _wide(q), k) * scale
    weights = scores.masked_fill(~visible[:, None], float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    p = weights / (total if sinks is None else total + _wide(sinks).exp()[:, None, None])
    return torch.einsum("bhqk,bkhu->bqhu", p, v).to(q.dtype)


def grouped_mm(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """x [R, K] times weight [G, K, N], row group g with weight g -> [R, N]; every row brings its own matrix."""
    counts = torch.tensor(groups.counts, device=x.device)
    group = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
    return (_wide(x)[:, :, None] * _wide(weight)[group]).sum(1).to(x.dtype)


def rows_of_groups(values: Tensor, groups: Groups, count: int) -> Tensor:
    """values [G, N] -> for each of `count` rows those of its group, [count, N]."""
    rows = [values[group] for group, size in enumerate(groups.counts) for _ in range(size)]
    return torch.stack(rows) if rows else values[:0]


def sums_of_groups(x: Tensor, groups: Groups) -> Tensor:
    """x [R, N] -> the sum over the rows of each group, [G, N]."""
    return torch.stack([part.sum(0) for part in _wide(x).split(groups.counts)]).to(x.dtype)


def row_map(choice: Tensor, first: int, count: int, kept: Tensor | None = None) -> RowMap:
    """Rows for the experts `first` .. `first + count - 1`; token by token, choice by choice."""
    tokens, k = choice.shape
    rows: list[list[int]] = [[] for _ in range(count)]
    for slot, expert in enumerate(choice.flatten().tolist()):
        if first <= expert < first + count and (kept is None or bool(kept[slot // k, slot % k])):
            rows[expert - first].append(slot)
    slots = [slot for of_expert in rows for slot in of_expert]
    counts = [len(of_expert) for of_expert in rows]
    by_token = sorted(range(len(slots)), key=lambda row: slots[row] // k)
    starts = [sum(slot // k < token for slot in slots) for token in range(tokens)]
    return RowMap(
        offsets=torch.tensor([sum(counts[: expert + 1]) for expert in range(count)], dtype=torch.int32),
        source=torch.tensor([slot // k for slot in slots], dtype=torch.long),
        slot=torch.tensor(slots, dtype=torch.long),
        by_token=torch.tensor(by_token, dtype=torch.long),
        token_start=torch.tensor(starts, dtype=torch.long),
    )


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Row copy: x [T, D], index int64 [R] -> [R, D]."""
    return x[index]


def sum_rows(rows: Tensor, of: RowMap) -> Tensor:
    """Sum of each token's routed rows: rows [R, D] -> [T, D]; tokens without a row get zero."""
    by_token, token_start = of.by_token, of.token_start
    ends = [*token_start.tolist()[1:], len(by_token)]
    sums = [_wide(rows)[by_token[a:b]].sum(0) for a, b in zip(token_start.tolist(), ends, strict=len(token_start) > 0)]
    return torch.stack(sums).to(rows.dtype) if sums else rows[:0]


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, add_weight_gradient: Callable[[Tensor, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Sum of the losses and the scaled gradient of x [T, D]; the weight's goes to `add_weight_gradient`."""
    with torch.enable_grad():
        logits = (_wide(x) @ _wide(weight).t()).requires_grad_()
        loss = _losses(logits, targets)
        (slope,) = torch.autograd.grad(loss * scale, logits)
    add_weight_gradient(slope.t(), _wide(x))
    return loss.detach(), (slope @ _wide(weight)).to(x.dtype)


def linear_cross_entropy_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed loss alone; targets of -100 do not count."""
    return _losses(_wide(x) @ _wide(weight).t(), targets)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    counted = (targets >= 0).nonzero().squeeze(1)
    picked = logits[counted]
    return (picked.logsumexp(-1) - picked[torch.arange(len(counted)), targets[counted]]).sum()


def float8(x: Tensor, shared: Tensor) -> Tensor:
    """Each element of x as the nearest E4M3 times a power of two, float64; ties to the even mantissa.

    Args:
        shared: broadcasts with x, the largest magnitude among those that share the scale of an element.
    """
    scale = torch.exp2(torch.floor(torch.log2(shared.double() / 448)) + 1).clamp(min=2.0**-126)
    magnitudes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # in rising order
    size = (x.double() / scale).abs()
    above = torch.searchsorted(magnitudes, size).clamp(max=126)
    below = (above - 1).clamp(min=0)
    down, up = size - magnitudes[below], magnitudes[above] - size
    nearest = torch.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    return magnitudes[nearest].copysign(x.double()) * scale
