"""Context-parallel attention: queries stay with their tokens, keys and values are gathered.

Projections, norms and rotary embedding run on this rank's tokens with all heads. One all-gather over the node, behind
one between nodes where several share a sequence, brings keys and values of whole sequences, and each rank attends with
its own queries to all that these may see; the result lies where it belongs. Grouped-query heads travel once, so any
number of heads fits any number of ranks. With w = G (query width + value width) for G key heads, a rank sends

    bs/n w (n-1)      elements forward, and as many backward, where gradients of keys and values are partial sums that
                      a reduce-scatter brings home: for equal widths (2/m) bsh (n-1)/n

for b sequences of s tokens on n ranks of one node. Latent attention gathers what keys and values are made of: its
latent and the rotary key of all heads, which together are w numbers a token; every rank projects them up.

Tokens are in zig-zag order (`slices.Slices`): a rank holds an early and a late chunk of every sequence, and all ranks
have the same part of the causal square.

What is gathered is n times as large as what the rank itself has of it, and not kept by the recomputation policy "paper"
but gathered again: own keys and values, or latents, are kept instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.engine.op import Cost, Op, Phase
from megascale_moe.engine.value import Keep, Shard, Value
from megascale_moe.kernels.rotary import rotate
from megascale_moe.strategies.attention_core import (
    attended_output,
    cut_apart,
    own_tokens_attention,
    side_by_side,
    whole_sequences,
)
from megascale_moe.strategies.dense import linear
from megascale_moe.strategies.layer import WHOLE_SEQUENCES, Layer
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.projection import Heads, shared
from megascale_moe.strategies.strategy import AttentionStrategy

Rope = tuple[Tensor, Tensor]


class ContextParallel(AttentionStrategy):
    """Each rank the queries of its tokens, against keys and values of whole sequences."""

    name = "cp"
    title = "context-parallel attention"
    zigzag = True

    def rope_axis(self, layout: Layout, model: ModelConfig) -> str:
        """Latent attention rotates the key of all heads where it has been gathered."""
        return "sequence" if model.attention == "mla" else ""

    def ops(self, layer: Layer, x: Value) -> tuple[list[Op], Value]:
        latents = layer.spec.attention == "mla" and layer.layout.sequence.size > 1
        return latent_context_attention(layer, x) if latents else own_tokens_attention(layer, x)


CONTEXT_PARALLEL = ContextParallel()


def latent_context_attention(layer: Layer, x: Value) -> tuple[list[Op], Value]:
    """From the normed input x [tokens, hidden] to the attention's result, [tokens, hidden]; latents are gathered."""
    c = layer.model
    ops, (low, latent, key) = shared(layer, x)
    shape, both = (latent.shape[0], c.kv_lora_rank + c.qk_rope_head_dim), ("kv_latent", "k_shared")
    latents = layer.value("latents", shape, shard=Shard(both, side_by_side=True), keep=Keep.NONE)
    packed = side_by_side(layer.name("pack_latents"), (latent, key), latents)
    gathers, everyone = whole_sequences(layer, latents, "latents")
    rotated, q = _queries_of_latents(layer, low)  # while the message is under way
    made, k, v = _keys_of_latents(layer, everyone)
    attended, y = attended_output(layer, Heads(q, k, v))
    return [*ops, packed, *gathers, *rotated, *made, *attended], y


# --- latents ---------------------------------------------------------------------------------------------------------


