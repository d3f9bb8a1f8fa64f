"""Parameters and FLOPs, read off the modules (built without storage), never typed in by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from types import MappingProxyType

import torch

from megascale_moe.config import LayerSpec, ModelConfig
from megascale_moe.model.transformer import Transformer
from megascale_moe.model.weights import Weight, weights_of


@dataclass(frozen=True)
class Counts:
    """Sizes of a model: parameters in all, parameters a token passes, FLOPs per trained token."""

    parameters_total: int
    parameters_active: int
    flops_per_token: float


@lru_cache(maxsize=32)  # building hundreds of layers takes a second, and every rank of a layout asks
def parameter_weights(config: ModelConfig) -> Mapping[str, Weight]:
    """Return the name of every parameter of the whole model, and what it is."""
    with torch.device("meta"):
        model = Transformer(config)
    return MappingProxyType(weights_of(model))


@lru_cache(maxsize=32)
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the name and the shape of every parameter of the whole model."""
    return MappingProxyType({name: weight.shape for name, weight in parameter_weights(config).items()})


@lru_cache(maxsize=32)
def parameter_matrices(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the matrices that every parameter of the whole model consists of, as their heights in rows."""
    return MappingProxyType({name: weight.matrices for name, weight in parameter_weights(config).items()})


def counts(config: ModelConfig) -> Counts:
    """Count the model; a routed expert is active with probability top_k / experts.

    FLOPs are model FLOPs: forward plus backward (3 x forward), 2 per multiply-add, causal attention at one half,
    nothing recomputed; the embedding look-up is free (paper, section 5).
    """
    total, active, matmul = 0, 0.0, 0.0
    for weight in parameter_weights(config).values():
        size = math.prod(weight.shape)
        used = size * (config.top_k / config.experts if weight.by_expert else 1.0)
        total, active = total + size, active + used
        if weight.kind.multiplies:
            matmul += used
    if config.tied_embeddings:
        matmul += config.vocab * config.hidden
    return Counts(total, round(active), 6 * matmul + 3 * config.layers * attention_flops_per_token(config))


def attention_flops_per_token(config: ModelConfig, spec: LayerSpec | None = None) -> float:
    """Return forward FLOPs of a layer's scores and weighted sum, averaged over the tokens of a full sequence.

    Args:
        spec: of the layer; None: the mean over all layers of the model.
    """
    if spec is None:
        return fmean(attention_flops_per_token(config, spec) for spec in config.layer_specs)
    length = config.sequence_length
    seen = length / 2
    if 0 < spec.window < length:
        seen = spec.window * (1 - spec.window / (2 * length))
    return 2 * seen * config.heads * (config.query_dim + config.value_dim)
