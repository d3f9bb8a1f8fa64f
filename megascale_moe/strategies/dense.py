"""Operators that need no communication: linear, norm, residual, plain SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale_moe.engine.autograd import autograd_op
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Cost, Op, Phase, grad, product
from megascale_moe.kernels.activation import swiglu, swiglu_backward
from megascale_moe.kernels.norm import add_rms_norm, rms_norm, rms_norm_backward
from megascale_moe.strategies.layout import Layout


def linear(
    name: str, x: str, y: str, weight: str, sizes: tuple[int, int], layout: Layout, again: Op | None = None
) -> Op:
    """y = x @ weight.T with the input gradient and the weight gradient as separate operators.

    Args:
        sizes: (inputs, outputs); the weight is [outputs, inputs].
        again: makes x once more for the weight gradient, so that x itself is not kept; it stands before the input
            gradient, which hides it where it is a communication.
    """
    inputs, outputs = sizes
    T = layout.tokens
    cost = product(T, outputs, inputs, layout.bytes(T * inputs, T * outputs, inputs * outputs))

    def weight_gradient(x: Tensor, dy: Tensor, sink: Gradient) -> None:
        sink.add_mm(dy.t(), x)

    return Op(
        name=name, reads=(x,), writes=(y,), weights=(weight,), run=lambda x, w: x @ w.t(), cost=cost,
        backward=(
            *((again,) if again else ()),
            Op(
                name=name, phase=Phase.B, reads=(grad(y),), writes=(grad(x),), weights=(weight,),
                run=lambda dy, w: dy @ w, cost=cost,
            ),
            Op(
                name=name, phase=Phase.W, reads=(again.writes[0] if again else x, grad(y)), writes=(),
                gradients=(weight,), run=weight_gradient, cost=cost,
            ),
        ),
    )


def norm(name: str, x: str, y: str, weight: str, eps: float, layout: Layout, *, width: int, skip: str = "") -> Op:
    """RMSNorm of x [tokens, width].

    Args:
        skip: a second name for x, for the residual connection around what follows; its gradient joins in the norm's
            own backward pass instead of a separate addition.
    """
    scale = f"{y}.scale"
    cost = Cost(4.0 * layout.tokens * width, layout.bytes(2 * layout.tokens * width))

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
        name=name, phase=Phase.B, reads=(x, scale, grad(y), grad(skip) if skip else ""), writes=(grad(x),),
        weights=(weight,), gradients=(weight,), run=run_backward, cost=Cost(2 * cost.flops, 2 * cost.memory_bytes),
    )
    return Op(
        name=name, reads=(x,), writes=(y, scale, skip) if skip else (y, scale), weights=(weight,), run=run, cost=cost,
        backward=(backward,),
    )


def add_norm(name: str, terms: tuple[str, str], total: str, y: str, weight: str, eps: float, layout: Layout,
             width: int) -> Op:
    """total = sum of terms, y = RMSNorm(total): the residual addition and the norm behind it, one pass backward."""
    scale = f"{y}.scale"
    cost = Cost(5.0 * layout.tokens * width, layout.bytes(4 * layout.tokens * width))

    def run(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return add_rms_norm(a, b, w, eps)

    def run_backward(
        x: Tensor, scale: Tensor, dy: Tensor, dtotal: Tensor | None, w: Tensor, sink: Gradient
    ) -> tuple[Tensor, Tensor]:
        dx, dw = rms_norm_backward(dy, x, w, scale, dtotal)
        sink.add(dw)
        return dx, dx

    backward = Op(
        name=name, phase=Phase.B, reads=(total, scale, grad(y), grad(total)), writes=tuple(map(grad, terms)),
        weights=(weight,), gradients=(weight,), run=run_backward, cost=Cost(2 * cost.flops, 2 * cost.memory_bytes),
    )
    again = Op(
        name=name, reads=(total,), writes=(y, scale), weights=(weight,), run=lambda x, w: rms_norm(x, w, eps),
        cost=Cost(4.0 * layout.tokens * width, layout.bytes(2 * layout.tokens * width)),
    )
    return Op(
        name=name, reads=terms, writes=(total, y, scale), weights=(weight,), run=run, cost=cost, backward=(backward,),
        redo=(again,),
    )


def add(name: str, terms: tuple[str, ...], total: str, layout: Layout, width: int) -> Op:
    """total = sum of terms."""

    def run(*parts: Tensor) -> Tensor:
        out = torch.add(parts[0], parts[1])
        for part in parts[2:]:
            out += part
        return out

    def run_backward(d: Tensor) -> Any:
        return (d,) * len(terms)

    cost = Cost(0.0, layout.bytes((len(terms) + 1) * layout.tokens * width))
    return Op(
        name=name, reads=terms, writes=(total,), run=run, cost=cost,
        backward=(
            Op(name=name, phase=Phase.B, reads=(grad(total),), writes=tuple(map(grad, terms)), run=run_backward),
        ),
    )


def activation(name: str, x: str, y: str, layout: Layout, width: int) -> Op:
    """y = silu(a) * b for x = [a, b]: [tokens, 2 * width] -> [tokens, width]."""
    cost = Cost(5.0 * layout.tokens * width, layout.bytes(3 * layout.tokens * width))
    backward = Op(
        name=name, phase=Phase.B, reads=(x, grad(y)), writes=(grad(x),),
        run=lambda x, dy: swiglu_backward(dy, x)[0], cost=Cost(2 * cost.flops, 5 / 3 * cost.memory_bytes),
    )
    return Op(name=name, reads=(x,), writes=(y,), run=swiglu, cost=cost, backward=(backward,))


def dense_ffn(prefix: str, weights: str, x: str, y: str, hidden: int, width: int, gated: bool,
              layout: Layout) -> list[Op]:
    """SwiGLU every token passes (dense layers, shared experts): x [tokens, hidden] -> y of the same shape."""
    out = f"{y}.ungated" if gated else y
    ops = [
        linear(f"{prefix}fc13", x, f"{y}.fc13_out", f"{weights}w13.weight", (hidden, 2 * width), layout),
        activation(f"{prefix}swiglu", f"{y}.fc13_out", f"{y}.fc2_in", layout, width),
        linear(f"{prefix}fc2", f"{y}.fc2_in", out, f"{weights}w2.weight", (width, hidden), layout),
    ]
    if gated:
        ops.append(
            autograd_op(
                f"{prefix}gate", lambda out, x, w: out * (x @ w.t()).sigmoid(), reads=(out, x), differentiable=(out, x),
                writes=(y,), weights=(f"{weights}gate.weight",),
                cost=Cost(2.0 * layout.tokens * hidden, layout.bytes(3 * layout.tokens * hidden)),
            )
        )
    return ops