def _queries_of_latents(layer: Layer, low: Value) -> tuple[list[Op], Value]:
    """Queries of the own tokens, q [tokens, H, w], from their latent (or the hidden state)."""
    c, T = layer.model, layer.layout.tokens
    flat = layer.value("q_flat", (T, c.heads * c.query_dim), shard=Shard(), keep=Keep.NONE)
    q = layer.value("q", (T, c.heads, c.query_dim), shard=Shard(), keep=Keep.NONE)
    name, cost = layer.name("rope"), Cost(3.0 * T * c.heads * c.qk_rope_head_dim, 2 * q.nbytes)
    widths, own = [c.qk_nope_head_dim, c.qk_rope_head_dim], layer.layout.sequence.index

    def turned(x: Tensor, rope: Rope, direction: int) -> Tensor:
        plain, rotary = x.split(widths, dim=2)
        cos, sin = (layer.slices.take(table, own) for table in rope)
        return torch.cat((plain, rotate(rotary, cos, direction * sin, c.rope_interleaved)), dim=2)

    backward = Op(
        name=name, phase=Phase.B, reads=(q.gradient, "rope"), writes=(flat.gradient,), cost=cost,
        run=lambda d, rope: turned(d, rope, -1).flatten(1),
    )
    rope = Op(
        name=name, reads=(flat, "rope"), writes=(q,), cost=cost, backward=(backward,),
        run=lambda x, rope: turned(x.unflatten(1, (c.heads, -1)), rope, 1),
    )
    return [linear(layer.name("q_up"), low, flat, layer.name("attention.q_up.weight")), rope], q


def _keys_of_latents(layer: Layer, latents: Value) -> tuple[list[Op], Value, Value]:
    """Keys [S, H, w] and values [S, H, u] of whole sequences, S tokens, from the latents of all ranks."""
    c, S = layer.model, latents.shape[0]
    latent, key = (
        layer.value(f"{tensor}_ag", (S, width), shard=_partial(tensor), keep=Keep.NONE, alias=latents)
        for tensor, width in (("kv_latent", c.kv_lora_rank), ("k_shared", c.qk_rope_head_dim))
    )  # fmt: skip
    flat, k, v = (
        layer.value(tensor, (S, *shape), shard=_partial(tensor), keep=Keep.NONE)
        for tensor, shape in (
            ("kv_flat", (c.heads * (c.qk_nope_head_dim + c.value_dim),)), ("k", (c.heads, c.query_dim)),
            ("v", (c.heads, c.value_dim)),
        )
    )  # fmt: skip
    up = linear(layer.name("kv_up"), latent, flat, layer.name("attention.kv_up.weight"))
    split = cut_apart(layer.name("split_latents"), latents, (latent, key))
    return [split, up, _join_keys(layer, (flat, key), (k, v))], k, v


def _partial(tensor: str) -> Shard:
    """Return the shard of a tensor of whole sequences, whose gradient is the share of this rank's queries."""
    return Shard((tensor,), WHOLE_SEQUENCES, partial_gradient="sequence")


def _join_keys(layer: Layer, given: tuple[Value, Value], found: tuple[Value, Value]) -> Op:
    """Keys and values from the projection of the latent and the key of all heads, which is rotated here."""
    (flat, key), (k, v), c = given, found, layer.model
    name, cost = layer.name("join_keys"), Cost(3.0 * key.elements, 2 * (k.nbytes + v.nbytes))

    def run(flat: Tensor, key: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        plain, v = flat.unflatten(1, (c.heads, -1)).split([c.qk_nope_head_dim, c.value_dim], dim=2)
        rotary = rotate(key[:, None], *rope, c.rope_interleaved).expand(-1, c.heads, -1)
        return torch.cat((plain, rotary), dim=2), v.contiguous()

    def run_backward(dk: Tensor, dv: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        plain, rotary = dk.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=2)
        slope = rotate(rotary.sum(1, keepdim=True), rope[0], -rope[1], c.rope_interleaved)
        return torch.cat((plain, dv), dim=2).flatten(1), slope.squeeze(1)

    backward = Op(
        name=name, phase=Phase.B, reads=(k.gradient, v.gradient, "rope"), writes=(flat.gradient, key.gradient),
        run=run_backward, cost=cost,
    )
    return Op(name=name, reads=(flat, key, "rope"), writes=(k, v), run=run, cost=cost, backward=(backward,))
