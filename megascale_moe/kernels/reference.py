"""The slow twins: every kernel of this package once more, as plain as it can be written, under the same name.

They say what a kernel computes. Each is differentiable, so torch autograd of the twin is what the explicit backward is
compared with; that is why there are no twins of the backward kernels. Arithmetic is in float32 (float64 stays), with
one rounding to the input's dtype at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale_moe.kernels.activation import Clamp
from megascale_moe.kernels.attention import QueryBlock
from megascale_moe.kernels.grouped import Groups
from megascale_moe.kernels.rows import RowMap


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x / rms * weight [T, D], 1 / rms [T, 1]) of x [T, D]."""
    wide = _wide(x)
    scale = 1 / torch.sqrt((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + eps)
    return (wide * scale * _wide(weight)).to(x.dtype), scale


def add_rms_norm(a: Tensor, b: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a + b and its RMSNorm: (sum [T, D], normed [T, D], 1 / rms [T, 1])."""
    return (a + b, *rms_norm(a + b, weight, eps))


def swiglu(x: Tensor, gate: Tensor | None = None, clamp: Clamp = None) -> Tensor:
    """Return a * sigmoid(a) * b * gate [R, F] for x = [a, b] [R, 2F] and gate [R] or None.

    Clamped, a is no larger than `limit` and b between -limit and limit: a * sigmoid(alpha a) * (b + 1) * gate.
    """
    width, alpha = x.shape[-1] // 2, 1.0
    a, b = _wide(x[:, :width]), _wide(x[:, width:])
    if clamp is not None:
        alpha, limit = clamp
        a, b = a.clamp(max=limit), b.clamp(-limit, limit) + 1
    y = a * torch.sigmoid(alpha * a) * b
    return (y if gate is None else y * gate[:, None]).to(x.dtype)


def split_heads(
    qkv: Tensor, rope: tuple[Tensor, Tensor], sizes: tuple[int, int, int], interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv [T, ...] into rotated q [T, H, w], rotated k [T, G, w] and v [T, G, u]; pairs are complex numbers."""
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


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[QueryBlock], scale: float, window: int,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend q [rows, t, H, w] to the keys of its blocks in k [rows, s, G, w], v [rows, s, G, u] -> [rows, t, H, u]."""
    visible = torch.zeros(len(q), q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    for rows, queries, keys in blocks:
        for query in range(queries.start, queries.stop):
            position = keys.stop - queries.stop + query
            first = max(keys.start, position - window + 1) if window else keys.start
            visible[rows, query, first : position + 1] = True
    return masked_attention(q, k, v, visible, scale, sinks)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Attend q [rows, t, H, w] to the `visible` of k [rows, s, G, w], v [rows, s, G, u] -> [rows, t, H, u].

    Args:
        visible: bool [rows, t, s].
        sinks: logits [H] of one more key per head, whose value is zero.
    """
    k, v = (_wide(x).repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = (torch.einsum("bqhw,bkhw->bhqk", _wide(q), k) * scale).masked_fill(~visible[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, _wide(sinks)[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    return torch.einsum("bhqk,bkhu->bqhu", scores.softmax(-1)[..., : k.shape[1]], v).to(q.dtype)


def grouped_mm(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Multiply x [R, K] with weight [G, K, N], row group g with weight g -> [R, N]; each row by its own matrix."""
    return (_wide(x)[:, :, None] * rows_of_groups(_wide(weight), groups, len(x))).sum(1).to(x.dtype)


def rows_of_groups(values: Tensor, groups: Groups, count: int) -> Tensor:
    """Return for each of `count` rows the values [G, ...] of its group, [count, ...]."""
    return values.repeat_interleave(torch.tensor(groups.counts, device=values.device), dim=0, output_size=count)


def sums_of_groups(x: Tensor, groups: Groups) -> Tensor:
    """Return the sum over the rows of each group of x [R, N], [G, N]."""
    return torch.stack([rows.sum(0) for rows in _wide(x).split(groups.counts)]).to(x.dtype)


def row_map(choice: Tensor, first: int, count: int, kept: Tensor | None = None) -> RowMap:
    """Return the rows for the experts `first` .. `first + count - 1`; token by token, choice by choice."""
    tokens, k = choice.shape
    taken = [True] * choice.numel() if kept is None else kept.flatten().tolist()
    assigned = [(expert - first, slot) for slot, expert in enumerate(choice.flatten().tolist()) if taken[slot]]
    rows = sorted((expert, slot) for expert, slot in assigned if 0 <= expert < count)
    experts, slots, sources = [e for e, _ in rows], [slot for _, slot in rows], [slot // k for _, slot in rows]
    return RowMap(
        offsets=torch.tensor([sum(e <= last for e in experts) for last in range(count)], dtype=torch.int32),
        source=torch.tensor(sources, dtype=torch.long),
        slot=torch.tensor(slots, dtype=torch.long),
        by_token=torch.tensor(sorted(range(len(rows)), key=sources.__getitem__), dtype=torch.long),
        token_start=torch.tensor([sum(t < token for t in sources) for token in range(tokens)], dtype=torch.long),
    )


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Copy rows: x [T, D], index int64 [R] -> [R, D]."""
    return x[index]


def sum_rows(rows: Tensor, of: RowMap) -> Tensor:
    """Return the sum of each token's routed rows: rows [R, D] -> [T, D]; tokens without a row get zero."""
    zeros = _wide(rows).new_zeros(len(of.token_start), rows.shape[1])
    return zeros.index_add(0, of.source, _wide(rows)).to(rows.dtype)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, add_weight_gradient: Callable[[Tensor, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses and the scaled gradient of x [T, D]; the weight's goes to `add_weight_gradient`."""
    with torch.enable_grad():
        logits = (_wide(x) @ _wide(weight).t()).requires_grad_()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        (slope,) = torch.autograd.grad(loss * scale, logits)
    add_weight_gradient(slope.t(), _wide(x))
    return loss.detach(), (slope @ _wide(weight)).to(x.dtype)


def linear_cross_entropy_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss alone; targets of -100 do not count."""
    return F.cross_entropy(_wide(x) @ _wide(weight).t(), targets, reduction="sum")


def float8(x: Tensor, shared: Tensor) -> Tensor:
    """Return each element of x as the nearest E4M3 times a power of two, float64; ties to the even mantissa.

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
