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
from megascale_moe.engine.op import FREE, Cost, Op


def autograd_op(
    name: str,
    function: Callable[..., Any],
    *,
    reads: Sequence[str],
    differentiable: Sequence[str],
    writes: Sequence[str],
    weights: Sequence[str] = (),
    constants: Sequence[str] = (),
    cost: Cost = FREE,
) -> Op:
    """Return an operator made of a plain differentiable `function(*reads, *weights, *constants) -> writes`.

    Args:
        differentiable: those of `reads` that get a gradient; `weights` always do, `constants` never.
    """
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
        outputs, slopes = [], []
        for output, slope in zip(result if isinstance(result, tuple) else (result,), gradients, strict=True):
            if slope is not None and output.requires_grad:
                outputs.append(output)
                slopes.append(slope)
        leaves = [values[slot] for slot in leaf_slots]
        # Zeros where an input had no part in it: the list of operators has promised a gradient to whoever reads it.
        results = torch.autograd.grad(outputs, leaves, slopes, allow_unused=True, materialize_grads=True)
        for sink, value in zip(sinks, results[len(slots) :], strict=True):
            sink.add(value)
        return results[: len(slots)]

    op = Op(name, tuple(reads), tuple(writes), function, weights=(*weights, *constants), cost=cost)
    return op.input_gradient(
        differentiable, (*reads, *map(grad, writes)), run_backward, weights=op.weights, gradients=tuple(weights),
        cost=cost.times(3),
    )  # fmt: skip
