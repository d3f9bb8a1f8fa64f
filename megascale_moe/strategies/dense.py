"""Operators that need no communication: linear, norm, residual, plain SwiGLU.

Shapes, bytes and FLOPs follow from the values that they read and write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megascale_moe.config import LayerSpec
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad, suffixed
from megascale_moe.engine.op import FREE, Cost, Op, add_all, product
from megascale_moe.engine.value import Keep, Value
from megascale_moe.kernels.activation import swiglu, swiglu_backward
from megascale_moe.kernels.norm import add_rms_norm, rms_norm, rms_norm_backward


def linear(
    name: str, x: Value, y: Value, weight: str, *, rows: Sequence[slice] = (), again: Op | None = None, bias: str = ""
) -> Op:
    """Compute y = x @ weight.T (+ bias), with the input gradient and the weight gradient as separate operators.

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
        outputs = [x @ w[part].t() if b is None else torch.addmm(b[part], x, w[part].t()) for part in parts]
        return torch.cat(outputs, dim=1) if rows else outputs[0]

    def input_gradient(dy: Tensor, w: Tensor) -> Tensor:
        return dy @ (torch.cat([w[part] for part in rows]) if rows else w)

    def weight_gradient(x: Tensor, dy: Tensor, sink: Gradient, bias: Gradient | None = None) -> None:
        if not rows:
            sink.add_mm(dy.t(), x)
            if bias is not None:
                bias.add(dy.sum(0, dtype=torch.float32))
            return
        for part, slope in zip(rows, dy.split(widths, dim=1), strict=True):
            sink.add_mm_at((part,), slope.t(), x)
        if bias is not None:
            for part, total in zip(rows, dy.sum(0, dtype=torch.float32).split(widths), strict=True):
                bias.value()[part] += total

    op = Op(
        name, (x,), (y,), forward, weights=(weight, bias) if bias else (weight,), cost=cost,
        backward=(again,) if again else (),
    ).input_gradient((x,), (grad(y),), input_gradient, weights=(weight,))  # fmt: skip
    return op.weight_gradient((again.writes[0] if again else x, grad(y)), weight_gradient)


def add_bias(name: str, x: Value, y: Value, bias: str) -> Op:
    """Compute y = x + bias, for a bias behind a sum over ranks, whose terms must not have it each."""

    def sums(d: Tensor, sink: Gradient) -> None:
        sink.add(d.sum(0, dtype=torch.float32))

    cost = Cost(1.0 * x.elements, 2 * x.nbytes)
    op = Op(name, (x,), (y,), lambda x, b: x + b, weights=(bias,), cost=cost)
    op = op.input_gradient((x,), (grad(y),), lambda d: d, cost=FREE)
    return op.weight_gradient((grad(y),), sums, cost=Cost(1.0 * x.elements, x.nbytes))


def norm(name: str, x: Value, y: Value, weight: str, eps: float, *, skip: Value | None = None) -> Op:
    """Compute y, the RMSNorm of x [T, width].

    Args:
        skip: a second name for x, for the residual connection around what follows; its gradient joins in the norm's
            own backward pass instead of a separate addition.
    """
    scale = _scale_of(y)

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        out = rms_norm(x, w, eps)
        return (*out, x) if skip else out

    writes = (y, scale, skip) if skip else (y, scale)
    op = Op(name, (x,), writes, run, weights=(weight,), cost=Cost(4.0 * x.elements, 2 * x.nbytes))
    return _with_norm_gradient(op, (x,), (x, scale, grad(y), grad(skip) if skip else ""))


def add_norm(name: str, terms: tuple[Value, Value], total: Value, y: Value, weight: str, eps: float) -> Op:
    """Compute total, the sum of terms, and y = RMSNorm(total): residual addition and norm, one pass backward."""
    scale, weights = _scale_of(y), (weight,)
    redo = Op(
        name, (total,), (y, scale), lambda x, w: rms_norm(x, w, eps), weights=weights,
        cost=Cost(4.0 * total.elements, 2 * total.nbytes),
    )  # fmt: skip
    op = Op(
        name, terms, (total, y, scale), lambda a, b, w: add_rms_norm(a, b, w, eps), weights=weights, redo=(redo,),
        cost=Cost(5.0 * total.elements, 4 * total.nbytes),
    )  # fmt: skip
    return _with_norm_gradient(op, terms, (total, scale, grad(y), grad(total)))


def _scale_of(y: Value) -> Value:
    """Declare 1 / rms of a norm with the result y, float32 [T, 1]."""
    keep = max(y.keep, Keep.PAPER)
    return Value(suffixed(y, "scale"), (y.shape[0], 1), torch.float32, shard=y.shard, keep=keep)


def _with_norm_gradient(op: Op, terms: tuple[Value, ...], reads: tuple[str, ...]) -> Op:
    """Return a norm of the sum of `terms` with its backward, which reads the sum, 1 / rms, and both gradients."""

    def run(x: Tensor, scale: Tensor, dy: Tensor, dx: Tensor | None, w: Tensor, sink: Gradient) -> tuple[Tensor, ...]:
        dx, dw = rms_norm_backward(dy, x, w, scale, dx)
        sink.add(dw)
        return (dx,) * len(terms)

    return op.input_gradient(terms, reads, run, weights=op.weights, gradients=op.weights, cost=op.cost.times(2))


def add(name: str, terms: tuple[Value, ...], total: Value) -> Op:
    """Compute the sum of terms."""
    cost = Cost(memory_bytes=(len(terms) + 1) * total.nbytes)
    op = Op(name, terms, (total,), lambda *terms: add_all(*terms), cost=cost)
    return op.input_gradient(terms, (grad(total),), lambda d: (d,) * len(terms), cost=FREE)


def activation(name: str, x: Value, y: Value, spec: LayerSpec) -> Op:
    """Compute the layer's activation, [T, 2 * width] -> [T, width]."""
    cost, clamp = Cost(5.0 * y.elements, 3 * y.nbytes), spec.clamp
    return Op(name, (x,), (y,), lambda x: swiglu(x, None, clamp), cost=cost).input_gradient(
        (x,), (x, grad(y)), lambda x, dy: swiglu_backward(dy, x, None, clamp)[0], cost=cost.times(2, 5 / 3)
    )


def gate(name: str, y: Value, x: Value, out: Value, weight: str) -> Op:
    """Compute out = y * sigmoid(x @ weight.T), one gate per token."""
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

    cost, weights = Cost(2.0 * x.elements, 3 * x.nbytes), (weight,)
    return Op(name, (y, x), (out, opened), run, weights=weights, cost=cost).input_gradient(
        (y, x), (y, x, opened, grad(out)), run_backward, weights=weights, gradients=weights, cost=cost.times(2)
    )
