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
from megascale_moe.engine.op import Cost, Op, Phase
from megascale_moe.engine.value import Keep, Rows, Shard, Value
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
    c = layer.model
    project, qkv = _project(layer, x, Chosen.everything(c), None)
    normed, y = _norm_heads(layer, qkv, Chosen.everything(c), None)
    return [project, normed], (y,)


def heads(
    layer: Layer, inputs: Sequence[Value], chosen: Chosen, piece: Piece | None, again: Op | None = None
) -> tuple[list[Op], Heads]:
    """Return the operators that make some heads of the values that `shared` returned, gathered or not.

    Args:
        piece: in whose names they are. again: as in `dense.linear`.
    """
    if layer.spec.attention == "mla":
        return _expand(layer, inputs, chosen, piece)
    if layer.spec.qk_norm == "full":
        (x,) = inputs
        ops: list[Op] = []
    else:
        project, x = _project(layer, inputs[0], chosen, piece, again)
        ops = [project]
        if layer.spec.qk_norm == "head":
            normed, x = _norm_heads(layer, x, chosen, piece)
            ops.append(normed)
    found = _declare(layer, x.shape[0], inputs[0], chosen, piece)
    return [*ops, _rotate(layer, x, found, piece)], found


def deal(layer: Layer, x: Value, pieces: Sequence[Piece]) -> tuple[Op, list[Value]]:
    """Normed heads x [T, queries | keys | values] to the pieces whose peers attend with them; some keys to several."""
    c = layer.model
    chosen = [Chosen.of_piece(piece, c) for piece in pieces]
    indices = [torch.cat([torch.arange(r.start, r.stop) for r in fused_columns(c, each)]) for each in chosen]
    parts = [
        _fused(layer, "normed", x.shape[0], x, each, piece, Keep.NONE)
        for each, piece in zip(chosen, pieces, strict=True)
    ]

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.index_select(1, index.to(x.device)) for index in indices)

    def run_backward(*slopes: Tensor) -> Tensor:
        total = slopes[0].new_zeros(len(slopes[0]), int(x.shape[1]))
        for index, slope in zip(indices, slopes, strict=True):
            total.index_add_(1, index.to(slope.device), slope)
        return total

    name, cost = layer.name("deal_heads"), Cost(memory_bytes=2 * sum(part.nbytes for part in parts))
    backward = Op(
        name=name, phase=Phase.B, reads=tuple(map(grad, parts)), writes=(x.gradient,), run=run_backward, cost=cost
    )
    return Op(name=name, reads=(x,), writes=tuple(parts), run=run, cost=cost, backward=(backward,)), parts


# --- grouped queries -------------------------------------------------------------------------------------------------


def fused_columns(c: ModelConfig, chosen: Chosen) -> tuple[range, ...]:
    """Return where heads lie in the fused projection: its rows, and the columns of what it makes."""
    first_key, first_value = c.heads * c.query_dim, (c.heads + c.kv_heads) * c.query_dim
    return (
        *spans(chosen.queries, c.query_dim),
        *spans(chosen.keys, c.query_dim, first_key),
        *spans(chosen.keys, c.value_dim, first_value),
    )


def _fused(
    layer: Layer, tensor: str, rows: float, like: Value, chosen: Chosen, piece: Piece | None, keep: Keep
) -> Value:
    """Declare heads side by side, [T, queries | keys | values], for the tokens of `like`."""
    found = fused_columns(layer.model, chosen)
    assert like.shard is not None
    shard = Shard((tensor,), like.shard.rows, columns=found, forward_only=not chosen.alone)
    return layer.value(tensor, (rows, sum(map(len, found))), piece=piece, shard=shard, keep=keep)


def _project(
    layer: Layer, x: Value, chosen: Chosen, piece: Piece | None, again: Op | None = None
) -> tuple[Op, Value]:
    """The fused projection, or those of its rows that make some heads."""
    keep = Keep.NONE if layer.spec.qk_norm == "none" else Keep.PAPER  # a norm's backward reads it
    y = _fused(layer, "qkv", x.shape[0], x, chosen, piece, keep)
    rows = [] if chosen.alone else [slice(r.start, r.stop) for r in fused_columns(layer.model, chosen)]
    weight, bias = (layer.name(f"attention.qkv.{which}") for which in ("weight", "bias"))
    if not layer.spec.attention_bias:
        bias = ""
    return linear(layer.name("qkv", piece), x, y, weight, rows=rows, again=again, bias=bias), y


