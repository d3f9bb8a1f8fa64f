"""What one layer computes: the layers of a model may differ, and whoever needs to know how asks a layer's spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerSpec:
    """What distinguishes the kinds of layers of a model; sizes that all layers share stand in `ModelConfig`.

    Attributes:
        window: latest tokens that a token attends to, itself included; 0: every earlier token of the document.
        attention_bias: whether the projections in front of and behind attention have biases. sinks: whether a learned
            logit per head takes a share of every softmax.
        dense: whether its feed-forward network is a plain one instead of experts. router_bias, expert_bias: whether
            the router's logits and both products of every expert have biases.
    """

    attention: Literal["gqa", "mla"]
    qk_norm: Literal["none", "head", "full"]
    window: int
    attention_bias: bool
    sinks: bool
    dense: bool
    router_bias: bool
    expert_bias: bool
    activation: Literal["swiglu"]
