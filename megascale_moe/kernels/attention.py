"""The attention core: causal, inside documents, grouped-query heads.

Documents become separate calls rather than a mask: a mask costs the full square and leaves the fast kernels. torch's
scaled_dot_product_attention does the work, except where it is the slowest kernel of a small model, on a CPU: the
backward, and in BF16 the forward too, are our own there. Blocks of queries meet the keys they see, all heads of a key
head in one product; the backward recomputes the scores and keeps nothing but q, k, v. Measured (benchmarks/kernels):
backward 0.8x torch's time in FP32 and 0.65x in BF16, forward 0.5-0.8x in BF16. In FP32 with several threads torch's
splits better over them and is used, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # queries: their scores against a few hundred keys stay in the L2 cache


class QueryBlock(NamedTuple):
    """Consecutive queries of one document, in some rows, and the keys that they meet.

    Attributes:
        rows: of the batch. queries: their places in q. keys: places in k and v, of which the last one is the position
            of the last query and all belong to the document.
    """

    rows: slice
    queries: slice
    keys: slice


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[QueryBlock], scale: float, window: int,
    sinks: Tensor | None = None,
) -> tuple[Tensor, list[Graph] | None]:  # fmt: skip
    """Return causal attention, and what its backward needs beside q, k, v and that.

    q [rows, t, H, w], k [rows, s, G, w], v [rows, s, G, u] -> [rows, t, H, u]. Without storage (meta tensors) no scores
    are made, as no fused kernel does; torch's own meta form would.

    Args:
        blocks: each query is in one of them.
        window: a query sees at most this many tokens, itself included; 0: all.
        sinks: a logit per head, [H], that takes its share of every softmax and adds nothing to the result. torch has no
            kernel for it, so our loop runs, on a GPU too.
    """
    shape = (*q.shape[:3], v.shape[3])
    if q.is_meta:
        return q.new_empty(shape), None
    # torch has no fused kernel on a CPU for values of another width than keys: its graph would hold all scores.
    alone = torch.get_num_threads() == 1 or q.shape[3] != v.shape[3]
    own_backward = sinks is not None or (q.device.type == "cpu" and (q.dtype == torch.bfloat16 or alone))
    graphs: list[Graph] | None = None if own_backward else []
    own = graphs is None and (sinks is not None or q.dtype == torch.bfloat16 or not _is_whole(blocks))
    out = None if len(blocks) == 1 and not own else q.new_empty(shape)
    for rows, queries, keys in _by_thread(blocks) if own else blocks:
        at, seen = (rows, queries), (rows, keys)
        if own:
            result = _loop_forward(q[at], k[seen], v[seen], scale, window, sinks)
        elif graphs is None:
            result = causal_attention(q[at], k[seen], v[seen], scale, window)
        else:
            graphs.append(Graph())
            result = graphs[-1].attend((q[at], k[seen], v[seen]), scale, window, None if out is None else out[at])
        if out is None:
            return result, graphs
        if not graphs:
            out[at] = result
    assert out is not None
    return out, graphs


def attention_backward(
    gradient: Tensor, inputs: Sequence[Tensor], out: Tensor, graphs: Sequence[Graph] | None,
    blocks: Sequence[QueryBlock], scale: float, window: int, sinks: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of q, k, v, and of the sinks if there are any, from that of the output [rows, t, H, u].

    Blocks that share keys are summed in float32.

    Args:
        inputs: q, k, v. out, graphs: what the forward returned.
    """
    q, k, v = inputs
    dsinks = () if sinks is None else (torch.zeros_like(sinks, dtype=torch.float32),)
    if q.is_meta:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *dsinks
    whole = _is_whole(blocks)
    if graphs is not None and whole and len(blocks) == 1:
        return graphs[0].gradients((q, k, v, out), gradient)
    dq = torch.empty_like(q)
    dk, dv = (torch.empty_like(x) if whole else torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for index, (rows, queries, keys) in enumerate(_by_thread(blocks) if graphs is None else blocks):
        at, seen = (rows, queries), (rows, keys)
        here = (q[at], k[seen], v[seen])
        if graphs is None:
            slopes = _loop_backward(gradient[at], *here, scale, window, sinks)
        else:
            slopes = graphs[index].gradients((*here, out[at]), gradient[at])
        dq[at] = slopes[0]
        if whole:
            dk[seen], dv[seen] = slopes[1:3]
        else:
            dk[seen] += slopes[1]
            dv[seen] += slopes[2]
        for total, slope in zip(dsinks, slopes[3:], strict=True):
            total += slope
    return dq, dk.to(k.dtype), dv.to(v.dtype), *dsinks


def _is_whole(blocks: Sequence[QueryBlock]) -> bool:
    """Return whether the queries are those of whole sequences, so that no two blocks share keys."""
    return all(block.queries == block.keys for block in blocks)


def _by_thread(blocks: Sequence[QueryBlock]) -> list[QueryBlock]:
    """Return the blocks with as many rows at a time as there are threads."""
    step = torch.get_num_threads()
    return [
        block._replace(rows=slice(row, min(row + step, block.rows.stop)))
        for block in blocks for row in range(block.rows.start, block.rows.stop, step)
    ]  # fmt: skip


# --- torch's kernel --------------------------------------------------------------------------------------------------


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Return torch's attention of n documents of one length.

    q [n, s, H, w], k [n, L, G, w], v [n, L, G, u] -> [n, s, H, u]; the last query stands at the position of the last
    key.
    """
    mask = _mask(q.shape[1], k.shape[1], window, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


@lru_cache(maxsize=8)  # one for all layers: torch saves it for the backward of each
def _mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor | None:
    """Return which keys a query may see, [queries, keys]; None if the positions are the same and it sees all."""
    windowed = 0 < window < keys
    if queries == keys and not windowed:
        return None
    if device.type != "cpu" and not windowed:
        # torch knows a fused kernel for this diagonal on a GPU alone. The import loads its compiler: seconds.
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(queries, keys)
    index = torch.arange(keys, device=device)
    distance = index[keys - queries :, None] - index
    return (distance >= 0) & (distance < (window or keys))


class _Entrance(torch.autograd.Function):
    """Where a local graph begins: unlike a leaf, the node does not hold the tensor."""

    @staticmethod
    def forward(ctx: object, token: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[None, None]:
        return None, None  # gradients are taken in front of it


class Graph:
    """The local graph of torch's own backward, without the tensors that are at hand when it runs.

    torch's kernel saves q, k, v, its result and a few statistics. All but the statistics are values of the list of
    operators, which decides whether they are kept or recomputed; so the graph keeps no memory of theirs, only how what
    it saved lies in them, and is handed them for the backward.
    """

    _saved: list[Any]  # a tensor, or (which of q, k, v and result, size, stride, offset)
    _tensors: Sequence[Tensor]

    def attend(self, inputs: Sequence[Tensor], scale: float, window: int, destination: Tensor | None) -> Tensor:
        """Run torch's kernel on q, k, v and return the result [n, s, H, u], in `destination` if there is one."""
        self._saved = []
        token = torch.empty(0, requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            begun: list[Tensor] = [_Entrance.apply(token, x) for x in inputs]  # type: ignore[no-untyped-call]
            self._entrances = [torch.autograd.graph.get_gradient_edge(x) for x in begun]
            result = causal_attention(begun[0], begun[1], begun[2], scale, window)
        self._exit = torch.autograd.graph.get_gradient_edge(result)
        out = result.detach() if destination is None else destination.copy_(result.detach())
        owners = {x.untyped_storage()._cdata: (x, which) for which, x in ((3, result), *enumerate(inputs))}
        for index, saved in enumerate(self._saved):
            x, which = owners.get(saved.untyped_storage()._cdata, (None, 0))
            if x is None or saved.dtype != x.dtype:
                continue
            size, stride, offset = saved.shape, saved.stride(), saved.storage_offset() - x.storage_offset()
            if x is result:  # which is in `out` now, whose rows may lie at another distance
                moved = out.transpose(1, 2)
                if (size, stride[1:]) != (moved.shape, moved.stride()[1:]):
                    continue
                stride = moved.stride()
            self._saved[index] = (which, size, stride, offset)
        return out

    def gradients(self, tensors: Sequence[Tensor], slope: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v from that of the result.

        Args:
            tensors: q, k, v and the result of the forward.
        """
        self._tensors = tensors
        return torch.autograd.grad([self._exit], self._entrances, slope)

    def _pack(self, saved: Tensor) -> int:
        self._saved.append(saved)
        return len(self._saved) - 1

    def _unpack(self, index: int) -> Tensor:
        saved = self._saved[index]
        if isinstance(saved, Tensor):
            return saved
        which, size, stride, offset = saved
        x = self._tensors[which]
        view: Tensor = x.as_strided(size, stride, x.storage_offset() + offset)
        return view


# --- our loop over blocks of queries ---------------------------------------------------------------------------------


def _loop_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: Tensor | None) -> Tensor:
    """Compute n documents of one length: q [n, s, H, w], k [n, L, G, w], v [n, L, G, u] -> [n, s, H, u].

    The queries stand at the last s positions of the keys.
    """
    n, s, heads, _ = q.shape
    groups = k.shape[2]
    values = _by_group(v, groups).squeeze(2)
    keys_t = _by_group(k, groups).squeeze(2).transpose(1, 2).contiguous()
    out = q.new_empty(n * groups, s, heads // groups, v.shape[3])
    for block, seen, p in _probabilities(_by_group(q * scale, groups), keys_t, window, sinks):
        weights = p[..., : seen.stop - seen.start].to(q.dtype)
        out[:, block] = torch.bmm(weights, values[:, seen]).view_as(out[:, block])
    return _by_token(out, n)


def _loop_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v and the sinks of n documents, from gradient [n, s, H, u]."""
    n, groups = len(q), k.shape[2]
    queries, slopes = _by_group(q * scale, groups), _by_group(gradient, groups)  # [n * G, s, H / G, w or u]
    keys, values = _by_group(k, groups).squeeze(2), _by_group(v, groups).squeeze(2)  # [n * G, L, w or u]
    keys_t, values_t = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
    dsinks = q.new_zeros(q.shape[2], dtype=torch.float32)
    for block, seen, p in _probabilities(queries, keys_t, window, sinks):
        slope = slopes[:, block].flatten(1, 2)
        dp = torch.bmm(slope, values_t[:, :, seen]).float()
        if sinks is not None:
            dp = F.pad(dp, (0, 1))  # their value is zero
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, torch.float32)  # what autograd calls
        if sinks is not None:
            dsinks += ds[..., -1].view(n, groups, -1, len(dsinks) // groups).sum((0, 2)).flatten()
            p, ds = p[..., :-1], ds[..., :-1]
        ds = ds.to(q.dtype)
        _add_bmm(dv[:, seen], p.to(q.dtype).transpose(1, 2), slope)
        _add_bmm(dk[:, seen], ds.transpose(1, 2), queries[:, block].flatten(1, 2))
        dq[:, block] = torch.bmm(ds, keys[:, seen]).view_as(dq[:, block])
    gradients = _by_token(dq * scale, n), _by_token(dk[:, :, None], n), _by_token(dv[:, :, None], n)
    return gradients if sinks is None else (*gradients, dsinks)


def _probabilities(
    queries: Tensor, keys_t: Tensor, window: int, sinks: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of queries, the keys that they meet, and the softmax of their scores, float32 [N, block * H / G, L].

    With sinks it is [.., L + 1]: what they take is the last.

    Args:
        queries: scaled, [N, s, H / G, w], at the last s positions of the keys. keys_t: [N, w, positions].
    """
    N, s, per_key_head, _ = queries.shape
    skipped, device = keys_t.shape[2] - s, queries.device
    if sinks is not None:
        logits = sinks.float().view(-1, 1, per_key_head)
        logits = logits.repeat(N // len(logits), 1, 1)
    for start in range(0, s, BLOCK):
        block = slice(start, min(start + BLOCK, s))
        position, last = start + skipped, block.stop + skipped  # of the first query, and behind the last
        first = max(0, position - window + 1) if window else 0
        p = torch.bmm(queries[:, block].flatten(1, 2), keys_t[:, :, first:last]).float()
        masked = first if window else position  # without a window only the last square has hidden keys
        distance = torch.arange(position, last, device=device)[:, None] - torch.arange(masked, last, device=device)
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        bias = torch.zeros(distance.shape, device=device).masked_fill_(hidden, float("-inf"))
        p.view(N, -1, per_key_head, last - first)[..., masked - first :] += bias[:, None]
        if sinks is not None:
            p = torch.cat((p, logits.expand(-1, last - position, -1).reshape(N, -1, 1)), dim=-1)
        p = p.softmax(-1)
        yield block, slice(first, last), p


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Reorder x [n, s, heads, w] -> [n * groups, s, heads / groups, w], contiguous."""
    by_group: Tensor = x.unflatten(2, (groups, -1))
    return by_group.transpose(1, 2).flatten(0, 1).contiguous()


def _by_token(x: Tensor, n: int) -> Tensor:
    """Undo `_by_group`."""
    by_row: Tensor = x.unflatten(0, (n, -1))
    return by_row.transpose(1, 2).flatten(2, 3)


def _add_bmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, inside the product where the dtypes agree."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)
