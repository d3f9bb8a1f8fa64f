"""Operators on routed rows: moving them by row maps, and the experts' grouped products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op, Phase, Work
from megascale_moe.engine.value import Keep, Rows, Shard, Value
from megascale_moe.kernels.activation import swiglu, swiglu_backward
from megascale_moe.kernels.grouped import grouped_mm, rows_of_groups, sums_of_groups
from megascale_moe.kernels.rows import RowMap, sum_rows, take_rows
from megascale_moe.strategies.layer import Layer, Piece, columns
from megascale_moe.strategies.placement import share
from megascale_moe.strategies.routing import PieceRows, group_places, routed_rows

Move = Callable[[Tensor, Any], Tensor]
MapOf = Callable[[Any], RowMap]


def moved(name: str, rows: Value, x: Value, y: Value, forward: Move, backward: Move) -> Op:
    """y = forward(x, row maps); the gradient moves by `backward`. The routed rows, of x or y, are read and written."""
    routed = x if x.shard is not None and x.shard.rows.kind == "routed" else y
    cost = Cost(memory_bytes=2 * routed.nbytes)
    b = Op(name=name, phase=Phase.B, reads=(grad(y), rows), writes=(x.gradient,), run=backward, cost=cost)
    return Op(name=name, reads=(x, rows), writes=(y,), run=forward, cost=cost, backward=(b,))


def scatter(name: str, rows: Value, x: Value, y: Value, of: MapOf = lambda rows: rows.experts) -> Op:
    """Token rows to routed rows."""
    return moved(name, rows, x, y, lambda x, maps: take_rows(x, of(maps).source), lambda d, maps: sum_rows(d, of(maps)))


def gather(name: str, rows: Value, x: Value, y: Value, of: MapOf = lambda rows: rows.experts) -> Op:
    """Sum of each token's routed rows; the dual of `scatter`."""
    return moved(name, rows, x, y, lambda x, maps: sum_rows(x, of(maps)), lambda d, maps: take_rows(d, of(maps).source))


def expert_input(layer: Layer, piece: Piece) -> Value:
    """Declare the rows that this rank's experts work on, in expert order."""
    etp = layer.layout.etp
    rows = Rows("routed", "ffn", group_places(layer.layout, piece))
    shard = Shard(("ffn_in",), rows, partial_gradient="etp" if etp.size > 1 else "")
    return layer.value(
        "ffn_in", (routed_rows(layer, piece), layer.model.hidden), piece=piece, shard=shard, keep=Keep.NONE
    )


def expert_ops(layer: Layer, x: Value, rows: Value, gates: Value, piece: Piece) -> tuple[list[Op], Value]:
    """From x [R, hidden] to the experts' results [R, hidden], rows in expert order.

    The gating weights come before FC2, whose result then is not needed in backward, or, the layout's `gates_last`,
    behind it. The gradients are the same expressions: the weights' own is a sum over FC2's inputs in both.
    """
    c, etp = layer.model, layer.layout.etp
    width, R = c.ffn_hidden // etp.size, x.shape[0]
    assert x.shard is not None
    lies = x.shard.rows
    up = layer.value(
        "fc13_out", (R, 2 * width), piece=piece,
        shard=Shard(("fc13_out",), lies, columns=columns(2 * c.ffn_hidden, etp, 2)),
    )  # fmt: skip
    down = layer.value(
        "fc2_in", (R, width), piece=piece, keep=Keep.NONE,
        shard=Shard(("fc2_in",), lies, columns=columns(c.ffn_hidden, etp)),
    )  # fmt: skip
    y = layer.value(
        "fc2_out", (R, c.hidden), piece=piece, keep=Keep.NONE,
        shard=Shard(("fc2_out",), lies, partial="etp" if etp.size > 1 else ""),
    )  # fmt: skip
    biased, product = layer.spec.expert_bias, y
    if biased:
        product = y.named(layer.name("fc2_product", piece)).lying(whole=("fc2_product",))
    bias = layer.name("ffn.experts.b13") if biased else ""
    fc2 = _grouped_linear(layer, layer.name("fc2", piece), rows, down, product, layer.name("ffn.experts.w2"))
    ops = [
        _grouped_linear(layer, layer.name("fc13", piece), rows, x, up, layer.name("ffn.experts.w13"), bias),
        _gated_swiglu(layer, layer.name("swiglu", piece), rows, up, down, gates),
        _with_gates(fc2, gates) if layer.layout.gates_last else fc2,
    ]
    if biased:
        ops.append(_gated_bias(layer, layer.name("fc2_bias", piece), rows, product, y, gates))
    return ops, y


