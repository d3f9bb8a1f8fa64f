"""The attention core: causal, inside documents, grouped-query heads.

Documents become separate calls rather than a mask: a mask costs the full square and leaves the fast kernels. torch's
scaled_dot_product_attention does the work, except where it is the slowest kernel of a small model, on a CPU: the
backward, and in BF16 the forward too, are our own there. Blocks of queries meet the keys they see, all heads of a key
head in one product; the backward recomputes the scores and keeps nothing but q, k, v. Measured (benchmarks/kernels):
backward 0.8x torch's time in FP32 and 0.65x in BF16, forward 0.5-0.8x in BF16. In FP32 with several threads torch's
splits better over them and is used, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

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
    """The last query stands at the position of the last key."""
    mask = _bias(q.shape[1], k.shape[1], window, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


class _Entrance(torch.autograd.Function):
    """Where a local graph begins: unlike a leaf, the node does not hold the tensor."""

    @staticmethod
    def forward(ctx: object, token: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[None, None]:
        return None, None  # gradients are taken in front of it


def _bias(queries: int, keys: int, window: int, device: torch.device) -> Tensor | None:
    """What torch's kernel needs beside q, k, v; None: the queries stand at the positions of the keys and see all."""
    if 0 < window < keys:
        return _visible(queries, keys, window, device)
    if queries == keys:
        return None
    if device.type == "cpu":
        return _visible(queries, keys, keys, device)
    # torch knows a fused kernel for this diagonal on a GPU alone. The import loads its compiler: seconds.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(queries, keys)


