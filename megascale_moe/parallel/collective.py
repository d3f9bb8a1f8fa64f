"""All-gather and reduce-scatter of token rows as operators; each is the other's backward.

Inside a tensor-parallel module every rank has all tokens of its node, between modules its own slice: an all-gather
goes in, a reduce-scatter of the partial results comes out (paper, section 3.1: 2bsh (n-1)/n).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import Pending, all_gather, reduce_scatter, tag_of
from megascale_moe.engine.op import Cost, Op, Phase, grad
from megascale_moe.parallel.layout import Layout

Collective = Callable[[Tensor, Axis, int], Pending]


def gather_tokens(name: str, x: str, y: str, width: int, axis: Axis, layout: Layout, *, rows: bool = False) -> Op:
    """x [tokens, width] of every rank of the axis -> y [size * tokens, width], in rank order.

    Args:
        rows: put the slices of the node's ranks together to whole rows, [rows * length, width].
    """
    into, out = (_gather_rows(layout), _scatter_rows(layout)) if rows else (all_gather, reduce_scatter)
    return _collective(name, x, y, width, into, out, axis, layout)


def scatter_sums(name: str, x: str, y: str, width: int, axis: Axis, layout: Layout, *, rows: bool = False) -> Op:
    """Partial sums x [size * tokens, width] on every rank -> their sum y [tokens, width] where the tokens belong."""
    into, out = (_gather_rows(layout), _scatter_rows(layout)) if rows else (all_gather, reduce_scatter)
    return _collective(name, x, y, width, out, into, axis, layout)


def _collective(
    name: str, x: str, y: str, width: int, forward: Collective, backward: Collective, axis: Axis, layout: Layout
) -> Op:
    cost = Cost(wire_bytes=layout.bytes(layout.tokens * width) * (axis.size - 1), axis=axis.name)
    stream = layout.stream(axis)
    b = Op(
        name=name, phase=Phase.B, reads=(grad(y),), writes=(grad(x),), stream=stream, cost=cost,
        run=lambda d: backward(d, axis, tag_of(name + " B")),
    )
    return Op(
        name=name, reads=(x,), writes=(y,), stream=stream, cost=cost, backward=(b,),
        run=lambda x: forward(x, axis, tag_of(name)),
    )


def _gather_rows(layout: Layout) -> Collective:
    def run(x: Tensor, axis: Axis, tag: int) -> Pending:
        return all_gather(x, axis, tag).then(lambda out: _swap(out, axis.size, layout.rows))

    return run


def _scatter_rows(layout: Layout) -> Collective:
    def run(x: Tensor, axis: Axis, tag: int) -> Pending:
        return reduce_scatter(_swap(x, layout.rows, axis.size), axis, tag)

    return run


def _swap(x: Tensor, outer: int, inner: int) -> Tensor:
    """x [outer * inner * t, width] -> [inner * outer * t, width]."""
    blocks: Tensor = x.unflatten(0, (outer, inner, -1))
    return blocks.transpose(0, 1).reshape(x.shape)
