"""Operators on routed rows: moving them by row maps, and the experts' grouped products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op, Work
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.kernels.activation import swiglu, swiglu_backward
from megascale_moe.kernels.grouped import grouped_mm, rows_of_groups, sums_of_groups
from megascale_moe.kernels.rows import RowMap, sum_rows, take_rows
from megascale_moe.strategies.layer import Layer, Piece, columns
from megascale_moe.strategies.placement import share
from megascale_moe.strategies.row_maps import PieceRows, group_places, routed_rows

Move = Callable[[Tensor, Any], Tensor]
MapOf = Callable[[Any], RowMap]


def moved(name: str, rows: Value, x: Value, y: Value, forward: Move, backward: Move) -> Op:
    """Compute y = forward(x, row maps); the gradient moves by `backward`. Routed rows, x or y, are read and written."""
    routed = x if x.rows.kind == "routed" else y
    op = Op(name, (x, rows), (y,), forward, cost=Cost(memory_bytes=2 * routed.nbytes))
    return op.input_gradient((x,), (grad(y), rows), backward)


def scatter(name: str, rows: Value, x: Value, y: Value, of: MapOf = lambda rows: rows.experts) -> Op:
    """Copy token rows to routed rows."""
    return moved(name, rows, x, y, lambda x, maps: take_rows(x, of(maps).source), lambda d, maps: sum_rows(d, of(maps)))


def gather(name: str, rows: Value, x: Value, y: Value) -> Op:
    """Sum each token's routed rows; the dual of `scatter`."""
    return moved(
        name, rows, x, y, lambda x, maps: sum_rows(x, maps.experts), lambda d, maps: take_rows(d, maps.experts.source)
    )


def expert_input(layer: Layer, piece: Piece) -> Value:
    """Declare the rows that this rank's experts work on, in expert order."""
    rows = Rows("routed", "ffn", group_places(layer.layout, piece))
    shard = Shard(("ffn_in",), rows, partial_gradient="etp" if layer.layout.etp.size > 1 else "")
    return layer.value("ffn_in", (routed_rows(layer, piece), layer.model.hidden), shard, Keep.NONE, piece=piece)


def expert_ops(layer: Layer, x: Value, rows: Value, gates: Value, piece: Piece) -> tuple[list[Op], Value]:
    """Return the operators from x [R, hidden] to the experts' results [R, hidden], rows in expert order.

    The gating weights come before FC2, whose result then is not needed in backward, or, the layout's `gates_last`,
    behind it. The gradients are the same expressions: the weights' own is a sum over FC2's inputs in both.
    """
    c, etp = layer.model, layer.layout.etp
    width, R = c.ffn_hidden // etp.size, x.shape[0]
    routed, partial = x.rows, "etp" if etp.size > 1 else ""
    up_shard = Shard(("fc13_out",), routed, columns(2 * c.ffn_hidden, etp, 2))
    up = layer.value("fc13_out", (R, 2 * width), up_shard, piece=piece)
    down_shard = Shard(("fc2_in",), routed, columns(c.ffn_hidden, etp))
    down = layer.value("fc2_in", (R, width), down_shard, Keep.NONE, piece=piece)
    y = layer.value("fc2_out", (R, c.hidden), Shard(("fc2_out",), routed, partial=partial), Keep.NONE, piece=piece)
    biased = layer.spec.expert_bias
    product = y.named(layer.name("fc2_product", piece)).lying(whole=("fc2_product",)) if biased else y
    last = gates if layer.layout.gates_last else None
    ops = [
        _grouped_linear(layer, layer.name("fc13", piece), rows, x, up, ("w13", "b13") if biased else ("w13",)),
        _gated_swiglu(layer, layer.name("swiglu", piece), rows, up, down, gates),
        _grouped_linear(layer, layer.name("fc2", piece), rows, down, product, ("w2",), last),
    ]
    if biased:
        ops.append(_gated_bias(layer, layer.name("fc2_bias", piece), rows, product, y, gates))
    return ops, y


def _of_rows(gates: Tensor, rows: PieceRows) -> Tensor:
    """Return the gating weight of each routed row, [R, 1]."""
    return gates.flatten()[rows.experts.slot][:, None]