@lru_cache(maxsize=8)  # one for all layers: torch saves it for the backward of each
def _visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Which keys a query may see, bool [queries, keys]; the last query stands at the position of the last key."""
    index = torch.arange(keys, device=device)
    distance = index[keys - queries :, None] - index
    return (distance >= 0) & (distance < window)


@dataclass
class _Part:
    """A saved tensor that is a part of q, k, v or the result: which one, and how it lies in it."""

    which: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Graph:
    """The local graph of torch's own backward, without the tensors that are at hand when it runs.

    torch's kernel saves q, k, v, its result and a few statistics. All but the statistics are values of the list of
    operators, which decides whether they are kept or recomputed; so the graph keeps no memory of theirs, and is handed
    them for the backward.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._tensors: tuple[Tensor, ...] = (q, k, v)
        token = torch.empty(0, requires_grad=True)
        with torch.enable_grad():
            self.inputs: list[Tensor] = [_Entrance.apply(token, x) for x in (q, k, v)]  # type: ignore[no-untyped-call]
        self._entrances = [torch.autograd.graph.get_gradient_edge(x) for x in self.inputs]
        self._exits: list[torch.autograd.graph.GradientEdge] = []
        self._boxes: list[list[Tensor | _Part]] = []

    def attend(self, spans: Spans, scale: float, window: int, place: Tensor | None = None) -> Tensor:
        """Run torch's kernel on the inputs, document by document, and return the result [rows, s, H, u].

        Args:
            place: where the result is written, if it is one document.
        """
        parts = [(slice(row, row + 1), slice(a, b)) for row, a, b in spans]
        if not parts:
            result, boxes = self._attend((slice(None), slice(None)), scale, window)
            out = result.detach() if place is None else place.copy_(result.detach())
            self._find_result(boxes, result, out, out)
            return out
        q, _, v = self._tensors
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for part in parts:
            result, boxes = self._attend(part, scale, window)
            out[part] = result.detach()
            self._find_result(boxes, result, out[part], out)
        return out

    def _attend(self, part: tuple[slice, ...], scale: float, window: int) -> tuple[Tensor, list[list[Tensor | _Part]]]:
        first = len(self._boxes)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack), torch.enable_grad():
            q, k, v = (x[part] for x in self.inputs)
            result = _attend(q, k, v, scale, window)
        self._exits.append(torch.autograd.graph.get_gradient_edge(result))
        return result, self._boxes[first:]

    def _find_result(self, boxes: list[list[Tensor | _Part]], result: Tensor, place: Tensor, out: Tensor) -> None:
        """What was saved of a result lies in `out` as well now, at `place`."""
        for box in boxes:
            saved = box[0]
            if isinstance(saved, Tensor) and saved.untyped_storage()._cdata == result.untyped_storage()._cdata:
                view = place.transpose(1, 2)
                if saved.shape == view.shape and saved.stride()[1:] == view.stride()[1:]:
                    offset = int(view.storage_offset() - out.storage_offset())
                    box[0] = _Part(3, tuple(view.shape), view.stride(), offset)

    def close(self) -> None:
        """Let go of the inputs."""
        self._tensors = ()
        self.inputs.clear()

    def gradients(self, tensors: tuple[Tensor, ...], slopes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v from those of the results, part by part.

        Args:
            tensors: q, k, v and the result of the forward.
        """
        self._tensors = tensors
        return torch.autograd.grad(self._exits, self._entrances, slopes)  # type: ignore[arg-type]

    def _pack(self, saved: Tensor) -> list[Tensor | _Part]:
        box: list[Tensor | _Part] = [saved]
        for which, x in enumerate(self._tensors):
            if saved.untyped_storage()._cdata == x.untyped_storage()._cdata and saved.dtype == x.dtype:
                offset = int(saved.storage_offset() - x.storage_offset())
                box = [_Part(which, tuple(saved.shape), saved.stride(), offset)]
                break
        self._boxes.append(box)
        return box

    def _unpack(self, box: list[Tensor | _Part]) -> Tensor:
        saved = box[0]
        if isinstance(saved, Tensor):
            return saved
        x = self._tensors[saved.which]
        return x.as_strided(saved.size, saved.stride, x.storage_offset() + saved.offset)


def causal_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window: int, sinks: Tensor | None = None
) -> tuple[Tensor, Graph | None]:
    """Return `causal_attention`, and what its backward needs beside q, k, v and that.

    Args:
        sinks: a logit per head, [H], that takes its share of every softmax and adds nothing to the result. torch has no
            kernel for it, so the blocks run, on a GPU too.

    Without storage (meta tensors) neither way makes scores, as no fused kernel does; torch's own meta form would.
    """
    if q.is_meta:
        return q.new_empty(*q.shape[:3], v.shape[3]), None
    if sinks is not None or (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for part in _parts(q, spans):
            out[part] = _documents_forward(q[part], k[part], v[part], scale, window, sinks)
        return out, None
    # torch has no fused kernel on a CPU for values of another width than keys: its graph would hold all scores.
    if q.device.type == "cpu" and (torch.get_num_threads() == 1 or q.shape[3] != v.shape[3]):
        return causal_attention(q, k, v, spans, scale, window), None
    graph = Graph(q, k, v)
    out = graph.attend(spans, scale, window)
    graph.close()
    return out, graph


def causal_attention_backward(
    gradient: Tensor, inputs: Sequence[Tensor], out: Tensor, graph: Graph | None, spans: Spans, scale: float,
    window: int, sinks: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the inputs q, k, v, and of the sinks if there are any, from that of the output [rows, s, H, u];
    `out` is the output itself.
    """
    q, k, v = inputs
    if graph is not None:
        slopes = [gradient[row : row + 1, a:b] for row, a, b in spans] or [gradient]
        return graph.gradients((q, k, v, out), slopes)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dsinks = () if sinks is None else (torch.zeros_like(sinks, dtype=torch.float32),)
    for part in _parts(q, spans) if not q.is_meta else ():
        dq[part], dk[part], dv[part], *more = _documents_backward(
            gradient[part], q[part], k[part], v[part], scale, window, sinks
        )
        for total, slope in zip(dsinks, more, strict=True):
            total += slope
    return dq, dk, dv, *dsinks


def _parts(q: Tensor, spans: Spans) -> list[tuple[slice, slice]]:
    """What one call works on: a document, or a whole row for each thread."""
    if spans:
        return [(slice(row, row + 1), slice(a, b)) for row, a, b in spans]
    step = torch.get_num_threads()
    return [(slice(row, row + step), slice(None)) for row in range(0, q.shape[0], step)]


def _documents_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: Tensor | None
) -> Tensor:
    """n documents of one length: q [n, s, H, w], k [n, L, G, w], v [n, L, G, u] -> [n, s, H, u].

    The queries stand at the last s positions of the keys.
    """
    n, s, heads, _ = q.shape
    groups, skipped = k.shape[2], k.shape[1] - s
    queries, values = _by_group(q * scale, groups), _by_group(v, groups).squeeze(2)
    keys_t = _by_group(k, groups).squeeze(2).transpose(1, 2).contiguous()
    out, more = queries.new_empty(n * groups, s, heads // groups, v.shape[3]), _sinks_by_group(sinks, n, groups)
    for a in range(0, s, BLOCK):
        b, first, last = _seen(a, s, skipped, window)
        p = _probabilities(queries[:, a:b], keys_t[:, :, first:last], a + skipped, first, window, more).to(q.dtype)
        part = torch.bmm(p[..., : last - first], values[:, first:last])
        out[:, a:b] = part.view(-1, b - a, heads // groups, v.shape[3])
    return _by_token(out, n)


def _sinks_by_group(sinks: Tensor | None, n: int, groups: int) -> Tensor | None:
    """sinks [H] -> float32 [n * groups, 1, H / groups, 1]."""
    return None if sinks is None else sinks.float().view(groups, 1, -1, 1).repeat(n, 1, 1, 1)


def _seen(a: int, s: int, skipped: int, window: int) -> tuple[int, int, int]:
    """Where a block of s queries ends that begins at query a, and the first and the last key, exclusive, it meets."""
    b = min(a + BLOCK, s)
    return b, max(0, a + skipped - window + 1) if window else 0, b + skipped


def _probabilities(
    queries: Tensor, keys_t: Tensor, a: int, first: int, window: int, sinks: Tensor | None
) -> Tensor:
    """Softmax of a block's scores, float32 [N, block * H / G, L], with sinks [.., L + 1]: their share is the last.

    Args:
        queries: scaled, [N, block, H / G, w], the first at position `a`.
        keys_t: [N, w, L], the first at position `first`.
        sinks: as `_sinks_by_group` has them.
    """
    _, block, share, _ = queries.shape
    scores = torch.bmm(queries.flatten(1, 2), keys_t).float()
    masked = first if window else a  # without a window only the last square has hidden keys
    scores.view(-1, block, share, keys_t.shape[2])[..., masked - first :] += _mask(
        a, a + block, masked, window, scores.device
    )
    if sinks is not None:
        scores = torch.cat((scores, sinks.expand(-1, block, -1, -1).reshape(*scores.shape[:2], 1)), dim=-1)
    return scores.softmax(-1)


def _documents_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: Tensor | None
) -> tuple[Tensor, ...]:
    """n documents of one length: gradient [n, s, H, u], q [n, s, H, w], k [n, L, G, w], v [n, L, G, u]."""
    n, s, heads, width = q.shape
    groups, skipped = k.shape[2], k.shape[1] - s
    share = heads // groups
    queries, slopes = _by_group(q * scale, groups), _by_group(gradient, groups)  # [n * G, s, H / G, w or u]
    keys, values = _by_group(k, groups).squeeze(2), _by_group(v, groups).squeeze(2)  # [n * G, L, w or u]
    keys_t, values_t = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
    more = _sinks_by_group(sinks, n, groups)
    dsinks = q.new_zeros(heads, dtype=torch.float32)
    for a in range(0, s, BLOCK):
        b, first, last = _seen(a, s, skipped, window)
        block, slope = queries[:, a:b].flatten(1, 2), slopes[:, a:b].flatten(1, 2)
        p = _probabilities(queries[:, a:b], keys_t[:, :, first:last], a + skipped, first, window, more)
        dp = torch.bmm(slope, values_t[:, :, first:last]).float()
        if sinks is not None:
            dp = F.pad(dp, (0, 1))  # their value is zero
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, torch.float32)  # what autograd calls
        if sinks is not None:
            dsinks += ds[..., -1].view(n, groups, b - a, share).sum((0, 2)).flatten()
            p, ds = p[..., :-1], ds[..., :-1]
        ds = ds.to(q.dtype)
        _add_bmm(dv[:, first:last], p.to(q.dtype).transpose(1, 2), slope)
        _add_bmm(dk[:, first:last], ds.transpose(1, 2), block)
        dq[:, a:b] = torch.bmm(ds, keys[:, first:last]).view(-1, b - a, share, width)
    found = _by_token(dq * scale, n), _by_token(dk[:, :, None], n), _by_token(dv[:, :, None], n)
    return found if sinks is None else (*found, dsinks)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """x [n, s, heads, w] -> [n * groups, s, heads / groups, w], contiguous."""
    by_group: Tensor = x.unflatten(2, (groups, -1))
    return by_group.transpose(1, 2).flatten(0, 1).contiguous()


