"""Where every weight of the model lies on a rank of a layout: as the strategies' rules say, and else whole everywhere.

Every gradient is a partial sum on each rank that holds the part (of its own tokens where tokens are sharded, of its own
heads where heads are), so `Placement.replicas` is all that synchronisation needs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.engine.names import parse
from megascale_moe.model.counts import parameter_weights
from megascale_moe.model.transformer import initialise
from megascale_moe.model.weights import Kind
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.placement import Placement, everything
from megascale_moe.strategies.registry import strategies_of
from megascale_moe.strategies.stages import Part
from megascale_moe.strategies.strategy import Rule

REPLICATED = ("node", "tensor_data")


def placements(config: ModelConfig, layout: Layout, part: Part) -> dict[str, Placement]:
    """Return name -> placement of the weights of this rank's part of the model."""
    rules: dict[str, Rule] = {}
    for strategy in strategies_of(layout, config):
        rules |= strategy.rules(config, layout)
    result = {}
    for name, weight in parameter_weights(config).items():
        parsed, embedding = parse(name), weight.kind is Kind.EMBEDDING
        tied = embedding and config.tied_embeddings
        if parsed.layer is None:
            held = (part.first if embedding else part.last) or (part.last and tied)
        else:
            held = parsed.layer in part.layers
        if held:
            rule = rules.get(parsed.tensor)
            placement = rule(weight) if rule else everything(weight.shape, ("node", "tied") if tied else REPLICATED)
            result[name] = replace(placement, matrices=weight.matrices, kind=weight.kind)
    return result


def initial(name: str, placement: Placement, config: ModelConfig, seed: int) -> Tensor:
    """Return the initial values of a rank's part, float32: those that the whole model has there, whatever the layout.

    Experts are drawn one by one, so that a rank draws only its own; other weights whole.
    """
    weight = parameter_weights(config)[name]
    if not weight.by_expert:
        whole = torch.empty(placement.whole)
        initialise(name, whole, weight, config, seed)
        return placement.take(whole)
    first = placement.boxes[0][0][0]
    stack = torch.empty(placement.shape[0], *placement.whole[1:])
    initialise(name, stack, weight, config, seed, first)
    boxes = tuple(((offset[0] - first, *offset[1:]), size) for offset, size in placement.boxes)
    return replace(placement, boxes=boxes).take(stack)
