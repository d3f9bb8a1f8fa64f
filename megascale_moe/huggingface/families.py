"""The Hugging Face families as data: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, GPT-OSS.

A family says which config key is which field, which values of the other keys we compute, and which of their tensors
make up each of ours. `conversion` interprets the tables; a new family is a new table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megascale_moe.config import ModelConfig, require

REQUIRED = object()


@dataclass(frozen=True)
class ConfigKey:
    """Where one of our config fields stands in theirs.

    Attributes:
        theirs: the key that is written. also: another that is read.
        default: what an absent or null key means.
        write: from the field's value and the whole config to what is written.
    """

    theirs: str
    default: Any = REQUIRED
    also: str = ""
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any, ModelConfig], Any] = lambda value, config: value


@dataclass(frozen=True)
class TensorRule:
    """Which released tensors one of ours concatenates along rows, those of `{expert}` stacked on a new first axis.

    `fused` is the name of the whole tensor inside a module of transformers 5, where that is another one. `transposed`
    and `interleaved` say how theirs differs from ours: its last two dimensions are exchanged, and two halves of the
    output dimension alternate element by element.
    """

    parts: tuple[str, ...]
    fused: str = ""
    transposed: bool = False
    interleaved: bool = False

    @property
    def by_expert(self) -> bool:
        """Return whether every expert has tensors of its own."""
        return "{expert}" in self.parts[0]


Rules = Mapping[str, str | TensorRule]
"""By the name of our tensor; a name of theirs stands for that tensor as it is."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        architecture: its class in transformers.
        keys: by our field. implied: fields that all models of the family have in common.
        supported: by their key, the values that we compute; an absent or null key is one, too.
        layer_rules: the tensors of a layer, without "layers.N." in front of ours and "model.layers.N." of theirs.
    """

    architecture: str
    keys: Mapping[str, ConfigKey]
    implied: Mapping[str, Any]
    supported: Mapping[str, tuple[Any, ...]]
    layer_rules: Rules


def _keys(**keys: str | ConfigKey) -> dict[str, ConfigKey]:
    """Return the keys by our field; a name alone is required and written as it is."""
    return {ours: ConfigKey(key) if isinstance(key, str) else key for ours, key in keys.items()}


def _count_leading(layers: list[int]) -> int:
    """Return how many dense layers there are ([0, 1, 2] -> 3), which come first or not at all."""
    first = list(range(len(layers)))
    require(sorted(layers) == first, f"mlp_only_layers = {layers}: only the first layers can be dense, as in {first}")
    return len(layers)


def _layer_types(layers: int, every: int) -> list[str]:
    """Return the names of full attention in every so many layers (0: in none), of windows in the others."""
    kinds = ("sliding_attention", "full_attention")
    return [kinds[every > 0 and (index + 1) % every == 0] for index in range(layers)]


def _full_attention_every(kinds: list[str]) -> int:
    """Return every how many layers there is full attention; 0: none. The inverse of `_layer_types`."""
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    right = _layer_types(len(kinds), every)
    require(kinds == right, f"layer_types = {kinds}: full attention has to be in every n-th layer, as in {right}")
    return every


COMMON_KEYS = _keys(
    layers="num_hidden_layers",
    hidden="hidden_size",
    heads="num_attention_heads",
    kv_heads="num_key_value_heads",
    vocab="vocab_size",
    sequence_length="max_position_embeddings",
    norm_eps="rms_norm_eps",
    top_k="num_experts_per_tok",
    tied_embeddings=ConfigKey("tie_word_embeddings", False),
    init_std=ConfigKey("initializer_range", 0.02),
    rope_theta=ConfigKey("rope_theta", 10_000.0),
    rope_factor=ConfigKey("factor", 1.0),
    rope_original_length=ConfigKey("original_max_position_embeddings", 4096),
    rope_mscale_all_dim=ConfigKey("mscale_all_dim", 0.0),
)
WINDOWED_KEYS = COMMON_KEYS | _keys(
    head_dim=ConfigKey("head_dim", 0),
    sliding_window=ConfigKey("sliding_window", 0, write=lambda window, config: window or None),
)
BALANCE = ConfigKey("router_aux_loss_coef", 0.0)
NORM_TOP_K = ConfigKey("norm_topk_prob", False)
LOCAL_EXPERTS = ConfigKey("num_local_experts", also="num_experts")
EXPERTS = ConfigKey("num_experts", also="num_local_experts")
DENSE_FFN_HIDDEN = ConfigKey("intermediate_size", 0)

# Dropout and jitter act in training only; we train without.
COMMON_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "rope_type": ("default", "yarn"),
    "beta_fast": (32,),
    "beta_slow": (1,),
    "truncate": (True,),
}

OUTER_RULES: Rules = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
COMMON_RULES: Rules = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
}
GROUPED_QUERY_RULES: Rules = {
    **COMMON_RULES,
    "attention.qkv.weight": TensorRule(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    ),
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
}
LATENT_RULES: Rules = {
    **COMMON_RULES,
    "attention.q_down.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.q_up.weight": "self_attn.q_b_proj.weight",
    "attention.kv_down.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up.weight": "self_attn.kv_b_proj.weight",
}
# Without a query latent their direct projection has the name that grouped-query attention gives it.
DIRECT_QUERY_RULE: Rules = {"attention.q_up.weight": "self_attn.q_proj.weight"}


def _ffn_rules(ours: str, theirs: str) -> Rules:
    return {
        f"{ours}.w13.weight": TensorRule((f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")),
        f"{ours}.w2.weight": f"{theirs}.down_proj.weight",
    }


def _expert_rules(block: str, gate: str, up: str, down: str) -> Rules:
    expert = block + ".experts.{expert}."
    return {
        "ffn.router.weight": TensorRule((f"{block}.gate.weight",), "mlp.gate.weight"),
        "ffn.experts.w13": TensorRule((f"{expert}{gate}.weight", f"{expert}{up}.weight"), "mlp.experts.gate_up_proj"),
        "ffn.experts.w2": TensorRule((f"{expert}{down}.weight",), "mlp.experts.down_proj"),
    }


PROJECTED_EXPERTS = _expert_rules("mlp", "gate_proj", "up_proj", "down_proj")
DENSE_RULES = _ffn_rules("ffn", "mlp")
GPT_OSS_RULES: Rules = {
    **GROUPED_QUERY_RULES,
    "attention.qkv.bias": TensorRule(("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")),
    "attention.out.bias": "self_attn.o_proj.bias",
    "attention.sinks": "self_attn.sinks",
    "ffn.router.weight": "mlp.router.weight",
    "ffn.router.logits_bias": "mlp.router.bias",
    "ffn.experts.w13": TensorRule(("mlp.experts.gate_up_proj",), transposed=True, interleaved=True),
    "ffn.experts.b13": TensorRule(("mlp.experts.gate_up_proj_bias",), interleaved=True),
    "ffn.experts.w2": TensorRule(("mlp.experts.down_proj",), transposed=True),
    "ffn.experts.b2": "mlp.experts.down_proj_bias",
}

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        keys=WINDOWED_KEYS | _keys(balance_loss=BALANCE, experts=LOCAL_EXPERTS, ffn_hidden="intermediate_size"),
        implied={},
        supported={**COMMON_SUPPORTED, "router_jitter_noise": (0.0,)},
        layer_rules={**GROUPED_QUERY_RULES, **_expert_rules("block_sparse_moe", "w1", "w3", "w2")},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        keys=WINDOWED_KEYS
        | _keys(
            balance_loss=BALANCE,
            norm_top_k=NORM_TOP_K,
            experts=EXPERTS,
            ffn_hidden="moe_intermediate_size",
            dense_layers=ConfigKey(
                "mlp_only_layers", 0, read=_count_leading, write=lambda count, config: list(range(count))
            ),
            dense_ffn_hidden=DENSE_FFN_HIDDEN,
        ),
        implied={"qk_norm": "head"},
        supported={**COMMON_SUPPORTED, "decoder_sparse_step": (1,)},
        layer_rules={**GROUPED_QUERY_RULES, **PROJECTED_EXPERTS, **DENSE_RULES},
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        keys=COMMON_KEYS
        | _keys(balance_loss=BALANCE, norm_top_k=NORM_TOP_K, experts=EXPERTS, ffn_hidden="intermediate_size"),
        implied={"qk_norm": "full"},
        supported={**COMMON_SUPPORTED, "clip_qkv": ()},
        layer_rules={**GROUPED_QUERY_RULES, **PROJECTED_EXPERTS},
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        keys=COMMON_KEYS
        | _keys(
            norm_top_k=ConfigKey("norm_topk_prob", True),
            rope_interleaved=ConfigKey("rope_interleave", True),
            q_lora_rank=ConfigKey("q_lora_rank", 0, write=lambda rank, config: rank or None),
            kv_lora_rank="kv_lora_rank",
            qk_nope_head_dim="qk_nope_head_dim",
            qk_rope_head_dim="qk_rope_head_dim",
            v_head_dim="v_head_dim",
            experts=ConfigKey("n_routed_experts", also="num_local_experts"),
            routed_scaling=ConfigKey("routed_scaling_factor", 1.0),
            expert_groups=ConfigKey("n_group", 1),
            top_groups=ConfigKey("topk_group", 1),
            ffn_hidden="moe_intermediate_size",
            shared_experts=ConfigKey("n_shared_experts", 0),
            dense_layers=ConfigKey("first_k_dense_replace", 0),
            dense_ffn_hidden=DENSE_FFN_HIDDEN,
        ),
        implied={"attention": "mla", "score": "sigmoid", "group_score": "top2", "correction_bias": True},
        supported={
            **COMMON_SUPPORTED, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,),
        },
        layer_rules={
            **LATENT_RULES, **PROJECTED_EXPERTS, **DENSE_RULES, **_ffn_rules("ffn.shared", "mlp.shared_experts"),
            "ffn.router.bias": "mlp.gate.e_score_correction_bias",
        },
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        keys=WINDOWED_KEYS
        | _keys(
            balance_loss=BALANCE,
            rope_theta=ConfigKey("rope_theta", 150_000.0),
            rope_truncate=ConfigKey("truncate", True),
            full_attention_every=ConfigKey(
                "layer_types", 2, read=_full_attention_every,
                write=lambda every, config: _layer_types(config.layers, every),
            ),
            experts=LOCAL_EXPERTS,
            ffn_hidden="intermediate_size",
            swiglu_alpha=ConfigKey("swiglu_alpha", 1.702),
            swiglu_limit=ConfigKey("swiglu_limit", 7.0),
        ),
        implied={
            "attention_bias": True, "attention_sinks": True, "router_bias": True, "expert_bias": True,
            "activation": "clamped_swiglu",
        },
        # transformers stretches this family where nothing is said.
        supported={**COMMON_SUPPORTED, "attention_bias": (True,), "rope_type": ("yarn",), "truncate": (True, False)},
        layer_rules=GPT_OSS_RULES,
    ),
}  # fmt: skip
