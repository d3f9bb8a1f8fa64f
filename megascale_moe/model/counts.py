"""Parameters and FLOPs, read off the modules (built without storage), never typed in by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch

from megascale_moe.config import ModelConfig
from megascale_moe.model.transformer import Transformer


@dataclass(frozen=True)
class Counts:
    """Sizes of a model: parameters in all, parameters a token passes, FLOPs per trained token."""

    parameters_total: int
    parameters_active: int
    flops_per_token: float


@lru_cache(maxsize=32)  # building hundreds of layers takes a second, and every rank of a layout asks
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every parameter of the whole model."""
    with torch.device("meta"):
        model = Transformer(config)
    return MappingProxyType({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})


@lru_cache(maxsize=32)
def parameter_matrices(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the matrices that every parameter of the whole model consists of, as their heights in rows.

    The last two dimensions of a parameter are one matrix, or several on top of each other where a module says so
    (its attribute `stacked`, by the name of the parameter). What is no matrix that maps one hidden state to another
    has none: vectors and products with a vector, the embedding (a table of vectors) and the head.
    """
    with torch.device("meta"):
        model = Transformer(config)
    stacked = {
        f"{prefix}.{name}": heights
        for prefix, module in model.named_modules() for name, heights in getattr(module, "stacked", {}).items()
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        product = name.startswith("layers.") and parameter.dim() > 1 and min(parameter.shape[-2:]) > 1
        found[name] = stacked.get(name, (parameter.shape[-2],)) if product else ()
    return MappingProxyType(found)


def counts(config: ModelConfig) -> Counts:
    """Count the model; a routed expert is active with probability top_k / experts.

    FLOPs are model FLOPs: forward plus backward (3 x forward), 2 per multiply-add, causal attention at one half,
    nothing recomputed; the embedding look-up is free (paper, section 5).
    """
    total, active, matmul = 0, 0.0, 0.0
    for name, shape in parameter_shapes(config).items():
        size = torch.Size(shape).numel()
        used = size * (config.top_k / config.experts if ".experts." in name else 1.0)
        total, active = total + size, active + used
        if name != "embedding.weight" and len(shape) > 1:
            matmul += used
    if config.tied_embeddings:
        matmul += config.vocab * config.hidden
    return Counts(total, round(active), 6 * matmul + 3 * config.layers * attention_flops_per_token(config))


def attention_flops_per_token(config: ModelConfig) -> float:
    """Forward FLOPs of one layer's scores and weighted sum, averaged over the tokens of a full sequence."""
    length = config.sequence_length
    seen = length / 2
    if 0 < config.sliding_window < length:
        seen = config.sliding_window * (1 - config.sliding_window / (2 * length))
    return 2 * seen * config.heads * (config.query_dim + config.value_dim)