def _by_token(x: Tensor, n: int) -> Tensor:
    """The inverse of `_by_group`."""
    by_row: Tensor = x.unflatten(0, (n, -1))
    return by_row.transpose(1, 2).flatten(2, 3)


def _add_bmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, inside the product where the dtypes agree."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


def _mask(a: int, b: int, first: int, window: int, device: torch.device) -> Tensor:
    """0 or -inf for queries a .. b against keys first .. b, float32 [b - a, 1, b - first]."""
    distance = torch.arange(a, b, device=device)[:, None] - torch.arange(first, b, device=device)
    hidden = (distance < 0) if not window else (distance < 0) | (distance >= window)
    return torch.zeros(distance.shape, device=device).masked_fill_(hidden, float("-inf"))[:, None]


# --- blocks: some queries of a document against all keys that they may see -------------------------------------------


class QueryBlock(NamedTuple):
    """Consecutive queries of one document, in some rows, and the keys that they meet.

    Attributes:
        rows: of the batch. queries: their places in q. keys: places in k and v, of which the last one is the position
            of the last query and all belong to the document.
    """

    rows: slice
    queries: slice
    keys: slice


def block_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[QueryBlock], scale: float, window: int,
    sinks: Tensor | None = None,
) -> tuple[Tensor, list[Graph] | None]:  # fmt: skip
    """Return causal attention of queries that are a part of their sequences, and what its backward needs beside that.

    q [rows, t, H, w], k [rows, s, G, w], v [rows, s, G, u] -> [rows, t, H, u].

    Args:
        blocks: each query is in one of them.
        window: a query sees at most this many tokens, itself included; 0: all.
        sinks: see `causal_attention_forward`.
    """
    out = q.new_empty(*q.shape[:3], v.shape[3])
    if q.is_meta:
        return out, None
    if sinks is not None or _ours(q, v):
        for rows, queries, keys in _by_thread(blocks):
            at, seen = (rows, queries), (rows, keys)
            out[at] = _documents_forward(q[at], k[seen], v[seen], scale, window, sinks)
        return out, None
    graphs = []
    for rows, queries, keys in blocks:
        at, seen = (rows, queries), (rows, keys)
        graphs.append(Graph(q[at], k[seen], v[seen]))
        graphs[-1].attend((), scale, window, out[at])
        graphs[-1].close()
    return out, graphs