def _norm_heads(layer: Layer, x: Value, chosen: Chosen, piece: Piece | None) -> tuple[Op, Value]:
    """RMSNorm of queries and keys, each head on its own or all together; values pass."""
    c, T = layer.model, x.shape[0]
    y = _fused(layer, "normed", T, x, chosen, piece, Keep.NONE)
    widths = [len(chosen.queries) * c.query_dim, len(chosen.keys) * c.query_dim, len(chosen.keys) * c.value_dim]
    counts = [len(chosen.queries), len(chosen.keys)] if layer.spec.qk_norm == "head" else [1, 1]
    assert x.shard is not None
    lies = x.shard.rows
    scales = tuple(
        Value(
            suffixed(y, f"{which}_scale"), (T, count), torch.float32, keep=Keep.NONE,
            shard=Shard((f"normed.{which}_scale",), lies, columns=spans(numbers[:count], 1)),
        )
        for which, count, numbers in zip(
            ("q", "k"), counts, (chosen.queries, chosen.keys), strict=True
        )
    )  # fmt: skip

    def rows(x: Tensor, count: int) -> Tensor:
        return x.reshape(x.shape[0] * count, -1)

    def run(x: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, ...]:
        q, k, v = x.split(widths, dim=1)
        (q, q_scale), (k, k_scale) = (
            _norm_rows(rows(part, count), w, c.norm_eps, count)
            for part, count, w in zip((q, k), counts, (wq, wk), strict=True)
        )
        return torch.cat((q.view(len(x), -1), k.view(len(x), -1), v), dim=1), q_scale, k_scale

    def run_backward(
        x: Tensor, q_scale: Tensor, k_scale: Tensor, d: Tensor, wq: Tensor, wk: Tensor, *sinks: Gradient
    ) -> Tensor:
        found = []
        (q, k, _), (dq, dk, dv) = x.split(widths, dim=1), d.split(widths, dim=1)
        for part, slope, scale, count, w, sink in zip(
            (q, k), (dq, dk), (q_scale, k_scale), counts, (wq, wk), sinks, strict=True
        ):
            dx, dw = rms_norm_backward(rows(slope, count), rows(part, count), w, scale.view(-1, 1), None)
            sink.add(dw)
            found.append(dx.view(len(x), -1))
        return torch.cat((*found, dv), dim=1)

    name, weights = layer.name("qk_norm", piece), tuple(layer.name(f"attention.{w}_norm.weight") for w in ("q", "k"))
    cost = Cost(4.0 * x.elements, 2 * x.nbytes)
    backward = Op(
        name=name, phase=Phase.B, reads=(x, *scales, grad(y)), writes=(x.gradient,), weights=weights,
        gradients=weights, run=run_backward, cost=Cost(2 * cost.flops, 2 * cost.memory_bytes),
    )
    return Op(
        name=name, reads=(x,), writes=(y, *scales), weights=weights, run=run, cost=cost, backward=(backward,)
    ), y


def _norm_rows(x: Tensor, weight: Tensor, eps: float, count: int) -> tuple[Tensor, Tensor]:
    """RMSNorm of x [T * count, w], and 1 / rms [T, count]."""
    y, scale = rms_norm(x, weight, eps)
    return y, scale.view(-1, count)


def _declare(layer: Layer, rows: float, like: Value, chosen: Chosen, piece: Piece | None) -> Heads:
    """Declare rotated heads for the tokens of `like`.

    They are recomputed by the paper's policy where that takes elementwise operators and messages alone: what is kept
    instead, the projection in front of the norm or the latents, is no larger.
    """
    c = layer.model
    assert like.shard is not None
    keep = Keep.PAPER if layer.spec.attention == "gqa" and layer.spec.qk_norm == "none" else Keep.NONE

    def value(tensor: str, numbers: tuple[int, ...], width: int) -> Value:
        lies = like.shard.rows if like.shard else Rows()
        shard = Shard((tensor,), lies, columns=spans(numbers, 1), forward_only=not chosen.alone)
        return layer.value(tensor, (rows, len(numbers), width), piece=piece, shard=shard, keep=keep)

    return Heads(
        value("q", chosen.queries, c.query_dim), value("k", chosen.keys, c.query_dim),
        value("v", chosen.keys, c.value_dim),
    )  # fmt: skip


