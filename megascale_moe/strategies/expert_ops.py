"""Operators on routed rows: moving them by row maps, and the experts' grouped products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Cost, Op, Phase, Work, grad
from megascale_moe.kernels.activation import swiglu, swiglu_backward
from megascale_moe.kernels.grouped import grouped_mm
from megascale_moe.kernels.rows import RowMap, sum_rows, take_rows
from megascale_moe.model.router import within_capacity
from megascale_moe.strategies.layout import Layout


@dataclass(frozen=True)
class Dispatch:
    """Row maps of one layer.

    Attributes:
        experts: this rank's routed rows out of all tokens of the group.
        own: routed rows of this rank's own tokens, grouped by global expert (all-to-all form only).
        send, receive: rows to and from each expert-parallel rank.
        share: rows that each rank of the etp axis received; they all work on all of them.
        arrange: received rows, ordered by sender, into expert order; arrange_back its inverse.
    """

    experts: RowMap
    own: RowMap
    send: list[int]
    receive: list[int]
    share: list[int]
    arrange: Tensor
    arrange_back: Tensor


def routing_names(p: str, layout: Layout) -> tuple[str, str]:
    """The routing of every token this rank's experts may see."""
    return (f"{p}gate_all", f"{p}choice_all") if layout.group.size > 1 else (f"{p}gate", f"{p}choice")


