"""From a layer's normed input to heads: grouped-query and latent attention, whichever strategy asks for which heads.

Both have two steps. `shared` is what concerns no head in particular and is done where tokens are sharded: nothing for
grouped queries, the narrow latents for latent attention, everything up to the norm where a norm spans all heads.
`heads` makes some heads of that: the heads of a piece's peers, or of a tensor-parallel rank. Tensor parallelism gathers
tokens between the two steps; latents are narrower than hidden states, and what is replicated is not done n times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.engine.autograd import autograd_op
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad, suffixed
from megascale_moe.engine.op import Cost, Op
from megascale_moe.engine.value import Keep, Shard, Value
from megascale_moe.kernels.norm import rms_norm, rms_norm_backward
from megascale_moe.kernels.rotary import split_heads, split_heads_backward
from megascale_moe.model.attention import latent_heads
from megascale_moe.strategies.dense import linear, norm
from megascale_moe.strategies.heads import Chosen, spans
from megascale_moe.strategies.layer import Layer, Piece

LATENT_EPS = 1e-6


class Heads(NamedTuple):
    """Rotated queries [T, H, w], rotated keys [T, G, w] and values [T, G, u]."""

    q: Value
    k: Value
    v: Value

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, G and w."""
        return int(self.q.shape[1]), int(self.k.shape[1]), int(self.q.shape[2])


def shared(layer: Layer, x: Value) -> tuple[list[Op], tuple[Value, ...]]:
    """Return the operators that concern all heads, from x [tokens, hidden], and the values that `heads` reads."""
    if layer.spec.attention == "mla":
        return _latents(layer, x)
    if layer.spec.qk_norm != "full":
        return [], (x,)
    chosen = Chosen.everything(layer.model)
    project, qkv = _project(layer, x, chosen, None)
    norm_heads, y = _norm_heads(layer, qkv, chosen, None)
    return [project, norm_heads], (y,)


def heads(
    layer: Layer, inputs: Sequence[Value], chosen: Chosen, piece: Piece | None, again: Op | None = None
) -> tuple[list[Op], Heads]:
    """Return the operators that make some heads of the values that `shared` returned, gathered or not.

    Args:
        piece: in whose names they are. again: as in `dense.linear`.
    """
    result = _declare(layer, inputs[0], chosen, piece)
    if layer.spec.attention == "mla":
        return _expand(layer, inputs, chosen, piece, result), result
    x, ops = inputs[0], []
    if layer.spec.qk_norm != "full":
        project, x = _project(layer, x, chosen, piece, again)
        ops.append(project)
    if layer.spec.qk_norm == "head":
        norm_heads, x = _norm_heads(layer, x, chosen, piece)
        ops.append(norm_heads)
    sizes, interleaved, elements = result.sizes, layer.model.rope_interleaved, result.q.elements + result.k.elements
    rope = Op(
        layer.name("rope", piece), (x, "rope"), result, lambda qkv, rope: split_heads(qkv, rope, sizes, interleaved),
        cost=Cost(3.0 * elements, 2 * elements * x.dtype.itemsize),
    ).input_gradient(
        (x,), (*map(grad, result), "rope"), lambda dq, dk, dv, rope: split_heads_backward(dq, dk, dv, rope, interleaved)
    )  # fmt: skip
    return [*ops, rope], result


def deal(layer: Layer, x: Value, pieces: Sequence[Piece]) -> tuple[Op, list[Value]]:
    """Divide normed heads x [T, queries | keys | values] into the pieces whose peers attend with them."""
    c = layer.model
    chosen = [Chosen.of_piece(piece, c) for piece in pieces]
    indices = [torch.cat([torch.arange(r.start, r.stop) for r in fused_columns(c, each)]) for each in chosen]
    parts = [_fused(layer, "normed", x, *each, Keep.NONE) for each in zip(chosen, pieces, strict=True)]

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.index_select(1, index.to(x.device)) for index in indices)

    def run_backward(*slopes: Tensor) -> Tensor:
        total = slopes[0].new_zeros(len(slopes[0]), int(x.shape[1]))
        for index, slope in zip(indices, slopes, strict=True):
            total.index_add_(1, index.to(slope.device), slope)
        return total

    cost = Cost(memory_bytes=2 * sum(part.nbytes for part in parts))
    op = Op(layer.name("deal_heads"), (x,), tuple(parts), run, cost=cost)
    return op.input_gradient((x,), tuple(map(grad, parts)), run_backward), parts