def _rotate(layer: Layer, x: Value, found: Heads, piece: Piece | None) -> Op:
    """Rotary embedding, and the projection cut into heads."""
    sizes, interleaved = found.sizes, layer.model.rope_interleaved
    name = layer.name("rope", piece)
    elements = found.q.elements + found.k.elements
    cost = Cost(3.0 * elements, 2 * elements * x.dtype.itemsize)
    backward = Op(
        name=name, phase=Phase.B, reads=(*map(grad, found), "rope"), writes=(x.gradient,), cost=cost,
        run=lambda dq, dk, dv, rope: split_heads_backward(dq, dk, dv, rope, interleaved),
    )
    return Op(
        name=name, reads=(x, "rope"), writes=found, cost=cost, backward=(backward,),
        run=lambda qkv, rope: split_heads(qkv, rope, sizes, interleaved),
    )


# --- latents ---------------------------------------------------------------------------------------------------------


def _latents(layer: Layer, x: Value) -> tuple[list[Op], tuple[Value, ...]]:
    """Down-projections and their norms: queries' latent, keys' and values' latent, the rotary key of all heads."""
    c = layer.model
    ops: list[Op] = []
    low = x
    if c.q_lora_rank:
        down, low = layer.tokens("q_low", c.q_lora_rank), layer.tokens("q_low_norm", c.q_lora_rank, keep=Keep.NONE)
        ops = [
            linear(layer.name("q_down"), x, down, layer.name("attention.q_down.weight")),
            norm(layer.name("q_norm"), down, low, layer.name("attention.q_norm.weight"), LATENT_EPS),
        ]
    both = layer.tokens("kv_low", c.kv_lora_rank + c.qk_rope_head_dim)
    latent = layer.tokens("kv_latent", c.kv_lora_rank, keep=Keep.NONE)
    key = Value(
        layer.name("k_shared"), (latent.shape[0], c.qk_rope_head_dim), latent.dtype, shard=Shard(), keep=Keep.NONE,
        alias=str(both),
    )

    def split(kv: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        latent, shared = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return F.rms_norm(latent, (c.kv_lora_rank,), w, LATENT_EPS), shared

    ops += [
        linear(layer.name("kv_down"), x, both, layer.name("attention.kv_down.weight")),
        autograd_op(
            layer.name("kv_norm"), split, reads=(both,), differentiable=(both,), writes=(latent, key),
            weights=(layer.name("attention.kv_norm.weight"),), cost=Cost(4.0 * latent.elements, 2 * latent.nbytes),
        ),
    ]
    return ops, (low, latent, key)


def _expand(
    layer: Layer, inputs: Sequence[Value], chosen: Chosen, piece: Piece | None
) -> tuple[list[Op], Heads]:
    """From the latents to heads: up-projections, rotary embedding."""
    low, latent, key = inputs
    c, T = layer.model, low.shape[0]
    assert low.shard is not None
    rows = low.shard.rows
    local = replace(c, heads=len(chosen.queries))
    ops: list[Op] = []
    flat: list[Value] = []
    for tensor, weight, x, width in (
        ("q_flat", "q_up", low, c.query_dim), ("kv_flat", "kv_up", latent, c.qk_nope_head_dim + c.value_dim)
    ):  # fmt: skip
        found = spans(chosen.queries, width)
        shard = Shard((tensor,), rows, columns=found)
        y = layer.value(tensor, (T, width * len(chosen.queries)), piece=piece, shard=shard, keep=Keep.NONE)
        cut = [] if chosen.alone else [slice(r.start, r.stop) for r in found]
        ops.append(linear(layer.name(weight, piece), x, y, layer.name(f"attention.{weight}.weight"), rows=cut))
        flat.append(y)
    found_heads = _declare(layer, T, low, chosen, piece)
    ops.append(
        autograd_op(
            layer.name("rope", piece), lambda q, kv, k, rope: latent_heads(q, kv, k, rope, local),
            reads=(*flat, key, "rope"), differentiable=(*flat, key), writes=found_heads,
            cost=Cost(0.0, 4 * found_heads.q.nbytes),
        )
    )  # fmt: skip
    return ops, found_heads