def rows_in_order(x: Tensor, layout: Layout) -> Tensor:
    """x [group * tokens, k], slices of rows as ranks hold them -> whole rows [group / node, rows * length, k]."""
    blocks = x.view(-1, layout.node.size, layout.rows, layout.length // layout.node.size, x.shape[-1])
    return blocks.transpose(1, 2).reshape(len(blocks), layout.rows * layout.length, x.shape[-1])


def _slices_of_rows(x: Tensor, layout: Layout) -> Tensor:
    """The inverse of `rows_in_order`."""
    blocks = x.view(len(x), layout.rows, layout.node.size, layout.length // layout.node.size, x.shape[-1])
    return blocks.transpose(1, 2).reshape(-1, x.shape[-1])


def rows_within_capacity(choice: Tensor, gate: Tensor, c: ModelConfig, layout: Layout) -> Tensor:
    """Which assignments of all ranks' tokens survive dropping, bool [group * tokens, k]."""
    whole = [rows_in_order(x, layout).flatten(0, 1) for x in (choice, gate)]
    rows = layout.rows * layout.group.size // layout.node.size
    kept = within_capacity(whole[0], whole[1], rows, c)
    return _slices_of_rows(kept.view(-1, layout.rows * layout.length, c.top_k), layout)


Move = Callable[[Tensor, Any], Tensor]


def routed(c: ModelConfig, layout: Layout) -> float:
    """Rows that a rank's experts work on when routing is balanced: of its own tokens, and of those that share them."""
    return layout.tokens * c.top_k * layout.etp.size


def moved(
    name: str, rows: str, x: str, y: str, forward: Move, backward: Move, c: ModelConfig, layout: Layout,
    part: float = 1.0,
) -> Op:
    """y = forward(x, row maps); the gradient moves by `backward`.

    Args:
        rows: the name of the row maps. part: which share of the rank's routed rows that is, for the cost.
    """
    cost = Cost(memory_bytes=layout.bytes(2 * part * routed(c, layout) * c.hidden))
    b = Op(name=name, phase=Phase.B, reads=(grad(y), rows), writes=(grad(x),), run=backward, cost=cost)
    return Op(name=name, reads=(x, rows), writes=(y,), run=forward, cost=cost, backward=(b,))


def scatter(
    name: str, rows: str, x: str, y: str, of: Callable[[Any], RowMap], c: ModelConfig, layout: Layout,
    part: float = 1.0,
) -> Op:
    """Token rows to routed rows."""

    def forward(x: Tensor, rows: Any) -> Tensor:
        return take_rows(x, of(rows).source)

    def backward(d: Tensor, rows: Any) -> Tensor:
        return sum_rows(d, of(rows))

    return moved(name, rows, x, y, forward, backward, c, layout, part)


def gather(
    name: str, rows: str, x: str, y: str, of: Callable[[Any], RowMap], c: ModelConfig, layout: Layout,
    part: float = 1.0,
) -> Op:
    """Sum of each token's routed rows; the dual of `scatter`."""

    def forward(x: Tensor, rows: Any) -> Tensor:
        return sum_rows(x, of(rows))

    def backward(d: Tensor, rows: Any) -> Tensor:
        return take_rows(d, of(rows).source)

    return moved(name, rows, x, y, forward, backward, c, layout, part)


def expert_ops(p: str, c: ModelConfig, layout: Layout, piece: str = "", part: float = 1.0) -> list[Op]:
    """ffn_in [R, hidden] -> fc2_out [R, hidden], rows grouped by local expert.

    The gating weights come before FC2, whose result then is not needed in backward, or, the layout's `gates_last`,
    behind it. The gradients are the same expressions: the weights' own is a sum over FC2's inputs in both.

    Args:
        piece: behind every name, where the rows are worked on piece by piece. part: the piece's share of them.
    """
    experts, width, rows = f"{p}ffn.experts.", c.ffn_hidden // layout.etp.size, f"{p}rows{piece}"
    R = part * routed(c, layout)
    x, up, down, y = (f"{p}{name}{piece}" for name in ("ffn_in", "fc13_out", "fc2_in", "fc2_out"))
    gates = routing_names(p, layout)[0]
    fc2 = _grouped_linear(f"{p}fc2{piece}", rows, down, y, f"{experts}w2", (width, c.hidden), R, c, layout)
    return [
        _grouped_linear(f"{p}fc13{piece}", rows, x, up, f"{experts}w13", (c.hidden, 2 * width), R, c, layout),
        _gated_swiglu(f"{p}swiglu{piece}", rows, up, down, gates, R * width, layout),
        _with_gates(fc2, gates) if layout.gates_last else fc2,
    ]


def expert_rows(rows: Any) -> RowMap:
    """The rows that the experts work on, out of what a form of dispatch keeps."""
    return rows if isinstance(rows, RowMap) else rows.experts  # type: ignore[no-any-return]


def _grouped_linear(
    name: str, rows: str, x: str, y: str, weight: str, sizes: tuple[int, int], R: float, c: ModelConfig,
    layout: Layout,
) -> Op:
    """y = x @ weight[expert of the row].T; weight [experts, outputs, inputs]; about R rows."""
    inputs, outputs = sizes
    local = c.experts // layout.ep.size
    cost = Cost(
        2.0 * R * inputs * outputs, layout.bytes(R * inputs, R * outputs, local * inputs * outputs),
        work=Work.GROUPED, size=R / local,
    )  # fmt: skip

    def forward(x: Tensor, rows: Any, w: Tensor) -> Tensor:
        return grouped_mm(x, w.transpose(1, 2), expert_rows(rows))

    def input_gradient(dy: Tensor, rows: Any, w: Tensor) -> Tensor:
        return grouped_mm(dy, w, expert_rows(rows))

    def weight_gradient(x: Tensor, dy: Tensor, rows: Any, sink: Gradient) -> None:
        sink.add_grouped_mm(dy, x, expert_rows(rows))

    return Op(
        name=name, reads=(x, rows), writes=(y,), weights=(weight,), run=forward, cost=cost,
        backward=(
            Op(
                name=name, phase=Phase.B, reads=(grad(y), rows), writes=(grad(x),), weights=(weight,),
                run=input_gradient, cost=cost,
            ),
            Op(
                name=name, phase=Phase.W, reads=(x, grad(y), rows), writes=(), gradients=(weight,),
                run=weight_gradient, cost=cost,
            ),
        ),
    )


def _with_gates(linear: Op, gates: str) -> Op:
    """A grouped product whose results are weighted with their gates; the gradient of its input is that without them,
    which is what SwiGLU's backward multiplies."""
    b, w = linear.backward
    run, add = linear.run, w.run

    def of_rows(gates: Tensor, rows: Any) -> Tensor:
        return gates.flatten()[expert_rows(rows).slot][:, None]

    def forward(x: Tensor, rows: Any, gates: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = run(x, rows, weight)
        return y.mul_(of_rows(gates, rows))

    def weight_gradient(x: Tensor, dy: Tensor, rows: Any, gates: Tensor, sink: Gradient) -> None:
        add(x, (dy * of_rows(gates, rows)).to(dy.dtype), rows, sink)

    back = (b, replace(w, reads=(*w.reads, gates), run=weight_gradient))
    return replace(linear, reads=(*linear.reads, gates), run=forward, backward=back)


def _gated_swiglu(name: str, rows: str, x: str, y: str, gates: str, elements: float, layout: Layout) -> Op:
    """fc2_in = silu(a) * b * gating weight for fc13_out = [a, b]; about so many elements of fc2_in."""
    cost = Cost(6.0 * elements, layout.bytes(3 * elements))

    def forward(x: Tensor, gates: Tensor, rows: Any) -> Tensor:
        return swiglu(x, None if layout.gates_last else gates.flatten()[expert_rows(rows).slot])

    def backward(x: Tensor, gates: Tensor, rows: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        slot = expert_rows(rows).slot
        dx, dgate = swiglu_backward(dy, x, gates.flatten()[slot])
        assert dgate is not None  # there was a gate
        dgates = torch.zeros_like(gates)
        dgates.view(-1)[slot] = dgate
        return dx, dgates

    b = Op(
        name=name, phase=Phase.B, reads=(x, gates, rows, grad(y)), writes=(grad(x), grad(gates)), run=backward,
        cost=Cost(2 * cost.flops, 5 / 3 * cost.memory_bytes),
    )
    return Op(name=name, reads=(x, gates, rows), writes=(y,), run=forward, cost=cost, backward=(b,))
