"""The Hugging Face families as data: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, GPT-OSS.

A family says which config key is which field, which values of the other keys we compute, and which of their tensors
make up each of ours. `huggingface` interprets the tables; a new family is a new table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megascale_moe.config import ModelConfig, require

REQUIRED = object()


@dataclass(frozen=True)
class ConfigName:
    """One of our config fields: their keys (the first is written, any is read) and what an absent or null key means.

    `write_of` makes what is written of the whole config, where the field alone does not say it.
    """

    ours: str
    theirs: tuple[str, ...]
    default: Any = REQUIRED
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value
    write_of: Callable[[ModelConfig], Any] | None = None


@dataclass(frozen=True)
class NameRule:
    """One of our tensors: the released tensors it concatenates along rows, `{expert}` stacked on a new first axis.

    `whole` is the name of the same tensor inside a module of transformers 5, where that is another one. `transposed`
    and `interleaved` say how theirs differs from it: its last two dimensions are exchanged, and two halves of the
    output dimension alternate element by element.
    """

    ours: str
    parts: tuple[str, ...]
    whole: str = ""
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture: its class in transformers, config fields, implied fields, supported values, and tensors."""

    architecture: str
    fields: tuple[ConfigName, ...]
    implied: Mapping[str, Any]
    supported: Mapping[str, tuple[Any, ...]]
    rules: tuple[NameRule, ...]


def _leading(layers: list[int]) -> int:
    """[0, 1, 2] -> 3: dense layers come first or not at all."""
    first = list(range(len(layers)))
    require(sorted(layers) == first, f"mlp_only_layers = {layers}: only the first layers can be dense, as in {first}")
    return len(layers)


COMMON_FIELDS = (
    ConfigName("layers", ("num_hidden_layers",)),
    ConfigName("hidden", ("hidden_size",)),
    ConfigName("heads", ("num_attention_heads",)),
    ConfigName("kv_heads", ("num_key_value_heads",)),
    ConfigName("vocab", ("vocab_size",)),
    ConfigName("sequence_length", ("max_position_embeddings",)),
    ConfigName("norm_eps", ("rms_norm_eps",)),
    ConfigName("top_k", ("num_experts_per_tok",)),
    ConfigName("tied_embeddings", ("tie_word_embeddings",), False),
    ConfigName("init_std", ("initializer_range",), 0.02),
    ConfigName("rope_theta", ("rope_theta",), 10_000.0),
    ConfigName("rope_factor", ("factor",), 1.0),
    ConfigName("rope_original_length", ("original_max_position_embeddings",), 4096),
    ConfigName("rope_mscale_all_dim", ("mscale_all_dim",), 0.0),
)
HEAD_DIM = ConfigName("head_dim", ("head_dim",), 0)
WINDOW = ConfigName("sliding_window", ("sliding_window",), 0, write=lambda window: window or None)
BALANCE = ConfigName("balance_loss", ("router_aux_loss_coef",), 0.0)
NORM_TOP_K = ConfigName("norm_top_k", ("norm_topk_prob",), False)

