"""Context-parallel attention: queries stay with their tokens, keys and values are gathered.

Projections, norms and rotary embedding run on this rank's tokens with all heads. One all-gather over the node brings
keys and values of whole sequences, and each rank attends with its own queries to all that these may see; the result
lies where it belongs. Grouped-query heads travel once, so any number of heads fits any number of ranks. With
w = G (query width + value width) for G key heads, a rank sends

    bs/n w (n-1)      elements forward, and as many backward, where gradients of keys and values are partial sums that
                      a reduce-scatter brings home: for equal widths (2/m) bsh (n-1)/n

for b sequences of s tokens on n ranks. Latent attention gathers what keys and values are made of, its latent and the
rotary key of all heads, which together are w numbers a token; every rank projects them up.

Tokens are in zig-zag order (`slices.Slices`): a rank holds an early and a late chunk of every sequence, and all ranks
have the same part of the causal square.

What is gathered is n times as large as what the rank itself has of it, and not kept by the recomputation policy "paper"
but gathered again: own keys and values, or latents, are kept instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig
from megascale_moe.engine.op import Cost, Op, Phase
from megascale_moe.engine.value import Keep, Shard, Value
from megascale_moe.kernels.rotary import rotate
from megascale_moe.strategies.attention_core import core
from megascale_moe.strategies.attention_sp import sequence_parallel_attention
from megascale_moe.strategies.collective import gather_tokens
from megascale_moe.strategies.dense import linear
from megascale_moe.strategies.heads import Chosen, pack, unpack_keys
from megascale_moe.strategies.layer import SEQUENCES, Layer, pieces_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.projection import Heads, heads, shared
from megascale_moe.strategies.refusals import divides
from megascale_moe.strategies.strategy import AttentionStrategy

Rope = tuple[Tensor, Tensor]


class ContextParallel(AttentionStrategy):
    """Each rank the queries of its tokens, against keys and values of whole sequences."""

    name = "cp"
    title = "context-parallel attention"
    zigzag = True

    def check(self, mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> None:
        if mesh.node > 1:
            divides("model.sequence_length", model.sequence_length, "2 x parallel.node", 2 * mesh.node)

    def rotates_sequences(self, layout: Layout, model: ModelConfig) -> bool:
        """Latent attention rotates the key of all heads where it has been gathered."""
        return layout.node.size == 1 or model.attention == "mla"

    def ops(self, layer: Layer, x: Value) -> tuple[list[Op], Value]:
        alone = layer.layout.node.size == 1
        return sequence_parallel_attention(layer, x) if alone else context_parallel_attention(layer, x)


CONTEXT_PARALLEL = ContextParallel()


def context_parallel_attention(layer: Layer, x: Value) -> tuple[list[Op], Value]:
    """From the normed input x [tokens, hidden] to the attention's result, [tokens, hidden]."""
    c = layer.model
    attn = layer.tokens("attn", c.heads * c.value_dim)
    y = layer.tokens("attn_out", c.hidden, keep=Keep.NONE)
    out = linear(layer.name("out"), attn, y, layer.name("attention.out.weight"))
    ops, inputs = shared(layer, x)
    if c.attention == "mla":
        low, latent, key = inputs
        packed, latents = _pack_latents(layer, latent, key)
        gather, everyone = _gather(layer, latents, "latents")
        rotated, q = _queries_of_latents(layer, low)  # while the message is under way
        made, k, v = _keys_of_latents(layer, everyone)
        attend = core(layer, (q, k, v), Heads(q, k, v).sizes, attn)
        return [*ops, packed, gather, *rotated, *made, attend, out], y
    projected, found = heads(layer, inputs, Chosen.everything(c), None)
    packed, kv = _pack_keys(layer, found)
    gather, everyone = _gather(layer, kv, "keys")
    return [*ops, *projected, packed, gather, core(layer, (found.q, everyone), found.sizes, attn), out], y


def _gather(layer: Layer, x: Value, what: str) -> tuple[Op, Value]:
    """x [tokens, width] of every rank as whole sequences, [tokens of the node, width].

    The gradient is what this rank's queries add to it, until it is home.
    """
    (piece,) = pieces_of(layer.layout.node, 1)
    shape = (layer.node_tokens, x.shape[1])
    shard = x.lying(rows=SEQUENCES, partial_gradient="node").shard
    y = layer.value(f"{what}_ag", shape, shard=shard, keep=Keep.NONE)
    return gather_tokens(layer.layout, layer.name(f"gather_{what}"), x, y, piece, slices=layer.slices), y


