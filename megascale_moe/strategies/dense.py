"""Operators that need no communication: linear, norm, residual, plain SwiGLU.

Shapes, bytes and FLOPs follow from the values that they read and write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megascale_moe.config import LayerSpec
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad, suffixed
from megascale_moe.engine.op import Cost, Op, Phase, product
from megascale_moe.engine.value import Keep, Value
from megascale_moe.kernels.activation import swiglu, swiglu_backward
from megascale_moe.kernels.norm import add_rms_norm, rms_norm, rms_norm_backward


def linear(
    name: str, x: Value, y: Value, weight: str, *, rows: Sequence[slice] = (), again: Op | None = None, bias: str = ""
) -> Op:
    """y = x @ weight.T (+ bias) with the input gradient and the weight gradient as separate operators.

    Args:
        rows: those rows of the weight (and the bias) alone, in this order; empty: all of it.
        again: makes x once more for the weight gradient, so that x itself is not kept; it stands before the input
            gradient, which hides it where it is a communication.
    """
    (T, inputs), outputs = x.shape, y.shape[-1]
    cost = product(T, outputs, inputs, x.nbytes + y.nbytes + inputs * outputs * x.dtype.itemsize)
    widths = [part.stop - part.start for part in rows]

    def forward(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        parts = rows or [slice(None)]
        found = [x @ w[part].t() if b is None else torch.addmm(b[part], x, w[part].t()) for part in parts]
        return torch.cat(found, dim=1) if rows else found[0]

    def input_gradient(dy: Tensor, w: Tensor) -> Tensor:
        return dy @ (torch.cat([w[part] for part in rows]) if rows else w)

    def weight_gradient(x: Tensor, dy: Tensor, sink: Gradient, of_bias: Gradient | None = None) -> None:
        if not rows:
            sink.add_mm(dy.t(), x)
        for part, slope in zip(rows, dy.split(widths, dim=1) if rows else (), strict=True):
            sink.add_mm_at((part,), slope.t(), x)
        if of_bias is not None:
            total, start = dy.sum(0, dtype=torch.float32), 0
            if not rows:
                of_bias.add(total)
            for part, width in zip(rows, widths, strict=True):
                of_bias.value()[part] += total[start : start + width]
                start += width

    dx, dy = x.gradient, grad(y)
    trained = (weight, bias) if bias else (weight,)
    return Op(
        name=name, reads=(x,), writes=(y,), weights=trained, run=forward, cost=cost,
        backward=(
            *((again,) if again else ()),
            Op(name=name, phase=Phase.B, reads=(dy,), writes=(dx,), weights=(weight,), run=input_gradient, cost=cost),
            Op(
                name=name, phase=Phase.W, reads=(again.writes[0] if again else x, dy), writes=(), gradients=trained,
                run=weight_gradient, cost=cost,
            ),
        ),
    )  # fmt: skip


def add_bias(name: str, x: Value, y: Value, bias: str) -> Op:
    """y = x + bias, for a bias behind a sum over ranks, whose terms must not have it each."""

    def sums(d: Tensor, sink: Gradient) -> None:
        sink.add(d.sum(0, dtype=torch.float32))

    cost = Cost(1.0 * x.elements, 2 * x.nbytes)
    return Op(
        name=name, reads=(x,), writes=(y,), weights=(bias,), run=lambda x, b: x + b, cost=cost,
        backward=(
            Op(name=name, phase=Phase.B, reads=(grad(y),), writes=(x.gradient,), run=lambda d: d),
            Op(
                name=name, phase=Phase.W, reads=(grad(y),), writes=(), gradients=(bias,), run=sums,
                cost=Cost(1.0 * x.elements, x.nbytes),
            ),
        ),
    )  # fmt: skip


def scale_of(y: Value) -> Value:
    """Declare 1 / rms of a norm with the result y, float32 [T, 1]."""
    keep = max(y.keep, Keep.PAPER)
    return Value(suffixed(y, "scale"), (y.shape[0], 1), torch.float32, shard=y.shard, keep=keep)


def norm(name: str, x: Value, y: Value, weight: str, eps: float, *, skip: Value | None = None) -> Op:
    """y = RMSNorm of x [T, width].

    Args:
        skip: a second name for x, for the residual connection around what follows; its gradient joins in the norm's
            own backward pass instead of a separate addition.
    """
    scale = scale_of(y)
    cost = Cost(4.0 * x.elements, 2 * x.nbytes)

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        out = rms_norm(x, w, eps)
        return (*out, x) if skip else out

    def run_backward(
        x: Tensor, scale: Tensor, dy: Tensor, dskip: Tensor | None, w: Tensor, sink: Gradient
    ) -> Tensor:
        dx, dw = rms_norm_backward(dy, x, w, scale, dskip)
        sink.add(dw)
        return dx

    backward = Op(
        name=name, phase=Phase.B, reads=(x, scale, grad(y), grad(skip) if skip else ""), writes=(x.gradient,),
        weights=(weight,), gradients=(weight,), run=run_backward, cost=Cost(2 * cost.flops, 2 * cost.memory_bytes),
    )
    return Op(
        name=name, reads=(x,), writes=(y, scale, skip) if skip else (y, scale), weights=(weight,), run=run, cost=cost,
        backward=(backward,),
    )


def add_norm(name: str, terms: tuple[Value, Value], total: Value, y: Value, weight: str, eps: float) -> Op:
    """total = sum of terms, y = RMSNorm(total): the residual addition and the norm behind it, one pass backward."""
    scale = scale_of(y)
    cost = Cost(5.0 * total.elements, 4 * total.nbytes)

    def run(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return add_rms_norm(a, b, w, eps)

    def run_backward(
        x: Tensor, scale: Tensor, dy: Tensor, dtotal: Tensor | None, w: Tensor, sink: Gradient
    ) -> tuple[Tensor, Tensor]:
        dx, dw = rms_norm_backward(dy, x, w, scale, dtotal)
        sink.add(dw)
        return dx, dx

    backward = Op(
        name=name, phase=Phase.B, reads=(total, scale, grad(y), grad(total)),
        writes=tuple(term.gradient for term in terms), weights=(weight,), gradients=(weight,), run=run_backward,
        cost=Cost(2 * cost.flops, 2 * cost.memory_bytes),
    )
    again = Op(
        name=name, reads=(total,), writes=(y, scale), weights=(weight,), run=lambda x, w: rms_norm(x, w, eps),
        cost=Cost(4.0 * total.elements, 2 * total.nbytes),
    )
    return Op(
        name=name, reads=terms, writes=(total, y, scale), weights=(weight,), run=run, cost=cost, backward=(backward,),
        redo=(again,),
    )


def add(name: str, terms: tuple[Value, ...], total: Value) -> Op:
    """total = sum of terms."""

    def run(*parts: Tensor) -> Tensor:
        out = torch.add(parts[0], parts[1])
        for part in parts[2:]:
            out += part
        return out

    def run_backward(d: Tensor) -> Any:
        return (d,) * len(terms)

    backward = Op(
        name=name, phase=Phase.B, reads=(grad(total),), writes=tuple(term.gradient for term in terms), run=run_backward
    )
    cost = Cost(0.0, (len(terms) + 1) * total.nbytes)
    return Op(name=name, reads=terms, writes=(total,), run=run, cost=cost, backward=(backward,))


def activation(name: str, x: Value, y: Value, spec: LayerSpec) -> Op:
    """The layer's activation, [T, 2 * width] -> [T, width]."""
    cost, clamp = Cost(5.0 * y.elements, 3 * y.nbytes), spec.clamp
    backward = Op(
        name=name, phase=Phase.B, reads=(x, grad(y)), writes=(x.gradient,),
        run=lambda x, dy: swiglu_backward(dy, x, None, clamp)[0], cost=Cost(2 * cost.flops, 5 / 3 * cost.memory_bytes),
    )
    return Op(
        name=name, reads=(x,), writes=(y,), run=lambda x: swiglu(x, None, clamp), cost=cost, backward=(backward,)
    )


def gate(name: str, y: Value, x: Value, out: Value, weight: str) -> Op:
    """out = y * sigmoid(x @ weight.T), one gate per token."""
    opened = Value(suffixed(out, "opened"), (x.shape[0], 1), x.dtype, shard=x.shard)

    def run(y: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        opened = (x @ w.t()).sigmoid()
        return y * opened, opened

    def run_backward(
        y: Tensor, x: Tensor, opened: Tensor, d: Tensor, w: Tensor, sink: Gradient
    ) -> tuple[Tensor, Tensor]:
        slope = (d * y).sum(-1, keepdim=True) * opened * (1 - opened)
        sink.add_mm(slope.t(), x)
        return d * opened, slope * w

    cost = Cost(2.0 * x.elements, 3 * x.nbytes)
    backward = Op(
        name=name, phase=Phase.B, reads=(y, x, opened, grad(out)), writes=(y.gradient, x.gradient), weights=(weight,),
        gradients=(weight,), run=run_backward, cost=Cost(2 * cost.flops, 2 * cost.memory_bytes),
    )
    return Op(
        name=name, reads=(y, x), writes=(out, opened), weights=(weight,), run=run, cost=cost, backward=(backward,)
    )
