"""Sequence-parallel attention with its projections cut by peer (paper, section 4.2, from the host).

    QKV projection + all-to-all      the heads of one peer after the other are projected and sent, the own ones last:
                                     while a part travels the next is computed
    all-to-all + output projection   the own heads' part of the sum is computed while the others' heads arrive

Every rank begins with another peer, so that no two send to one at the same time. Backward is the mirror image: the
gradients of the own part first while the others' arrive, the others' first where they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from megascale_moe.comm.collectives import tag_of
from megascale_moe.comm.traffic import Traffic
from megascale_moe.config import ModelConfig
from megascale_moe.engine.autograd import autograd_op
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Cost, Op, Phase, grad, product
from megascale_moe.kernels.rotary import split_heads, split_heads_backward
from megascale_moe.strategies.collective import communication
from megascale_moe.strategies.heads import head_norm, heads_of_rank
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.pieces import distances

Ranges = tuple[slice, ...]


def can_split_attention(c: ModelConfig, layout: Layout) -> bool:
    """Whether a peer's heads can be made on their own: not where a norm or a latent spans all heads."""
    return layout.node.size > 1 and layout.attention == "sp" and c.attention == "gqa" and c.qk_norm != "full"


def split_projection(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    """From `p`ln1_out to `p`q_a2a, `p`k_a2a, `p`v_a2a: all tokens of the node, this rank's heads."""
    groups = [*distances(layout.node.size, layout.pieces)[1:], [0]]  # the own part last
    ops: list[Op] = []
    arrived: dict[int, str] = {}
    for group in groups:
        for distance in group:
            ops += [_project(p, distance, c, layout), _rotate(p, distance, c, layout)]
        if group == [0]:
            arrived[0] = f"{p}heads@0"
        else:
            ops.append(_send_heads(p, group, c, layout))
            arrived |= {distance: f"{p}heads_a2a@{distance}" for distance in group}
    return [*ops, _assemble(p, arrived, groups[:-1], c, layout)]


def _peer(distance: int, layout: Layout) -> int:
    return (layout.node.index + distance) % layout.node.size


def _rows_of(peer: int, c: ModelConfig, layout: Layout) -> list[slice]:
    """The rows of the fused projection that make a peer's heads, contiguous ones together."""
    queries, keys = heads_of_rank(peer, layout.node.size, c)
    first_key, first_value = c.heads * c.query_dim, (c.heads + c.kv_heads) * c.query_dim
    found = [slice(queries.start * c.query_dim, queries.stop * c.query_dim)]
    for start, width in ((first_key, c.query_dim), (first_value, c.value_dim)):
        runs = [keys] if isinstance(keys, range) else [range(key, key + 1) for key in keys]
        found += [slice(start + run.start * width, start + run.stop * width) for run in runs]
    return found


def _project(p: str, distance: int, c: ModelConfig, layout: Layout) -> Op:
    name, x, y = f"{p}qkv@{distance}", f"{p}ln1_out", f"{p}qkv_part@{distance}"
    weight, T = f"{p}attention.qkv.weight", layout.tokens
    parts = _rows_of(_peer(distance, layout), c, layout)
    sizes = [part.stop - part.start for part in parts]
    width = sum(sizes)
    cost = product(T, width, c.hidden, layout.bytes(T * c.hidden, T * width, c.hidden * width))

    def run(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([x @ w[part].t() for part in parts], dim=1)

    def input_gradient(d: Tensor, w: Tensor) -> Tensor:
        return d @ torch.cat([w[part] for part in parts])

    def weight_gradient(x: Tensor, d: Tensor, sink: Gradient) -> None:
        for part, slope in zip(parts, d.split(sizes, dim=1), strict=True):
            sink.add_mm_at((part,), slope.t(), x)

    return Op(
        name=name, reads=(x,), writes=(y,), weights=(weight,), run=run, cost=cost,
        backward=(
            Op(name=name, phase=Phase.B, reads=(grad(y),), writes=(grad(x),), weights=(weight,), run=input_gradient,
               cost=cost),
            Op(name=name, phase=Phase.W, reads=(x, grad(y)), writes=(), gradients=(weight,), run=weight_gradient,
               cost=cost),
        ),
    )  # fmt: skip


def _rotate(p: str, distance: int, c: ModelConfig, layout: Layout) -> Op:
    """A peer's heads, normed and rotated: [tokens, queries | keys | values]."""
    name, x, y = f"{p}rope@{distance}", f"{p}qkv_part@{distance}", f"{p}heads@{distance}"
    queries, keys = heads_of_rank(_peer(distance, layout), layout.node.size, c)
    sizes = (len(queries), len(keys), c.query_dim)
    elements = layout.tokens * (len(queries) + len(keys)) * c.query_dim
    cost = Cost(3.0 * elements, layout.bytes(2 * elements))
    if c.qk_norm != "none":
        return _norm_rotate(name, p, x, y, sizes, c, cost)

    def run(qkv: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([part.flatten(1) for part in split_heads(qkv, rope, sizes, c.rope_interleaved)], dim=1)

    def run_backward(d: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return split_heads_backward(*_heads(d, sizes, c), rope, c.rope_interleaved)

    backward = Op(name=name, phase=Phase.B, reads=(grad(y), "rope"), writes=(grad(x),), run=run_backward, cost=cost)
    return Op(name=name, reads=(x, "rope"), writes=(y,), run=run, cost=cost, backward=(backward,))


def _norm_rotate(
    name: str, p: str, x: str, y: str, sizes: tuple[int, int, int], c: ModelConfig, cost: Cost
) -> Op:
    local = replace(c, head_dim=c.query_dim, heads=sizes[0], kv_heads=sizes[1])

    def run(qkv: Tensor, rope: tuple[Tensor, Tensor], wq: Tensor, wk: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in head_norm(qkv, rope, wq, wk, local)], dim=1)

    return autograd_op(
        name, run, reads=(x, "rope"), differentiable=(x,), writes=(y,),
        weights=(f"{p}attention.q_norm.weight", f"{p}attention.k_norm.weight"), cost=cost,
    )


def _heads(x: Tensor, sizes: tuple[int, int, int], c: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """[T, queries | keys | values] -> q [T, H, w], k [T, G, w], v [T, G, u]."""
    queries, keys, width = sizes
    q, k, v = x.split([queries * width, keys * width, keys * c.value_dim], dim=1)
    return q.unflatten(1, (queries, -1)), k.unflatten(1, (keys, -1)), v.unflatten(1, (keys, -1))


def _width(peer: int, c: ModelConfig, layout: Layout) -> int:
    queries, keys = heads_of_rank(peer, layout.node.size, c)
    return len(queries) * c.query_dim + len(keys) * (c.query_dim + c.value_dim)


def _send_heads(p: str, group: Sequence[int], c: ModelConfig, layout: Layout) -> Op:
    """The heads of some peers to them, this rank's heads of as many peers' tokens from those."""
    mine = _width(layout.node.index, c, layout)
    sent = [_width(_peer(distance, layout), c, layout) for distance in group]
    reads = tuple(f"{p}heads@{distance}" for distance in group)
    writes = tuple(f"{p}heads_a2a@{distance}" for distance in group)
    return _shifted(f"{p}scatter_heads@{group[0]}", Phase.F, reads, writes, group, sent, [mine] * len(group), layout)


def _return_heads(p: str, group: Sequence[int], c: ModelConfig, layout: Layout) -> Op:
    """The backward of `_send_heads`."""
    mine = _width(layout.node.index, c, layout)
    received = [_width(_peer(distance, layout), c, layout) for distance in group]
    reads = tuple(grad(f"{p}heads_a2a@{distance}") for distance in group)
    writes = tuple(grad(f"{p}heads@{distance}") for distance in group)
    back = [layout.node.size - distance for distance in group]
    sent = [mine] * len(group)
    return _shifted(f"{p}scatter_heads@{group[0]}", Phase.B, reads, writes, back, sent, received, layout)


def _shifted(
    name: str, phase: Phase, reads: tuple[str, ...], writes: tuple[str, ...], distances: Sequence[int],
    sent: Sequence[int], received: Sequence[int], layout: Layout, pack: Callable[..., Sequence[Tensor]] | None = None,
) -> Op:  # fmt: skip
    """A matrix [tokens, sent[i]] to the rank distances[i] on, one [tokens, received[i]] from as far back.

    Args:
        pack: makes what is sent of what is read, if it is not that.
    """
    T, widths = layout.tokens, (*sent, *received)
    traffic = Traffic(
        axis=layout.node, tag=tag_of(name if phase == Phase.F else f"{name} {phase}"),
        pack=pack or (lambda *parts: [part.contiguous() for part in parts]),
        shapes=lambda: [(T, width) for width in received], finish=lambda _, parts: tuple(parts),
        typical=(T, max(widths)), dtype=layout.dtype, distances=tuple(distances),
    )  # fmt: skip
    return communication(name, phase, reads, writes, traffic, T * sum(sent), layout)


def _assemble(
    p: str, arrived: dict[int, str], groups: Sequence[Sequence[int]], c: ModelConfig, layout: Layout
) -> Op:
    """All tokens of this rank's heads from the parts of all ranks, put in the order of the rows."""
    node, rows = layout.node, layout.rows
    queries, keys = heads_of_rank(node.index, node.size, c)
    sizes = (len(queries), len(keys), c.query_dim)
    by_rank = [arrived[(node.index - rank) % node.size] for rank in range(node.size)]
    outputs = (f"{p}q_a2a", f"{p}k_a2a", f"{p}v_a2a")

    def run(*parts: Tensor) -> tuple[Tensor, ...]:
        whole = torch.stack(parts).unflatten(1, (rows, -1)).transpose(0, 1).flatten(0, 2)
        return _heads(whole, sizes, c)

    def run_backward(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, ...]:
        packed = torch.cat((dq.flatten(1), dk.flatten(1), dv.flatten(1)), dim=1)
        by_slice: Tensor = packed.unflatten(0, (rows, node.size, -1))
        return by_slice.transpose(0, 1).contiguous().flatten(1, 2).unbind()

    elements = layout.tokens * node.size * _width(node.index, c, layout)
    cost = Cost(memory_bytes=layout.bytes(2 * elements))
    name = f"{p}assemble_heads"
    backward = Op(name=name, phase=Phase.B, reads=tuple(map(grad, outputs)), writes=tuple(map(grad, by_rank)),
                  run=run_backward, cost=cost)  # fmt: skip
    returns = tuple(_return_heads(p, group, c, layout) for group in groups)
    return Op(name=name, reads=tuple(by_rank), writes=outputs, run=run, cost=cost, backward=(backward, *returns))


# --- all-to-all and output projection --------------------------------------------------------------------------------


def split_output(p: str, c: ModelConfig, layout: Layout) -> list[Op]:
    """From `p`attn [rows * s, heads / n * u] to `p`attn_out [tokens, hidden]."""
    groups = distances(layout.node.size, layout.pieces)
    sends = [_send_outputs(p, group, c, layout) for group in groups[1:]]
    order = [distance for group in groups for distance in group]
    ops = [_own_output(p, c, layout)]
    for before, distance in pairwise(order):
        ops.append(_add_output(p, before, distance, distance == order[-1], c, layout))
    # In backward each group's gradients leave as soon as the last of them is there.
    for group in groups[1:]:
        place = 1 + order[1:].index(group[0])  # backward runs from the last to the first
        b, w = ops[place].backward
        ops[place] = replace(ops[place], backward=(b, _return_outputs(p, group, c, layout), w))
    return [*sends, *ops]


def _columns(peer: int, c: ModelConfig, layout: Layout) -> slice:
    width = c.heads // layout.node.size * c.value_dim
    return slice(peer * width, (peer + 1) * width)


def _slice_of(x: Tensor, rank: int, layout: Layout) -> Tensor:
    """A rank's slice of every row of x [rows * s, ...], as a new tensor."""
    part: Tensor = x.unflatten(0, (layout.rows, layout.node.size, -1))[:, rank].contiguous()
    return part.flatten(0, 1)


def _send_outputs(p: str, group: Sequence[int], c: ModelConfig, layout: Layout) -> Op:
    def pack(attn: Tensor) -> list[Tensor]:
        return [_slice_of(attn, _peer(distance, layout), layout) for distance in group]

    widths = [c.heads * c.value_dim // layout.node.size] * len(group)
    writes = tuple(f"{p}attn_part@{distance}" for distance in group)
    name = f"{p}gather_heads@{group[0]}"
    return _shifted(name, Phase.F, (f"{p}attn",), writes, group, widths, widths, layout, pack)


def _return_outputs(p: str, group: Sequence[int], c: ModelConfig, layout: Layout) -> Op:
    widths = [c.heads * c.value_dim // layout.node.size] * len(group)
    reads = tuple(grad(f"{p}attn_part@{distance}") for distance in group)
    writes = tuple(f"{p}attn_slope@{_peer(distance, layout)}" for distance in group)
    back = [layout.node.size - distance for distance in group]
    return _shifted(f"{p}gather_heads@{group[0]}", Phase.B, reads, writes, back, widths, widths, layout)


def _output_cost(c: ModelConfig, layout: Layout) -> Cost:
    T, width = layout.tokens, c.heads // layout.node.size * c.value_dim
    return product(T, c.hidden, width, layout.bytes(T * width, 2 * T * c.hidden, width * c.hidden))


def _own_output(p: str, c: ModelConfig, layout: Layout) -> Op:
    """The own heads' share of the output; its backward is the last, and puts the gradient of `attn` together."""
    node, weight, y = layout.node, f"{p}attention.out.weight", f"{p}attn_out"
    mine, cost = _columns(node.index, c, layout), _output_cost(c, layout)
    others = tuple(f"{p}attn_slope@{rank}" for rank in range(node.size) if rank != node.index)

    def run(attn: Tensor, w: Tensor) -> Tensor:
        return _slice_of(attn, node.index, layout) @ w[:, mine].t()

    def input_gradient(d: Tensor, w: Tensor) -> Tensor:
        return d @ w[:, mine]

    def join(own: Tensor, *parts: Tensor) -> Tensor:
        slices = [*parts[: node.index], own, *parts[node.index :]]
        whole: Tensor = torch.stack(slices).unflatten(1, (layout.rows, -1))
        return whole.transpose(0, 1).flatten(0, 2)

    def weight_gradient(attn: Tensor, d: Tensor, sink: Gradient) -> None:
        sink.add_mm_at((slice(None), mine), d.t(), _slice_of(attn, node.index, layout))

    name, slope = f"{p}out@0", f"{p}attn_slope@{node.index}"
    return Op(
        name=name, reads=(f"{p}attn",), writes=(f"{p}out_sum@0",), weights=(weight,), run=run, cost=cost,
        backward=(
            Op(name=name, phase=Phase.B, reads=(grad(y),), writes=(slope,), weights=(weight,), run=input_gradient,
               cost=cost),
            Op(name=name, phase=Phase.W, reads=(f"{p}attn", grad(y)), writes=(), gradients=(weight,),
               run=weight_gradient, cost=cost),
            Op(name=f"{p}join_heads", phase=Phase.B, reads=(slope, *others), writes=(grad(f"{p}attn"),), run=join,
               cost=Cost(memory_bytes=layout.bytes(2 * layout.tokens * c.heads * c.value_dim))),
        ),
    )  # fmt: skip


def _add_output(p: str, before: int, distance: int, last: bool, c: ModelConfig, layout: Layout) -> Op:
    """The sum with one more peer's heads."""
    weight, d_out = f"{p}attention.out.weight", grad(f"{p}attn_out")
    theirs = _columns((layout.node.index - distance) % layout.node.size, c, layout)
    name, x, cost = f"{p}out@{distance}", f"{p}attn_part@{distance}", _output_cost(c, layout)

    def weight_gradient(x: Tensor, d: Tensor, sink: Gradient) -> None:
        sink.add_mm_at((slice(None), theirs), d.t(), x)

    return Op(
        name=name, reads=(f"{p}out_sum@{before}", x), writes=(f"{p}attn_out" if last else f"{p}out_sum@{distance}",),
        weights=(weight,), run=lambda total, x, w: torch.addmm(total, x, w[:, theirs].t()), cost=cost,
        backward=(
            Op(name=name, phase=Phase.B, reads=(d_out,), writes=(grad(x),), weights=(weight,),
               run=lambda d, w: d @ w[:, theirs], cost=cost),
            Op(name=name, phase=Phase.W, reads=(x, d_out), writes=(), gradients=(weight,), run=weight_gradient,
               cost=cost),
        ),
    )  # fmt: skip