def _grouped_linear(layer: Layer, name: str, rows: Value, x: Value, y: Value, weight: str, bias: str = "") -> Op:
    """y = x @ weight[expert of the row].T (+ bias[expert]); weight [experts, outputs, inputs], bias [experts, outputs].
    """
    (R, inputs), outputs = x.shape, y.shape[1]
    local = layer.model.experts // layer.layout.ep.size
    cost = Cost(
        2.0 * R * inputs * outputs, x.nbytes + y.nbytes + layer.layout.bytes(local * inputs * outputs),
        work=Work.GROUPED, size=R / local,
    )  # fmt: skip

    def forward(x: Tensor, rows: PieceRows, w: Tensor, bias: Tensor | None = None) -> Tensor:
        y = grouped_mm(x, w.transpose(1, 2), rows.experts)
        return y if bias is None else y.add_(rows_of_groups(bias, rows.experts, len(y)))

    def input_gradient(dy: Tensor, rows: PieceRows, w: Tensor) -> Tensor:
        return grouped_mm(dy, w, rows.experts)

    def weight_gradient(
        x: Tensor, dy: Tensor, rows: PieceRows, sink: Gradient, of_bias: Gradient | None = None
    ) -> None:
        sink.add_grouped_mm(dy, x, rows.experts)
        if of_bias is not None:
            of_bias.add(sums_of_groups(dy, rows.experts))

    trained = (weight, bias) if bias else (weight,)
    b = Op(
        name=name, phase=Phase.B, reads=(grad(y), rows), writes=(x.gradient,), weights=(weight,), run=input_gradient,
        cost=cost,
    )
    w = Op(
        name=name, phase=Phase.W, reads=(x, grad(y), rows), writes=(), gradients=trained, run=weight_gradient,
        cost=cost,
    )
    return Op(name=name, reads=(x, rows), writes=(y,), weights=trained, run=forward, cost=cost, backward=(b, w))


def _gated_bias(layer: Layer, name: str, rows: Value, x: Value, y: Value, gates: Value) -> Op:
    """y = x + gating weight * bias[expert of the row].

    Where etp ranks share an expert's width, x is a partial sum of theirs, to which each adds its own share of the
    elements of the bias.
    """
    etp, weight = layer.layout.etp, layer.name("ffn.experts.b2")
    mine = share(layer.model.hidden, etp.size, etp.index)
    cut, width = slice(mine.start, mine.stop), len(mine)
    cost = Cost(2.0 * width * x.shape[0], 2 * x.nbytes)

    def forward(x: Tensor, rows: PieceRows, gates: Tensor, bias: Tensor) -> Tensor:
        of_rows = gates.flatten()[rows.experts.slot][:, None].to(x.dtype)
        y = x.clone()
        y[:, cut] += of_rows * rows_of_groups(bias, rows.experts, len(x))
        return y

    def backward(gates: Tensor, rows: PieceRows, dy: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        dgates = torch.zeros_like(gates)
        products = dy[:, cut].float() * rows_of_groups(bias, rows.experts, len(dy))
        dgates.view(-1)[rows.experts.slot] = products.sum(-1)
        return dy, dgates

    def bias_gradient(gates: Tensor, rows: PieceRows, dy: Tensor, sink: Gradient) -> None:
        of_rows = gates.flatten()[rows.experts.slot][:, None]
        sink.add(sums_of_groups((dy[:, cut] * of_rows).to(dy.dtype), rows.experts))

    b = Op(
        name=name, phase=Phase.B, reads=(gates, rows, grad(y)), writes=(x.gradient, gates.gradient), weights=(weight,),
        run=backward, cost=cost,
    )
    w = Op(
        name=name, phase=Phase.W, reads=(gates, rows, grad(y)), writes=(), gradients=(weight,), run=bias_gradient,
        cost=cost,
    )
    return Op(
        name=name, reads=(x, rows, gates), writes=(y,), weights=(weight,), run=forward, cost=cost, backward=(b, w)
    )


def _with_gates(linear: Op, gates: Value) -> Op:
    """A grouped product whose results are weighted with their gates; the gradient of its input is that without them,
    which is what SwiGLU's backward multiplies.
    """
    b, w = linear.backward
    run, add = linear.run, w.run

    def of_rows(gates: Tensor, rows: PieceRows) -> Tensor:
        return gates.flatten()[rows.experts.slot][:, None]

    def forward(x: Tensor, rows: PieceRows, gates: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = run(x, rows, weight)
        return y.mul_(of_rows(gates, rows))

    def weight_gradient(x: Tensor, dy: Tensor, rows: PieceRows, gates: Tensor, sink: Gradient) -> None:
        add(x, (dy * of_rows(gates, rows)).to(dy.dtype), rows, sink)

    back = (b, replace(w, reads=(*w.reads, gates), run=weight_gradient))
    return replace(linear, reads=(*linear.reads, gates), run=forward, backward=back)


def _gated_swiglu(layer: Layer, name: str, rows: Value, x: Value, y: Value, gates: Value) -> Op:
    """fc2_in = activation of fc13_out * gating weight."""
    cost = Cost(6.0 * y.elements, 3 * y.nbytes)
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

    b = Op(
        name=name, phase=Phase.B, reads=(x, gates, rows, grad(y)), writes=(x.gradient, gates.gradient), run=backward,
        cost=Cost(2 * cost.flops, 5 / 3 * cost.memory_bytes),
    )
    return Op(name=name, reads=(x, gates, rows), writes=(y,), run=forward, cost=cost, backward=(b,))
