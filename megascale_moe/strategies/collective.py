"""All-gather and reduce-scatter of token rows as operators; each is the other's backward.

Inside a tensor-parallel module every rank has all tokens of its node, between modules its own slice: an all-gather
goes in, a reduce-scatter of the partial results comes out (paper, section 3.1: 2bsh (n-1)/n).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from megascale_moe.comm.axis import Axis
from megascale_moe.comm.collectives import all_gather, reduce_scatter, tag_of
from megascale_moe.comm.traffic import Traffic, as_rows, sum_to
from megascale_moe.engine.op import Cost, Op, Phase, grad
from megascale_moe.strategies.layout import Layout

Rows = Callable[[Tensor], Tensor]


def communication(
    name: str, phase: Phase, reads: tuple[str, ...], writes: tuple[str, ...], traffic: Traffic, elements: float,
    layout: Layout, run: Callable[..., Any] | None = None,
) -> Op:  # fmt: skip
    """An operator that sends so many elements when routing is balanced.

    Args:
        run: the same by a collective of the backend.
    """
    axis = traffic.axis
    return Op(
        name=name, phase=phase, reads=reads, writes=writes, run=run or traffic.start, stream=layout.stream(axis),
        cost=Cost(wire_bytes=layout.bytes(elements), axis=axis.name), traffic=traffic,
    )  # fmt: skip


def with_backward(forward: Op, backward: Op) -> Op:
    """A communication and its dual."""
    return replace(forward, backward=(backward,))


def gather_tokens(name: str, x: str, y: str, width: int, axis: Axis, layout: Layout, *, rows: bool = False) -> Op:
    """x [tokens, width] of every rank of the axis -> y [size * tokens, width], in rank order.

    Args:
        rows: put the slices of the node's ranks together to whole rows, [rows * length, width].
    """
    return with_backward(
        _gather(name, Phase.F, x, y, width, axis, layout, rows),
        _scatter(name, Phase.B, grad(y), grad(x), width, axis, layout, rows),
    )


def scatter_sums(name: str, x: str, y: str, width: int, axis: Axis, layout: Layout, *, rows: bool = False) -> Op:
    """Partial sums x [size * tokens, width] on every rank -> their sum y [tokens, width] where the tokens belong."""
    return with_backward(
        _scatter(name, Phase.F, x, y, width, axis, layout, rows),
        _gather(name, Phase.B, grad(y), grad(x), width, axis, layout, rows),
    )


def _gather(
    name: str, phase: Phase, x: str, y: str, width: int, axis: Axis, layout: Layout, rows: bool
) -> Op:
    n, shape, tag = axis.size, (layout.tokens, width), _tag(name, phase)
    ordered: Rows = (lambda out: _swap(out, n, layout.rows)) if rows else (lambda out: out)
    traffic = Traffic(
        axis=axis, tag=tag, pack=lambda x: [x.contiguous()] * n, shapes=lambda: [shape] * n, typical=shape,
        finish=lambda whole, parts: ordered(as_rows(whole, parts)), dtype=layout.dtype,
    )  # fmt: skip
    return communication(
        name, phase, (x,), (y,), traffic, layout.tokens * width * (n - 1), layout,
        lambda x: all_gather(x, axis, tag).then(ordered),
    )  # fmt: skip


def _scatter(
    name: str, phase: Phase, x: str, y: str, width: int, axis: Axis, layout: Layout, rows: bool
) -> Op:
    n, shape, tag = axis.size, (layout.tokens, width), _tag(name, phase)
    by_rank: Rows = (lambda x: _swap(x, layout.rows, n)) if rows else (lambda x: x.contiguous())
    traffic = Traffic(
        axis=axis, tag=tag, pack=lambda x: by_rank(x).chunk(n), shapes=lambda: [shape] * n, typical=shape,
        finish=sum_to(layout.dtype), dtype=layout.dtype, sums=True,
    )  # fmt: skip
    return communication(
        name, phase, (x,), (y,), traffic, layout.tokens * width * (n - 1), layout,
        lambda x: reduce_scatter(by_rank(x), axis, tag),
    )  # fmt: skip


def _tag(name: str, phase: Phase) -> int:
    return tag_of(name if phase == Phase.F else f"{name} {phase}")


def _swap(x: Tensor, outer: int, inner: int) -> Tensor:
    """x [outer * inner * t, width] -> [inner * outer * t, width]."""
    blocks: Tensor = x.unflatten(0, (outer, inner, -1))
    return blocks.transpose(0, 1).reshape(x.shape)
