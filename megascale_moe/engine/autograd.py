"""Operators whose backward is torch autograd on the operator alone.

The default for small or intricate pieces (router, latent attention heads, gates). The backward operator runs the
function a second time, with a graph, and differentiates that: these pieces are bound by memory and cheap, while a graph
kept since the forward holds tensors that no list knows of. So what the backward needs are named values with declared
bytes like any other, which a recomputation policy may keep or drop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Cost, Op, Phase
from megascale_moe.engine.value import gradient_of


def autograd_op(
    name: str,
    function: Callable[..., Any],
    *,
    reads: Sequence[str],
    differentiable: Sequence[str],
    writes: Sequence[str],
    weights: Sequence[str] = (),
    constants: Sequence[str] = (),
    cost: Cost | None = None,
) -> Op:
    """Return an operator made of a plain differentiable `function(*reads, *weights, *constants) -> writes`.

    Args:
        differentiable: those of `reads` that get a gradient; `weights` always do, `constants` never.
    """
    cost = cost or Cost()
    slots = [index for index, read in enumerate(reads) if read in differentiable]
    leaf_slots = [*slots, *range(len(reads), len(reads) + len(weights))]
    inputs = len(reads) + len(weights) + len(constants)

    def run_backward(*args: Any) -> tuple[Tensor, ...]:
        gradients, sinks = args[len(reads) : len(reads) + len(writes)], args[inputs + len(writes) :]
        values = [*args[: len(reads)], *args[len(reads) + len(writes) : inputs + len(writes)]]
        for slot in leaf_slots:
            values[slot] = values[slot].detach().requires_grad_()
        with torch.enable_grad():
            result = function(*values)
        pairs = [
            (out, gradient)
            for out, gradient in zip(result if isinstance(result, tuple) else (result,), gradients, strict=True)
            if gradient is not None and out.requires_grad
        ]
        outputs, slopes = [out for out, _ in pairs], [gradient for _, gradient in pairs]
        leaves = [values[slot] for slot in leaf_slots]
        # Zeros where an input had no part in it: the list of operators has promised a gradient to whoever reads it.
        results = torch.autograd.grad(outputs, leaves, slopes, allow_unused=True, materialize_grads=True)
        for sink, value in zip(sinks, results[len(slots) :], strict=True):
            sink.add(value)
        return results[: len(slots)]

    b = Op(
        name=name,
        reads=(*reads, *map(grad, writes)),
        writes=tuple(map(gradient_of, differentiable)),
        weights=(*weights, *constants),
        run=run_backward,
        gradients=tuple(weights),
        phase=Phase.B,
        cost=Cost(3 * cost.flops, 3 * cost.memory_bytes),
    )
    return Op(
        name=name,
        reads=tuple(reads),
        writes=tuple(writes),
        weights=(*weights, *constants),
        run=function,
        cost=cost,
        backward=(b,),
    )
