"""A small model with the peculiarities of the user's own.

What a layout can get wrong depends on how heads, experts and widths divide over ranks and on which parts the model
has, not on how large they are. So every size becomes as small as it can be while N ranks divide it exactly as far as
they divide the original (`alike`): a layout that the user's model cannot have does not fit the small one either, and
one that copies key heads because there are fewer than ranks still does.

Coefficients of auxiliary losses become large, if they are not zero: a wrong gradient of a loss that counts a
thousandth would hide in the rounding of the others. Weights are spread wide (init_std), so that routers decide.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from megascale_moe.config import ModelConfig

HIDDEN, HEAD_DIM, WIDTH, VOCAB, LENGTH = 32, 4, 16, 64, 16
EXPERTS, HEADS, WINDOW = 16, 64, 6
BALANCE, Z, INIT_STD = 0.5, 0.1, 0.2


def alike(size: int, ranks: int, least: int) -> int:
    """Return the smallest number from `least` on that divides with `ranks` as `size` does; `size` if that is less."""
    wanted = math.gcd(size, ranks)
    return next((value for value in range(least, size) if math.gcd(value, ranks) == wanted), size)


@lru_cache(maxsize=16)
def scaled_down(model: ModelConfig, ranks: int) -> ModelConfig:
    """Return the small model for `ranks` ranks; how many layers it has is up to the layout (`with_layers`)."""
    small = replace(
        model, preset="", hidden=alike(model.hidden, ranks, HIDDEN) if model.expert_bias else HIDDEN,
        vocab=alike(model.vocab, ranks, VOCAB),
        sequence_length=alike(model.sequence_length, 2 * ranks, max(LENGTH, 2 * ranks)), init_std=INIT_STD,
        ffn_hidden=alike(model.ffn_hidden, ranks, WIDTH), shared_experts=min(model.shared_experts, 2),
        shared_ffn_hidden=alike(model.shared_ffn_hidden, ranks, WIDTH + ranks),
        dense_ffn_hidden=alike(model.dense_ffn_hidden, ranks, WIDTH + ranks),
        balance_loss=BALANCE if model.balance_loss else 0.0, z_loss=Z if model.z_loss else 0.0,
        sliding_window=min(model.sliding_window, WINDOW),
    )  # fmt: skip
    return with_layers(_experts(_heads(small, model, ranks), model, ranks), model, 2)


def with_layers(small: ModelConfig, model: ModelConfig, layers: int) -> ModelConfig:
    """Return it with `layers` layers, or as many more as it takes to have one of each kind the user's model has."""
    dense, kinds = sum(spec.dense for spec in model.layer_kinds), len(model.layer_kinds)
    layers = max(layers, kinds)
    return replace(
        small, layers=layers, dense_layers=dense if kinds > dense else layers,
        full_attention_every=min(model.full_attention_every, 2),  # neighbours differ: few layers are of every kind
    )  # fmt: skip


def _heads(small: ModelConfig, model: ModelConfig, ranks: int) -> ModelConfig:
    """Give it as many key heads as the ranks can tell apart, and as many query heads for each as the model has."""
    if model.attention == "mla":
        keys, ratio, theirs, ours = math.gcd(model.heads, ranks), 1, model.qk_nope_head_dim, 8
    else:
        keys, ratio, theirs, ours = (
            math.gcd(model.kv_heads, ranks),
            model.heads // model.kv_heads,
            model.query_dim,
            HEAD_DIM,
        )
    if keys * ratio > HEADS:
        ratio = alike(ratio, ranks, max(2, math.gcd(ratio, ranks)))
    # Values are as wide as the queries' part they belong to where those of the model are.
    values = (ours if model.v_head_dim == theirs else 6) if model.v_head_dim else 0
    return replace(
        small, heads=keys * ratio, kv_heads=keys, head_dim=HEAD_DIM, q_lora_rank=12 if model.q_lora_rank else 0,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=values,
    )  # fmt: skip


def _experts(small: ModelConfig, model: ModelConfig, ranks: int) -> ModelConfig:
    """Give it at most 16 experts (or one per rank); groups and top-k still leave something to choose."""
    most = min(model.experts, max(EXPERTS, ranks))
    wanted = math.gcd(model.experts, ranks)
    experts = next(count for count in range(most, 0, -1) if math.gcd(count, ranks) == wanted)
    groups = math.gcd(model.expert_groups, experts)
    while groups > 1 and experts // groups < 2 < model.experts // model.expert_groups:
        groups = next(g for g in range(groups - 1, 0, -1) if experts % g == 0)
    top_groups = max(1, groups * model.top_groups // model.expert_groups)
    open_ = experts // groups * top_groups
    all_of_them = model.top_k == model.experts // model.expert_groups * model.top_groups
    top_k = open_ if all_of_them else min(model.top_k, max(1, open_ // 2))
    return replace(
        small, experts=experts, top_k=top_k, expert_groups=groups, top_groups=top_groups,
        device_groups=math.gcd(model.device_groups, experts),
    )  # fmt: skip