def _declare(layer: Layer, like: Value, chosen: Chosen, piece: Piece | None) -> Heads:
    """Declare rotated heads for the tokens of `like`.

    They are recomputed by the paper's policy where that takes elementwise operators and messages alone: what is kept
    instead, the projection in front of the norm or the latents, is no larger.
    """
    c = layer.model
    keep = Keep.PAPER if layer.spec.attention == "gqa" and layer.spec.qk_norm == "none" else Keep.NONE

    def value(tensor: str, numbers: tuple[int, ...], width: int) -> Value:
        shard = Shard((tensor,), like.rows, spans(numbers, 1), forward_only=not chosen.alone)
        return layer.value(tensor, (like.shape[0], len(numbers), width), shard, keep, piece=piece)

    k, v = value("k", chosen.keys, c.query_dim), value("v", chosen.keys, c.value_dim)
    return Heads(value("q", chosen.queries, c.query_dim), k, v)


# --- grouped queries -------------------------------------------------------------------------------------------------


def fused_columns(c: ModelConfig, chosen: Chosen) -> tuple[range, ...]:
    """Return where heads lie in the fused projection: its rows, and the columns of what it makes."""
    first_key, first_value = c.heads * c.query_dim, (c.heads + c.key_heads) * c.query_dim
    return (
        *spans(chosen.queries, c.query_dim),
        *spans(chosen.keys, c.query_dim, first_key),
        *spans(chosen.keys, c.value_dim, first_value),
    )


def _fused(layer: Layer, tensor: str, like: Value, chosen: Chosen, piece: Piece | None, keep: Keep) -> Value:
    """Declare heads side by side, [T, queries | keys | values], for the tokens of `like`."""
    columns = fused_columns(layer.model, chosen)
    shard = Shard((tensor,), like.rows, columns, forward_only=not chosen.alone)
    return layer.value(tensor, (like.shape[0], sum(map(len, columns))), shard, keep, piece=piece)


def _project(layer: Layer, x: Value, chosen: Chosen, piece: Piece | None, again: Op | None = None) -> tuple[Op, Value]:
    """Return the fused projection, or those of its rows that make some heads."""
    keep = Keep.NONE if layer.spec.qk_norm == "none" else Keep.PAPER  # a norm's backward reads it
    y = _fused(layer, "qkv", x, chosen, piece, keep)
    rows = [] if chosen.alone else [slice(r.start, r.stop) for r in fused_columns(layer.model, chosen)]
    weight, bias = (layer.name(f"attention.qkv.{which}") for which in ("weight", "bias"))
    bias = bias if layer.spec.attention_bias else ""
    return linear(layer.name("qkv", piece), x, y, weight, rows=rows, again=again, bias=bias), y


