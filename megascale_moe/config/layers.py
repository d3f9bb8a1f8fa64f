"""What one layer computes: the layers of a model may differ, and whoever needs to know how asks a layer's spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerSpec:
    """What distinguishes the kinds of layers of a model; sizes that all layers share stand in `ModelConfig`.

    Attributes:
        window: latest tokens that a token attends to, itself included; 0: every earlier token of the document.
        dense: whether its feed-forward network is a plain one instead of experts.
    """

    attention: Literal["gqa", "mla"]
    qk_norm: Literal["none", "head", "full"]
    window: int
    dense: bool
    activation: Literal["swiglu"]
