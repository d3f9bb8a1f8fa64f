"""Operators whose backward is torch autograd on the operator alone.

The default for small or intricate pieces (router, latent attention heads, the attention core): the forward runs on
detached inputs and keeps its local graph as one more named value, which the backward operator reads. Liveness then
treats the graph like any tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megascale_moe.engine.op import Cost, Op, Phase, grad


@dataclass
class Graph:
    """Leaves (inputs, then weights) and outputs of one local graph."""

    leaves: list[Tensor]
    outputs: list[Tensor]


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
    """An operator from a plain differentiable `function(*reads, *weights, *constants) -> writes`.

    Args:
        differentiable: those of `reads` that get a gradient; `weights` always do, `constants` never.
    """
    graph = f"{name}.graph"
    cost = cost or Cost()
    slots = [index for index, read in enumerate(reads) if read in differentiable]
    leaf_slots = [*slots, *range(len(reads), len(reads) + len(weights))]

    def run(*args: Any) -> tuple[Any, ...]:
        values = list(args)
        for slot in leaf_slots:
            values[slot] = values[slot].detach().requires_grad_()
        with torch.enable_grad():
            result = function(*values)
        outputs = result if isinstance(result, tuple) else (result,)
        leaves = [values[slot] for slot in leaf_slots]
        return (*(out.detach() if isinstance(out, Tensor) else out for out in outputs), Graph(leaves, list(outputs)))

    def run_backward(graph: Graph, *rest: Any) -> tuple[Tensor, ...]:
        gradients, sinks = rest[: len(writes)], rest[len(writes) :]
        pairs = [
            (out, gradient)
            for out, gradient in zip(graph.outputs, gradients, strict=True)
            if gradient is not None and out.requires_grad
        ]
        outputs, slopes = [out for out, _ in pairs], [gradient for _, gradient in pairs]
        # Zeros where an input had no part in it: the list of operators has promised a gradient to whoever reads it.
        results = torch.autograd.grad(outputs, graph.leaves, slopes, allow_unused=True, materialize_grads=True)
        for sink, value in zip(sinks, results[len(slots) :], strict=True):
            sink.add(value)
        return results[: len(slots)]

    b = Op(
        name=name,
        reads=(graph, *(grad(w) for w in writes)),
        writes=tuple(grad(reads[slot]) for slot in slots),
        run=run_backward,
        gradients=tuple(weights),
        phase=Phase.B,
        cost=Cost(2 * cost.flops, 2 * cost.memory_bytes),
    )
    return Op(
        name=name,
        reads=tuple(reads),
        writes=(*writes, graph),
        weights=(*weights, *constants),
        run=run,
        cost=cost,
        backward=(b,),
    )


