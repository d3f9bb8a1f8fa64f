"""Where every weight of the model lies on a rank of a layout: the strategies' other half.

`attention.py`, `experts.py`, `dense.py` and `vocabulary.py` say what a rank does with its part of a weight, this
module says which part that is. Every gradient is a partial sum on each rank that holds the part (of its own tokens
where tokens are sharded, of its own heads where heads are), so `Placement.replicas` is all that synchronisation needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.model.counts import parameter_shapes
from megascale_moe.model.transformer import initialise
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.placement import Box, Placement, columns, everything, rows, share
from megascale_moe.strategies.stages import Part

Rule = Callable[[tuple[int, ...]], Placement]
REPLICATED, TENSOR, EXPERTS, TIED = (
    ("node", "tensor_data"), ("", "tensor_data"), ("", "expert_data"), ("node", "tied"),
)  # fmt: skip


def placements(config: ModelConfig, layout: Layout, part: Part) -> dict[str, Placement]:
    """Name -> placement of the weights of this rank's part of the model."""
    shapes = parameter_shapes(config)
    return {name: _place(name, shape, config, layout) for name, shape in shapes.items() if _held(name, config, part)}


def _held(name: str, c: ModelConfig, part: Part) -> bool:
    if name.startswith("layers."):
        return int(name.split(".")[1]) in part.layers
    if name == "embedding.weight":
        return part.first or (part.last and c.tied_embeddings)
    return part.last


def _place(name: str, whole: tuple[int, ...], c: ModelConfig, layout: Layout) -> Placement:
    if name in ("embedding.weight", "head.weight"):
        return _vocabulary(name, whole, c, layout)
    if ".experts." in name:
        return _experts(name, whole, layout)
    inside = name.split(".", 2)[-1]
    rule = _attention_rules(c, layout).get(inside) or _ffn_rules(layout).get(inside)
    return rule(whole) if rule else everything(whole, REPLICATED)


def _vocabulary(name: str, whole: tuple[int, ...], c: ModelConfig, layout: Layout) -> Placement:
    inter = "tied" if c.tied_embeddings else "tensor_data"
    if not layout.shards_vocabulary:
        return everything(whole, ("node", inter))
    return rows(whole, [share(whole[0], layout.node.size, layout.node.index)], ("", inter))


def _experts(name: str, whole: tuple[int, ...], layout: Layout) -> Placement:
    """Experts by index over ep, each one's width over etp: rows of w13 (gate and up), columns of w2."""
    experts, outputs, inputs = whole
    mine = share(experts, layout.ep.size, layout.ep.index)
    etp = layout.etp
    if etp.size == 1:
        return rows(whole, [mine], EXPERTS)
    if name.endswith("w2"):
        width = share(inputs, etp.size, etp.index)
        shape = (len(mine), outputs, len(width))
        return Placement(whole, shape, (((mine.start, 0, width.start), shape),), EXPERTS)
    halves = _halves(outputs, etp.size, etp.index)
    boxes: tuple[Box, ...] = tuple(
        ((expert, half.start, 0), (1, len(half), inputs)) for expert in mine for half in halves
    )
    return Placement(whole, (len(mine), sum(map(len, halves)), inputs), boxes, EXPERTS)


def _halves(size: int, parts: int, index: int) -> list[range]:
    """A share of the gate rows and the same share of the up rows of a fused w13."""
    half = share(size // 2, parts, index)
    return [half, range(size // 2 + half.start, size // 2 + half.stop)]


def _attention_rules(c: ModelConfig, layout: Layout) -> dict[str, Rule]:
    """Tensor parallelism: a rank has the rows of its heads, and the columns of the output projection behind them."""
    n, index = layout.node.size, layout.node.index
    if layout.attention != "tp" or n == 1:
        return {}

    def heads(whole: tuple[int, ...]) -> Placement:
        return rows(whole, [share(whole[0], n, index)], TENSOR)

    def qkv(whole: tuple[int, ...]) -> Placement:
        ranges, start = [], 0
        for size in (c.heads * c.query_dim, c.kv_heads * c.query_dim, c.kv_heads * c.value_dim):
            mine = share(size, n, index)
            ranges.append(range(start + mine.start, start + mine.stop))
            start += size
        return rows(whole, ranges, TENSOR)

    return {
        "attention.qkv.weight": qkv,
        "attention.q_up.weight": heads,
        "attention.kv_up.weight": heads,
        "attention.out.weight": lambda whole: columns(whole, share(whole[1], n, index), TENSOR),
    }


def _ffn_rules(layout: Layout) -> dict[str, Rule]:
    """Tensor-parallel dense and shared FFNs; with experts parallel by index these are replicated."""
    n, index = layout.etp.size, layout.etp.index
    if not layout.tensor_ffn:
        return {}

    def up(whole: tuple[int, ...]) -> Placement:
        return rows(whole, _halves(whole[0], n, index), TENSOR)

    def down(whole: tuple[int, ...]) -> Placement:
        return columns(whole, share(whole[1], n, index), TENSOR)

    return {f"ffn.{infix}{name}.weight": rule
            for infix in ("", "shared.") for name, rule in (("w13", up), ("w2", down))}  # fmt: skip


def initial(name: str, placement: Placement, config: ModelConfig, seed: int) -> Tensor:
    """Initial values of a rank's part, float32: those that the whole model has there, whatever the layout.

    Experts are drawn one by one, so that a rank draws only its own; other weights whole.
    """
    if ".experts." not in name:
        whole = torch.empty(placement.whole)
        initialise(name, whole, config, seed)
        return placement.take(whole)
    first = placement.boxes[0][0][0]
    stack = torch.empty(placement.shape[0], *placement.whole[1:])
    initialise(name, stack, config, seed, first)
    boxes = tuple(((offset[0] - first, *offset[1:]), size) for offset, size in placement.boxes)
    return replace(placement, boxes=boxes).take(stack)