def _grouped_linear(
    layer: Layer, name: str, rows: Value, x: Value, y: Value, weights: tuple[str, ...], gates: Value | None = None
) -> Op:
    """y = x @ weight[expert of the row].T (+ bias[expert]); weight [experts, outputs, inputs], bias [experts, outputs].

    Args:
        gates: what results are weighted with; the gradient of x is that without them, which is what SwiGLU's backward
            multiplies.
    """
    (R, inputs), outputs = x.shape, y.shape[1]
    local = layer.model.experts // layer.layout.ep.size
    memory = x.nbytes + y.nbytes + layer.layout.bytes(local * inputs * outputs)
    cost = Cost(2.0 * R * inputs * outputs, memory, work=Work.GROUPED, size=R / local)
    names = tuple(layer.name(f"ffn.experts.{weight}") for weight in weights)
    weighted = () if gates is None else (gates,)

    def forward(x: Tensor, rows: PieceRows, *args: Tensor) -> Tensor:
        w, *bias = args[len(weighted) :]
        y = grouped_mm(x, w.transpose(1, 2), rows.experts)
        for each in bias:
            y.add_(rows_of_groups(each, rows.experts, len(y)))
        return y.mul_(_of_rows(args[0], rows)) if weighted else y

    def weight_gradient(x: Tensor, dy: Tensor, rows: PieceRows, *args: Any) -> None:
        sink, *bias = args[len(weighted) :]
        if weighted:
            dy = (dy * _of_rows(args[0], rows)).to(dy.dtype)
        sink.add_grouped_mm(dy, x, rows.experts)
        for each in bias:
            each.add(sums_of_groups(dy, rows.experts))

    op = Op(name, (x, rows, *weighted), (y,), forward, weights=names, cost=cost).input_gradient(
        (x,), (grad(y), rows), lambda dy, rows, w: grouped_mm(dy, w, rows.experts), weights=names[:1]
    )
    return op.weight_gradient((x, grad(y), rows, *weighted), weight_gradient)


def _gated_bias(layer: Layer, name: str, rows: Value, x: Value, y: Value, gates: Value) -> Op:
    """Compute y = x + gating weight * bias[expert of the row].

    Where etp ranks share an expert's width, x is a partial sum of theirs, to which each adds its own share of the
    elements of the bias.
    """
    etp, weights = layer.layout.etp, (layer.name("ffn.experts.b2"),)
    mine = share(layer.model.hidden, etp.size, etp.index)
    cut = slice(mine.start, mine.stop)

    def forward(x: Tensor, rows: PieceRows, gates: Tensor, bias: Tensor) -> Tensor:
        y = x.clone()
        y[:, cut] += _of_rows(gates, rows).to(x.dtype) * rows_of_groups(bias, rows.experts, len(x))
        return y

    def backward(gates: Tensor, rows: PieceRows, dy: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        dgates = torch.zeros_like(gates)
        products = dy[:, cut].float() * rows_of_groups(bias, rows.experts, len(dy))
        dgates.view(-1)[rows.experts.slot] = products.sum(-1)
        return dy, dgates

    def bias_gradient(gates: Tensor, rows: PieceRows, dy: Tensor, sink: Gradient) -> None:
        sink.add(sums_of_groups((dy[:, cut] * _of_rows(gates, rows)).to(dy.dtype), rows.experts))

    cost, reads = Cost(2.0 * len(mine) * x.shape[0], 2 * x.nbytes), (gates, rows, grad(y))
    op = Op(name, (x, rows, gates), (y,), forward, weights=weights, cost=cost)
    return op.input_gradient((x, gates), reads, backward, weights=weights).weight_gradient(reads, bias_gradient)


def _gated_swiglu(layer: Layer, name: str, rows: Value, x: Value, y: Value, gates: Value) -> Op:
    """Compute fc2_in, the activation of fc13_out times the gating weight."""
    gates_last, clamp = layer.layout.gates_last, layer.spec.clamp

    def forward(x: Tensor, gates: Tensor, rows: PieceRows) -> Tensor:
        return swiglu(x, None if gates_last else gates.flatten()[rows.experts.slot], clamp)

    def backward(x: Tensor, gates: Tensor, rows: PieceRows, dy: Tensor) -> tuple[Tensor, Tensor]:
        slot = rows.experts.slot
        dx, dgate = swiglu_backward(dy, x, gates.flatten()[slot], clamp)
        assert dgate is not None  # there was a gate
        dgates = torch.zeros_like(gates)
        dgates.view(-1)[slot] = dgate
        return dx, dgates

    cost = Cost(6.0 * y.elements, 3 * y.nbytes)
    op = Op(name, (x, gates, rows), (y,), forward, cost=cost)
    return op.input_gradient((x, gates), (x, gates, rows, grad(y)), backward, cost=cost.times(2, 5 / 3))