# `None` stands for an absent or null key. Dropout and jitter act in training only; we train without.
COMMON_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_type": ("default", "yarn"),
    "beta_fast": (32, None),
    "beta_slow": (1, None),
    "truncate": (True, None),
}

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
COMMON_RULES = (
    NameRule("embedding.weight", ("model.embed_tokens.weight",)),
    NameRule("norm.weight", ("model.norm.weight",)),
    NameRule("head.weight", ("lm_head.weight",)),
    NameRule("layers.{layer}.attention_norm.weight", (LAYER + "input_layernorm.weight",)),
    NameRule("layers.{layer}.ffn_norm.weight", (LAYER + "post_attention_layernorm.weight",)),
    NameRule("layers.{layer}.attention.out.weight", (ATTENTION + "o_proj.weight",)),
)
GROUPED_QUERY_RULES = (
    NameRule(
        "layers.{layer}.attention.qkv.weight",
        (ATTENTION + "q_proj.weight", ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight"),
    ),
    NameRule("layers.{layer}.attention.q_norm.weight", (ATTENTION + "q_norm.weight",)),
    NameRule("layers.{layer}.attention.k_norm.weight", (ATTENTION + "k_norm.weight",)),
)
LATENT_RULES = (
    NameRule("layers.{layer}.attention.q_down.weight", (ATTENTION + "q_a_proj.weight",)),
    NameRule("layers.{layer}.attention.q_norm.weight", (ATTENTION + "q_a_layernorm.weight",)),
    NameRule("layers.{layer}.attention.q_up.weight", (ATTENTION + "q_b_proj.weight",)),
    NameRule("layers.{layer}.attention.kv_down.weight", (ATTENTION + "kv_a_proj_with_mqa.weight",)),
    NameRule("layers.{layer}.attention.kv_norm.weight", (ATTENTION + "kv_a_layernorm.weight",)),
    NameRule("layers.{layer}.attention.kv_up.weight", (ATTENTION + "kv_b_proj.weight",)),
)
# Without a query latent their direct projection has the name that grouped-query attention gives it.
DIRECT_QUERY_RULE = NameRule("layers.{layer}.attention.q_up.weight", (ATTENTION + "q_proj.weight",))
DENSE_RULES = (
    NameRule("layers.{layer}.ffn.w13.weight", (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight")),
    NameRule("layers.{layer}.ffn.w2.weight", (LAYER + "mlp.down_proj.weight",)),
)
SHARED_RULES = (
    NameRule(
        "layers.{layer}.ffn.shared.w13.weight",
        (LAYER + "mlp.shared_experts.gate_proj.weight", LAYER + "mlp.shared_experts.up_proj.weight"),
    ),
    NameRule("layers.{layer}.ffn.shared.w2.weight", (LAYER + "mlp.shared_experts.down_proj.weight",)),
)
CORRECTION_RULE = NameRule("layers.{layer}.ffn.router.bias", (LAYER + "mlp.gate.e_score_correction_bias",))


def _expert_rules(block: str, gate: str, up: str, down: str) -> tuple[NameRule, ...]:
    expert = LAYER + block + ".experts.{expert}."
    return (
        NameRule("layers.{layer}.ffn.router.weight", (LAYER + block + ".gate.weight",), LAYER + "mlp.gate.weight"),
        NameRule(
            "layers.{layer}.ffn.experts.w13",
            (expert + gate + ".weight", expert + up + ".weight"),
            LAYER + "mlp.experts.gate_up_proj",
        ),
        NameRule("layers.{layer}.ffn.experts.w2", (expert + down + ".weight",), LAYER + "mlp.experts.down_proj"),
    )


PROJECTED_EXPERTS = _expert_rules("mlp", "gate_proj", "up_proj", "down_proj")

GPT_OSS_EXPERTS = LAYER + "mlp.experts."
GPT_OSS_RULES = (
    NameRule(
        "layers.{layer}.attention.qkv.bias",
        (ATTENTION + "q_proj.bias", ATTENTION + "k_proj.bias", ATTENTION + "v_proj.bias"),
    ),
    NameRule("layers.{layer}.attention.out.bias", (ATTENTION + "o_proj.bias",)),
    NameRule("layers.{layer}.attention.sinks", (ATTENTION + "sinks",)),
    NameRule("layers.{layer}.ffn.router.weight", (LAYER + "mlp.router.weight",)),
    NameRule("layers.{layer}.ffn.router.logits_bias", (LAYER + "mlp.router.bias",)),
    NameRule(
        "layers.{layer}.ffn.experts.w13", (GPT_OSS_EXPERTS + "gate_up_proj",), transposed=True, interleaved=True
    ),
    NameRule("layers.{layer}.ffn.experts.b13", (GPT_OSS_EXPERTS + "gate_up_proj_bias",), interleaved=True),
    NameRule("layers.{layer}.ffn.experts.w2", (GPT_OSS_EXPERTS + "down_proj",), transposed=True),
    NameRule("layers.{layer}.ffn.experts.b2", (GPT_OSS_EXPERTS + "down_proj_bias",)),
)


def _layer_types(layers: int, every: int) -> list[str]:
    """Full attention in every so many layers (0: in none), sliding windows in the others."""
    kinds = ("sliding_attention", "full_attention")
    return [kinds[every > 0 and (index + 1) % every == 0] for index in range(layers)]


def _every(kinds: list[str]) -> int:
    """["sliding_attention", "full_attention", ...] -> 2: every how many layers there is full attention; 0: none."""
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    right = _layer_types(len(kinds), every)
    require(kinds == right, f"layer_types = {kinds}: full attention has to be in every n-th layer, as in {right}")
    return every


FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        fields=(
            *COMMON_FIELDS, HEAD_DIM, WINDOW, BALANCE,
            ConfigName("experts", ("num_local_experts", "num_experts")),
            ConfigName("ffn_hidden", ("intermediate_size",)),
        ),
        implied={},
        supported={**COMMON_SUPPORTED, "router_jitter_noise": (0.0, None)},
        rules=(*COMMON_RULES, *GROUPED_QUERY_RULES, *_expert_rules("block_sparse_moe", "w1", "w3", "w2")),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        fields=(
            *COMMON_FIELDS, HEAD_DIM, WINDOW, BALANCE, NORM_TOP_K,
            ConfigName("experts", ("num_experts", "num_local_experts")),
            ConfigName("ffn_hidden", ("moe_intermediate_size",)),
            ConfigName("dense_layers", ("mlp_only_layers",), 0, read=_leading, write=lambda count: list(range(count))),
            ConfigName("dense_ffn_hidden", ("intermediate_size",), 0),
        ),
        implied={"qk_norm": "head"},
        supported={**COMMON_SUPPORTED, "decoder_sparse_step": (1, None)},
        rules=(*COMMON_RULES, *GROUPED_QUERY_RULES, *PROJECTED_EXPERTS, *DENSE_RULES),
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        fields=(
            *COMMON_FIELDS, BALANCE, NORM_TOP_K,
            ConfigName("experts", ("num_experts", "num_local_experts")),
            ConfigName("ffn_hidden", ("intermediate_size",)),
        ),
        implied={"qk_norm": "full"},
        supported={**COMMON_SUPPORTED, "clip_qkv": (None,)},
        rules=(*COMMON_RULES, *GROUPED_QUERY_RULES, *PROJECTED_EXPERTS),
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        fields=(
            *COMMON_FIELDS,
            ConfigName("norm_top_k", ("norm_topk_prob",), True),
            ConfigName("rope_interleaved", ("rope_interleave",), True),
            ConfigName("q_lora_rank", ("q_lora_rank",), 0, write=lambda rank: rank or None),
            ConfigName("kv_lora_rank", ("kv_lora_rank",)),
            ConfigName("qk_nope_head_dim", ("qk_nope_head_dim",)),
            ConfigName("qk_rope_head_dim", ("qk_rope_head_dim",)),
            ConfigName("v_head_dim", ("v_head_dim",)),
            ConfigName("experts", ("n_routed_experts", "num_local_experts")),
            ConfigName("routed_scaling", ("routed_scaling_factor",), 1.0),
            ConfigName("expert_groups", ("n_group",), 1),
            ConfigName("top_groups", ("topk_group",), 1),
            ConfigName("ffn_hidden", ("moe_intermediate_size",)),
            ConfigName("shared_experts", ("n_shared_experts",), 0),
            ConfigName("dense_layers", ("first_k_dense_replace",), 0),
            ConfigName("dense_ffn_hidden", ("intermediate_size",), 0),
        ),
        implied={"attention": "mla", "score": "sigmoid", "group_score": "top2", "correction_bias": True},
        supported={
            **COMMON_SUPPORTED,
            "scoring_func": ("sigmoid", None),
            "topk_method": ("noaux_tc", None),
            "moe_layer_freq": (1, None),
        },
        rules=(*COMMON_RULES, *LATENT_RULES, CORRECTION_RULE, *PROJECTED_EXPERTS, *SHARED_RULES, *DENSE_RULES),
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        fields=(
            *COMMON_FIELDS, HEAD_DIM, WINDOW, BALANCE,
            ConfigName("rope_theta", ("rope_theta",), 150_000.0),
            ConfigName("rope_truncate", ("truncate",), True),
            ConfigName(
                "full_attention_every", ("layer_types",), 2, read=_every,
                write_of=lambda config: _layer_types(config.layers, config.full_attention_every),
            ),
            ConfigName("experts", ("num_local_experts", "num_experts")),
            ConfigName("ffn_hidden", ("intermediate_size",)),
            ConfigName("swiglu_alpha", ("swiglu_alpha",), 1.702),
            ConfigName("swiglu_limit", ("swiglu_limit",), 7.0),
        ),
        implied={
            "attention_bias": True, "attention_sinks": True, "router_bias": True, "expert_bias": True,
            "activation": "clamped_swiglu",
        },
        supported={
            **{key: values for key, values in COMMON_SUPPORTED.items() if key != "truncate"},
            "attention_bias": (True, None),
            "rope_type": ("yarn",),  # transformers stretches this family where nothing is said
        },
        rules=(*COMMON_RULES, *GROUPED_QUERY_RULES, *GPT_OSS_RULES),
    ),
}