def _norm_heads(layer: Layer, x: Value, chosen: Chosen, piece: Piece | None) -> tuple[Op, Value]:
    """Return the RMSNorm of queries and keys, each head on its own or all together; values pass."""
    c, T = layer.model, x.shape[0]
    y = _fused(layer, "normed", x, chosen, piece, Keep.NONE)
    widths = [len(chosen.queries) * c.query_dim, len(chosen.keys) * c.query_dim, len(chosen.keys) * c.value_dim]
    alone = layer.spec.qk_norm == "head"

    def scale(which: str, heads: tuple[int, ...]) -> Value:
        """Declare 1 / rms of each head, or of all."""
        normed = heads if alone else heads[:1]
        shard = Shard((f"normed.{which}",), x.rows, spans(normed, 1))
        return Value(suffixed(y, which), (T, len(normed)), torch.float32, shard=shard, keep=Keep.NONE)

    scales = (scale("q_scale", chosen.queries), scale("k_scale", chosen.keys))
    counts = [int(scale.shape[1]) for scale in scales]

    def by_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys with a row for each norm, and values."""
        q, k, v = x.split(widths, dim=1)
        return q.reshape(len(x) * counts[0], -1), k.reshape(len(x) * counts[1], -1), v

    def run(x: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, ...]:
        q, k, v = by_norm(x)
        (q, q_scale), (k, k_scale) = rms_norm(q, wq, c.norm_eps), rms_norm(k, wk, c.norm_eps)
        q, k, q_scale, k_scale = (part.view(len(x), -1) for part in (q, k, q_scale, k_scale))
        return torch.cat((q, k, v), dim=1), q_scale, k_scale

    def run_backward(
        x: Tensor, q_scale: Tensor, k_scale: Tensor, d: Tensor, wq: Tensor, wk: Tensor, *sinks: Gradient
    ) -> Tensor:
        (q, k, _), (dq, dk, dv) = by_norm(x), by_norm(d)
        dq, dwq = rms_norm_backward(dq, q, wq, q_scale.view(-1, 1), None)
        dk, dwk = rms_norm_backward(dk, k, wk, k_scale.view(-1, 1), None)
        for sink, slope in zip(sinks, (dwq, dwk), strict=True):
            sink.add(slope)
        return torch.cat((dq.view(len(x), -1), dk.view(len(x), -1), dv), dim=1)

    weights, cost = tuple(layer.name(f"attention.{w}_norm.weight") for w in "qk"), Cost(4.0 * x.elements, 2 * x.nbytes)
    op = Op(layer.name("qk_norm", piece), (x,), (y, *scales), run, weights=weights, cost=cost)
    return op.input_gradient(
        (x,), (x, *scales, grad(y)), run_backward, weights=weights, gradients=weights, cost=cost.times(2)
    ), y


# --- latents ---------------------------------------------------------------------------------------------------------


def _latents(layer: Layer, x: Value) -> tuple[list[Op], tuple[Value, ...]]:
    """Return down-projections and norms: queries' latent, keys' and values' latent, the rotary key of all heads."""
    c = layer.model
    ops: list[Op] = []
    low = x
    if c.q_lora_rank:
        down, low = layer.tokens("q_low", c.q_lora_rank), layer.tokens("q_low_norm", c.q_lora_rank, Keep.NONE)
        ops = [
            linear(layer.name("q_down"), x, down, layer.name("attention.q_down.weight")),
            norm(layer.name("q_norm"), down, low, layer.name("attention.q_norm.weight"), LATENT_EPS),
        ]
    both = layer.tokens("kv_low", c.kv_lora_rank + c.qk_rope_head_dim)
    latent = layer.tokens("kv_latent", c.kv_lora_rank, Keep.NONE)
    key = Value(
        layer.name("k_shared"), (latent.shape[0], c.qk_rope_head_dim), latent.dtype, shard=Shard(), keep=Keep.NONE,
        alias=str(both),
    )  # fmt: skip

    def split(kv: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        latent, shared = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return F.rms_norm(latent, (c.kv_lora_rank,), w, LATENT_EPS), shared

    kv_norm = autograd_op(
        layer.name("kv_norm"), split, reads=(both,), differentiable=(both,), writes=(latent, key),
        weights=(layer.name("attention.kv_norm.weight"),), cost=Cost(4.0 * latent.elements, 2 * latent.nbytes),
    )  # fmt: skip
    kv_down = linear(layer.name("kv_down"), x, both, layer.name("attention.kv_down.weight"))
    return [*ops, kv_down, kv_norm], (low, latent, key)


def _expand(layer: Layer, inputs: Sequence[Value], chosen: Chosen, piece: Piece | None, y: Heads) -> list[Op]:
    """Return the operators from the latents to heads: up-projections, rotary embedding."""
    low, latent, key = inputs
    c, T = layer.model, low.shape[0]
    local = replace(c, heads=len(chosen.queries))
    ops: list[Op] = []
    flat: list[Value] = []
    for part, x, width in (("q", low, c.query_dim), ("kv", latent, c.qk_nope_head_dim + c.value_dim)):
        columns = spans(chosen.queries, width)
        shape, shard = (T, width * len(chosen.queries)), Shard((f"{part}_flat",), low.rows, columns)
        flat.append(layer.value(f"{part}_flat", shape, shard, Keep.NONE, piece=piece))
        rows = [] if chosen.alone else [slice(r.start, r.stop) for r in columns]
        weight = layer.name(f"attention.{part}_up.weight")
        ops.append(linear(layer.name(f"{part}_up", piece), x, flat[-1], weight, rows=rows))
    rope = autograd_op(
        layer.name("rope", piece), lambda q, kv, k, rope: latent_heads(q, kv, k, rope, local),
        reads=(*flat, key, "rope"), differentiable=(*flat, key), writes=y, cost=Cost(memory_bytes=4 * y.q.nbytes),
    )  # fmt: skip
    return [*ops, rope]
