"""What one layer computes: the layers of a model may differ, and whoever needs to know how asks a layer's spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["swiglu", "clamped_swiglu"]


@dataclass(frozen=True)
class LayerSpec:
    """What distinguishes the kinds of layers of a model; sizes that all layers share stand in `ModelConfig`.

    Attributes:
        window: latest tokens that a token attends to, itself included; 0: every earlier token of the document.
        attention_bias: whether the projections in front of and behind attention have biases. sinks: whether a learned
            logit per head takes a share of every softmax.
        dense: whether its feed-forward network is a plain one instead of experts. router_bias, expert_bias: whether
            the router's logits and both products of every expert have biases.
        activation: between the two products of an FFN, for gate a and up b: silu(a) * b ("swiglu"), or
            a * sigmoid(alpha * a) * (b + 1) with a <= limit and -limit <= b <= limit ("clamped_swiglu").
        swiglu_alpha, swiglu_limit: of a clamped SwiGLU.
    """

    attention: Literal["gqa", "mla"]
    qk_norm: Literal["none", "head", "full"]
    window: int
    attention_bias: bool
    sinks: bool
    dense: bool
    router_bias: bool
    expert_bias: bool
    activation: Activation
    swiglu_alpha: float
    swiglu_limit: float
