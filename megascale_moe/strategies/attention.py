"""Attention, sequence-parallel (Ulysses) or tensor-parallel (paper, section 3.1).

    sp    projections, norms and rotary embedding run on this rank's slice of the sequence with all heads; an
          all-to-all turns that into all tokens of its share of the heads, attention runs there, and a second
          all-to-all turns back: (2 + 2/m) bsh (n-1)/n^2 elements travel per rank
    tp    all tokens are gathered, attention with this rank's share of the heads is the same list with fewer heads,
          and the partial outputs are summed where the tokens belong: 2 bsh (n-1)/n. The gathered tokens are not
          kept but gathered again in backward, behind the input gradient (as Megatron-LM does)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale_moe.comm.collectives import tag_of
from megascale_moe.comm.traffic import Traffic
from megascale_moe.config import ModelConfig
from megascale_moe.engine.autograd import autograd_op
from megascale_moe.engine.op import Cost, Op, Phase, Work, grad
from megascale_moe.kernels.attention import Graph, Spans, causal_attention_backward, causal_attention_forward
from megascale_moe.kernels.rotary import split_heads, split_heads_backward
from megascale_moe.model.attention import latent_heads
from megascale_moe.model.counts import attention_flops_per_token
from megascale_moe.model.rotary import softmax_scale
from megascale_moe.model.segments import Segments
from megascale_moe.strategies.collective import communication, gather_tokens, scatter_sums, with_backward
from megascale_moe.strategies.dense import linear, norm
from megascale_moe.strategies.heads import head_norm, heads_of_rank
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.split_attention import can_split_attention, split_output, split_projection


def attention_ops(prefix: str, config: ModelConfig, layout: Layout) -> list[Op]:
    """From `prefix`ln1_out to `prefix`attn_out, both [tokens, hidden]; reads "rope" and "segments"."""
    p, c = prefix, config
    if layout.attention == "tp" and layout.node.size > 1:
        return _tensor_parallel(p, c, layout)
    gathered = (f"{p}q_a2a", f"{p}k_a2a", f"{p}v_a2a")
    if layout.pieces > 1 and can_split_attention(c, layout):
        core = _core(f"{p}attention", gathered, f"{p}attn", c, layout)
        return [*split_projection(p, c, layout), core, *split_output(p, c, layout)]
    ops = _latent_head_ops(p, c, layout, layout) if c.attention == "mla" else _head_ops(p, c, layout)
    heads, result = (f"{p}q", f"{p}k", f"{p}v"), f"{p}attn"
    if layout.node.size > 1:
        ops.append(_scatter_heads(f"{p}scatter_heads", heads, gathered, c, layout))
        ops.append(_core(f"{p}attention", gathered, f"{p}attn", c, layout))
        ops.append(_gather_heads(f"{p}gather_heads", f"{p}attn", f"{p}attn_a2a", c, layout))
        result = f"{p}attn_a2a"
    else:
        ops.append(_core(f"{p}attention", heads, f"{p}attn", c, layout))
    sizes = (c.heads * c.value_dim, c.hidden)
    ops.append(linear(f"{p}out", result, f"{p}attn_out", f"{p}attention.out.weight", sizes, layout))
    return ops


def _tensor_parallel(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    """The list of one rank with a share of the heads, between an all-gather and a reduce-scatter."""
    local, whole = local_heads(c, layout.node.size), layout.whole
    if c.attention == "mla":
        ops = _latent_head_ops(p, local, layout, whole)
    else:
        gather = gather_tokens(
            f"{p}gather_tokens", f"{p}ln1_out", f"{p}ln1_out_ag", c.hidden, layout.node, layout, rows=True
        )
        again = replace(gather, phase=Phase.R, writes=(f"{p}ln1_out_again",), backward=())
        ops = [gather, *_head_ops(p, local, whole, f"{p}ln1_out_ag", again)]
    sizes = (local.heads * c.value_dim, c.hidden)
    return [
        *ops,
        _core(f"{p}attention", (f"{p}q", f"{p}k", f"{p}v"), f"{p}attn", local, whole),
        linear(f"{p}out", f"{p}attn", f"{p}attn_partial", f"{p}attention.out.weight", sizes, whole),
        scatter_sums(
            f"{p}scatter_tokens", f"{p}attn_partial", f"{p}attn_out", c.hidden, layout.node, layout, rows=True
        ),
    ]


def local_heads(c: ModelConfig, parts: int) -> ModelConfig:
    """The same attention with 1 / parts of the heads."""
    head_dim = c.head_dim if c.attention == "mla" else c.query_dim
    kv_heads = c.kv_heads if c.attention == "mla" else c.kv_heads // parts
    return replace(c, head_dim=head_dim, heads=c.heads // parts, kv_heads=kv_heads)


def _head_ops(p: str, c: ModelConfig, layout: Layout, x: str = "", again: Op | None = None) -> list[Op]:
    width = (c.heads + c.kv_heads) * c.query_dim + c.kv_heads * c.value_dim
    qkv = linear(f"{p}qkv", x or f"{p}ln1_out", f"{p}qkv", f"{p}attention.qkv.weight", (c.hidden, width), layout, again)
    return [qkv, _rope(p, c, layout) if c.qk_norm == "none" else _norm_rope(p, c, layout)]


def _rope(p: str, c: ModelConfig, layout: Layout) -> Op:
    sizes = (c.heads, c.kv_heads, c.query_dim)

    def run(qkv: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(qkv, rope, sizes, c.rope_interleaved)

    def run_backward(dq: Tensor, dk: Tensor, dv: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return split_heads_backward(dq, dk, dv, rope, c.rope_interleaved)

    heads = (f"{p}q", f"{p}k", f"{p}v")
    elements = layout.tokens * (c.heads + c.kv_heads) * c.query_dim
    cost = Cost(3.0 * elements, layout.bytes(2 * elements))
    backward = Op(
        name=f"{p}rope", phase=Phase.B, reads=(*map(grad, heads), "rope"), writes=(grad(f"{p}qkv"),),
        run=run_backward, cost=cost,
    )
    return Op(name=f"{p}rope", reads=(f"{p}qkv", "rope"), writes=heads, run=run, cost=cost, backward=(backward,))


def _norm_rope(p: str, c: ModelConfig, layout: Layout) -> Op:
    elements = layout.tokens * (c.heads + c.kv_heads) * c.query_dim
    return autograd_op(
        f"{p}rope", lambda qkv, rope, wq, wk: head_norm(qkv, rope, wq, wk, c), reads=(f"{p}qkv", "rope"),
        differentiable=(f"{p}qkv",), writes=(f"{p}q", f"{p}k", f"{p}v"),
        weights=(f"{p}attention.q_norm.weight", f"{p}attention.k_norm.weight"),
        cost=Cost(7.0 * elements, layout.bytes(2 * elements)),
    )


def _latent_head_ops(p: str, c: ModelConfig, layout: Layout, heads: Layout) -> list[Op]:
    """Down-projections where tokens are sharded; from there on as `heads` says.

    Tensor parallelism gathers behind the down-projections: the latents are narrower than hidden states, and the
    replicated projections are not done n times.
    """
    a, x = f"{p}attention.", f"{p}ln1_out"
    ops: list[Op] = []
    if c.q_lora_rank:
        ops = [
            linear(f"{p}q_down", x, f"{p}q_low", f"{a}q_down.weight", (c.hidden, c.q_lora_rank), layout),
            norm(f"{p}q_norm", f"{p}q_low", f"{p}q_low_norm", f"{a}q_norm.weight", 1e-6, layout, width=c.q_lora_rank),
        ]
    ops += [
        linear(f"{p}kv_down", x, f"{p}kv_low", f"{a}kv_down.weight",
               (c.hidden, c.kv_lora_rank + c.qk_rope_head_dim), layout),
        autograd_op(
            f"{p}kv_norm", lambda kv, w: _latent(kv, w, c), reads=(f"{p}kv_low",), differentiable=(f"{p}kv_low",),
            writes=(f"{p}kv_latent", f"{p}k_shared"), weights=(f"{a}kv_norm.weight",),
            cost=Cost(4.0 * layout.tokens * c.kv_lora_rank, layout.bytes(2 * layout.tokens * c.kv_lora_rank)),
        ),
    ]
    low, rank = (f"{p}q_low_norm", c.q_lora_rank) if c.q_lora_rank else (x, c.hidden)
    names = {low: rank, f"{p}kv_latent": c.kv_lora_rank, f"{p}k_shared": c.qk_rope_head_dim}
    if heads is not layout:
        ops += [
            gather_tokens(f"{p}gather_{name.removeprefix(p)}", name, f"{name}_ag", size, layout.node, layout, rows=True)
            for name, size in names.items()
        ]
        names = {f"{name}_ag": width for name, width in names.items()}
    return ops + _up_projections(p, tuple(names), rank, c, heads)


def _up_projections(p: str, names: tuple[str, ...], rank: int, c: ModelConfig, layout: Layout) -> list[Op]:
    """From the latents (queries', keys' and values', the shared rotary key) to heads."""
    a = f"{p}attention."
    low, latent, shared = names
    sizes_kv = (c.kv_lora_rank, c.heads * (c.qk_nope_head_dim + c.value_dim))
    return [
        linear(f"{p}q_up", low, f"{p}q_flat", f"{a}q_up.weight", (rank, c.heads * c.query_dim), layout),
        linear(f"{p}kv_up", latent, f"{p}kv_flat", f"{a}kv_up.weight", sizes_kv, layout),
        autograd_op(
            f"{p}rope", lambda q, kv, k, rope: latent_heads(q, kv, k, rope, c),
            reads=(f"{p}q_flat", f"{p}kv_flat", shared, "rope"), differentiable=(f"{p}q_flat", f"{p}kv_flat", shared),
            writes=(f"{p}q", f"{p}k", f"{p}v"),
            cost=Cost(0.0, layout.bytes(4 * layout.tokens * c.heads * c.query_dim)),
        ),
    ]


def _latent(kv: Tensor, weight: Tensor, c: ModelConfig) -> tuple[Tensor, Tensor]:
    latent, shared = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
    return F.rms_norm(latent, (c.kv_lora_rank,), weight, 1e-6), shared


def _core(name: str, heads: tuple[str, str, str], y: str, c: ModelConfig, layout: Layout) -> Op:
    """Attention proper."""
    scale, rows, length, kept = softmax_scale(c), layout.rows, layout.length, f"{name}.graph"

    def by_row(x: Tensor) -> Tensor:
        return x.reshape(rows, length, -1, x.shape[-1])

    def spans(segments: Segments) -> Spans:
        return () if segments.is_whole_rows else segments.spans

    def run(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Graph | None]:
        heads = (by_row(q), by_row(k), by_row(v))
        out, graph = causal_attention_forward(*heads, spans(segments), scale, c.sliding_window)
        return out.reshape(rows * length, -1), graph

    def run_backward(
        q: Tensor, k: Tensor, v: Tensor, segments: Segments, graph: Graph | None, d: Tensor
    ) -> tuple[Tensor, ...]:
        gradient = d.view(rows, length, -1, c.value_dim)
        parts = causal_attention_backward(
            gradient, by_row(q), by_row(k), by_row(v), graph, spans(segments), scale, c.sliding_window
        )
        return tuple(part.flatten(0, 1) for part in parts)

    n, T = layout.node.size, rows * length
    key_heads = len(heads_of_rank(0, n, c)[1])
    elements = T * (c.heads // n * (c.query_dim + c.value_dim) + key_heads * (c.query_dim + c.value_dim))
    flops = T * attention_flops_per_token(c) / n
    cost = Cost(flops, layout.bytes(elements), work=Work.ATTENTION, size=length)
    backward = Op(
        name=name, phase=Phase.B, reads=(*heads, "segments", kept, grad(y)), writes=tuple(map(grad, heads)),
        run=run_backward,
        cost=replace(cost, flops=2.5 * cost.flops, memory_bytes=2 * cost.memory_bytes),
    )
    return Op(name=name, reads=(*heads, "segments"), writes=(y, kept), run=run, cost=cost, backward=(backward,))


def _select(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of x [T, heads, w], flattened to [T, len(heads) * w]."""
    part = x[:, heads.start : heads.stop] if isinstance(heads, range) else x[:, list(heads)]
    return part.reshape(x.shape[0], -1)


def _scatter_heads(name: str, heads: tuple[str, str, str], gathered: tuple[str, str, str], c: ModelConfig,
                   layout: Layout) -> Op:
    """All heads of a slice of the sequence -> a share of the heads of the whole sequence."""
    n, T = layout.node.size, layout.tokens
    shares = [heads_of_rank(rank, n, c) for rank in range(n)]
    of_rank = [[len(mine) * c.query_dim, len(keys) * c.query_dim, len(keys) * c.value_dim] for mine, keys in shares]
    widths, widest = of_rank[layout.node.index], (T, max(map(sum, of_rank)))
    sizes = len(shares[layout.node.index][0]), len(shares[layout.node.index][1])

    def pack(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [torch.cat((_select(q, qh), _select(k, kh), _select(v, kh)), dim=1) for qh, kh in shares]

    def finish(whole: Tensor, _: object) -> tuple[Tensor, ...]:
        q, k, v = _whole_rows(whole, sum(widths), layout).split(widths, dim=-1)
        return q.unflatten(1, (sizes[0], -1)), k.unflatten(1, (sizes[1], -1)), v.unflatten(1, (sizes[1], -1))

    def pack_back(dq: Tensor, dk: Tensor, dv: Tensor) -> Sequence[Tensor]:
        return _slices(torch.cat((dq.flatten(1), dk.flatten(1), dv.flatten(1)), dim=1), layout)

    there = Traffic(
        axis=layout.node, tag=tag_of(name), pack=pack, shapes=lambda: [(T, sum(widths))] * n, finish=finish,
        typical=widest, dtype=layout.dtype,
    )  # fmt: skip
    back = Traffic(
        axis=layout.node, tag=tag_of(name + " B"), pack=pack_back, dtype=layout.dtype, typical=widest,
        shapes=lambda: [(T, sum(width)) for width in of_rank], finish=lambda _, parts: _sum_heads(parts, shares, c),
    )  # fmt: skip
    elements = T * sum(widths) * (n - 1)
    slopes = tuple(map(grad, gathered))
    return with_backward(
        communication(name, Phase.F, heads, gathered, there, elements, layout),
        communication(name, Phase.B, slopes, tuple(map(grad, heads)), back, elements, layout),
    )


def _sum_heads(parts: list[Tensor], shares: Sequence[tuple[range, Sequence[int]]], c: ModelConfig) -> Any:
    """Gradients of q, k, v from every rank's share; key heads that went to several ranks sum up."""
    T = parts[0].shape[0]
    dq = parts[0].new_empty(T, c.heads, c.query_dim)
    dk = parts[0].new_zeros(T, c.key_heads, c.query_dim)
    dv = parts[0].new_zeros(T, c.key_heads, c.value_dim)
    for part, (mine, keys) in zip(parts, shares, strict=True):
        widths = [len(mine) * c.query_dim, len(keys) * c.query_dim, len(keys) * c.value_dim]
        q, k, v = part.split(widths, dim=1)
        dq[:, mine.start : mine.stop] = q.unflatten(1, (len(mine), -1))
        index = torch.tensor(list(keys), device=part.device)
        dk.index_add_(1, index, k.unflatten(1, (len(keys), -1)))
        dv.index_add_(1, index, v.unflatten(1, (len(keys), -1)))
    return dq, dk, dv


def _gather_heads(name: str, x: str, y: str, c: ModelConfig, layout: Layout) -> Op:
    """A share of the heads of the whole sequence -> all heads of a slice; the dual of `_scatter_heads`."""
    n, T, width = layout.node.size, layout.tokens, c.heads * c.value_dim // layout.node.size
    shape = (T, width)
    there = Traffic(
        axis=layout.node, tag=tag_of(name), pack=lambda x: _slices(x, layout), shapes=lambda: [shape] * n,
        finish=lambda _, parts: torch.cat(parts, dim=1), typical=shape, dtype=layout.dtype,
    )  # fmt: skip
    back = Traffic(
        axis=layout.node, tag=tag_of(name + " B"), pack=lambda d: [part.contiguous() for part in d.chunk(n, dim=1)],
        shapes=lambda: [shape] * n, finish=lambda whole, _: _whole_rows(whole, width, layout), typical=shape,
        dtype=layout.dtype,
    )  # fmt: skip
    elements = T * width * (n - 1)
    return with_backward(
        communication(name, Phase.F, (x,), (y,), there, elements, layout),
        communication(name, Phase.B, (grad(y),), (grad(x),), back, elements, layout),
    )


def _whole_rows(whole: Tensor, width: int, layout: Layout) -> Tensor:
    """[rows * s/n, width] of every rank one behind the other -> [rows * s, width], the slices put together in order."""
    by_rank: Tensor = whole.view(layout.node.size, layout.rows, -1, width)
    return by_rank.transpose(0, 1).reshape(-1, width)


def _slices(x: Tensor, layout: Layout) -> Sequence[Tensor]:
    """x [rows * s, width] -> for each rank its slice of every row, [rows * s/n, width]."""
    by_rank: Tensor = x.unflatten(0, (layout.rows, layout.node.size, -1)).transpose(0, 1).contiguous()
    return by_rank.flatten(1, 2).unbind()