def _pack_keys(layer: Layer, found: Heads) -> tuple[Op, Value]:
    """Keys and values side by side, [tokens, keys | values], so that one message has both."""
    _, keys, width = found.sizes
    size = keys * (width + int(found.v.shape[2]))
    y = layer.value("keys", (layer.layout.tokens, size), shard=Shard(("k", "v"), side_by_side=True), keep=Keep.NONE)
    name, cost = layer.name("pack_keys"), Cost(memory_bytes=2 * y.nbytes)

    def run_backward(d: Tensor) -> tuple[Tensor, Tensor]:
        dk, dv = unpack_keys(d, keys, width)
        return dk.contiguous(), dv.contiguous()

    backward = Op(
        name=name, phase=Phase.B, reads=(y.gradient,), writes=(found.k.gradient, found.v.gradient), run=run_backward,
        cost=cost,
    )
    return Op(name=name, reads=(found.k, found.v), writes=(y,), run=pack, cost=cost, backward=(backward,)), y


# --- latents ---------------------------------------------------------------------------------------------------------


def _queries_of_latents(layer: Layer, low: Value) -> tuple[list[Op], Value]:
    """Queries of the own tokens, q [tokens, H, w], from their latent (or the hidden state)."""
    c, T = layer.model, layer.layout.tokens
    flat = layer.value("q_flat", (T, c.heads * c.query_dim), shard=Shard(), keep=Keep.NONE)
    q = layer.value("q", (T, c.heads, c.query_dim), shard=Shard(), keep=Keep.NONE)
    name, cost = layer.name("rope"), Cost(3.0 * T * c.heads * c.qk_rope_head_dim, 2 * q.nbytes)
    widths, own = [c.qk_nope_head_dim, c.qk_rope_head_dim], layer.layout.node.index

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
    split, latent, key = _split_latents(layer, latents)
    c, S = layer.model, layer.node_tokens
    flat, k, v = (
        layer.value(tensor, (S, *shape), shard=_partial(tensor), keep=Keep.NONE)
        for tensor, shape in (
            ("kv_flat", (c.heads * (c.qk_nope_head_dim + c.value_dim),)), ("k", (c.heads, c.query_dim)),
            ("v", (c.heads, c.value_dim)),
        )
    )  # fmt: skip
    up = linear(layer.name("kv_up"), latent, flat, layer.name("attention.kv_up.weight"))
    return [split, up, _join_keys(layer, (flat, key), (k, v))], k, v


def _partial(tensor: str) -> Shard:
    """Of whole sequences; its gradient is what this rank's queries add to it."""
    return Shard((tensor,), SEQUENCES, partial_gradient="node")


def _pack_latents(layer: Layer, latent: Value, key: Value) -> tuple[Op, Value]:
    """The latent and the rotary key of all heads side by side, [tokens, latent | key]: one message has both."""
    widths = [int(latent.shape[1]), int(key.shape[1])]
    shard = Shard(("kv_latent", "k_shared"), side_by_side=True)
    y = layer.value("latents", (latent.shape[0], sum(widths)), shard=shard, keep=Keep.NONE)
    name, cost = layer.name("pack_latents"), Cost(memory_bytes=2 * y.nbytes)
    backward = Op(
        name=name, phase=Phase.B, reads=(y.gradient,), writes=(latent.gradient, key.gradient), cost=cost,
        run=lambda d: tuple(part.contiguous() for part in d.split(widths, dim=1)),
    )
    return Op(name=name, reads=(latent, key), writes=(y,), run=pack, cost=cost, backward=(backward,)), y


def _split_latents(layer: Layer, x: Value) -> tuple[Op, Value, Value]:
    """The latent and the rotary key of all heads again, as views of what was gathered."""
    widths = [layer.model.kv_lora_rank, layer.model.qk_rope_head_dim]
    latent, key = (
        Value(
            layer.name(f"{tensor}_ag"), (x.shape[0], width), x.dtype, shard=_partial(tensor), keep=Keep.NONE,
            alias=str(x),
        )
        for tensor, width in zip(("kv_latent", "k_shared"), widths, strict=True)
    )  # fmt: skip
    name, cost = layer.name("split_latents"), Cost(memory_bytes=2 * x.nbytes)
    backward = Op(
        name=name, phase=Phase.B, reads=(latent.gradient, key.gradient), writes=(x.gradient,), run=pack, cost=cost
    )
    split = Op(
        name=name, reads=(x,), writes=(latent, key), run=lambda x: x.split(widths, dim=1), backward=(backward,)
    )
    return split, latent, key


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