def block_attention_backward(
    gradient: Tensor, inputs: Sequence[Tensor], out: Tensor, graphs: Sequence[Graph] | None,
    blocks: Sequence[QueryBlock], scale: float, window: int, sinks: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the inputs q, k, v, and of the sinks if there are any, from that of the output [rows, t, H, u];
    blocks that share keys are summed in float32.
    """
    q, k, v = inputs
    dq = torch.empty_like(q)
    dsinks = () if sinks is None else (torch.zeros_like(sinks, dtype=torch.float32),)
    if q.is_meta:
        return dq, torch.empty_like(k), torch.empty_like(v), *dsinks
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    for index, (rows, queries, keys) in enumerate(_by_thread(blocks) if graphs is None else blocks):
        at, seen = (rows, queries), (rows, keys)
        here = (q[at], k[seen], v[seen])
        if graphs is None:
            slopes = _documents_backward(gradient[at], *here, scale, window, sinks)
        else:
            slopes = graphs[index].gradients((*here, out[at]), [gradient[at]])
        dq[at] = slopes[0]
        dk[seen] += slopes[1]
        dv[seen] += slopes[2]
        for total, slope in zip(dsinks, slopes[3:], strict=True):
            total += slope
    return dq, dk.to(k.dtype), dv.to(v.dtype), *dsinks


def _ours(q: Tensor, v: Tensor) -> bool:
    """Whether our own loops over blocks run rather than torch's kernel; see `causal_attention_forward`."""
    alone = torch.get_num_threads() == 1 or q.shape[3] != v.shape[3]
    return q.device.type == "cpu" and (q.dtype == torch.bfloat16 or alone)


def _by_thread(blocks: Sequence[QueryBlock]) -> list[QueryBlock]:
    """The blocks with as many rows at a time as there are threads."""
    step = torch.get_num_threads()
    return [
        block._replace(rows=slice(row, min(row + step, block.rows.stop)))
        for block in blocks for row in range(block.rows.start, block.rows.stop, step)
    ]  # fmt: skip
