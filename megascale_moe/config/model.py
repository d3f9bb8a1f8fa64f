"""The section [model]: what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from megascale_moe.config.declare import (
    Amount,
    Experts,
    ExpertsOrZero,
    Factor,
    Heads,
    Layers,
    LayersOrZero,
    Text,
    Tokens,
    TokensOrZero,
    Width,
    WidthOrZero,
    key,
)
from megascale_moe.config.fields import AS_DECLARED, Choices, Section, require


@dataclass(frozen=True)
class LayerSpec:
    """What one layer computes: whoever needs to know how layers differ asks a layer's spec, not the config.

    Sizes that all layers share stand in `ModelConfig`.

    Attributes:
        window: latest tokens that a token attends to, itself included; 0: every earlier token of the document.
        attention_bias: whether the projections in front of and behind attention have biases. sinks: whether a learned
            logit per head takes a share of every softmax.
        dense: whether its feed-forward network is a plain one instead of experts. router_bias, expert_bias: whether
            the router's logits and both products of every expert have biases.
        clamp: between the two products of an FFN, for gate a and up b: None for silu(a) * b, or (alpha, limit) for
            a * sigmoid(alpha * a) * (b + 1) with a <= limit and -limit <= b <= limit.
    """

    attention: Literal["gqa", "mla"]
    qk_norm: Literal["none", "head", "full"]
    window: int
    attention_bias: bool
    sinks: bool
    dense: bool
    router_bias: bool
    expert_bias: bool
    clamp: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """What is computed. Sizes are elements; the field names are those of the paper's Table 2 where it has them."""

    section: ClassVar = "model"
    # fmt: off

    preset: Text = key(
        "", "Published model that gives the value of every key that the config leaves out.", "model_name", "model_type",
        least="none",
    )
    layers: Layers = key(4, "Number of transformer layers.", "num_hidden_layers", "num_layers", "n_layers", "n_layer")
    hidden: Width = key(
        256, "Width of the hidden state (residual stream).", "hidden_size", "d_model", "n_embd", "embed_dim"
    )
    heads: Heads = key(
        8, "Number of attention heads (query heads).", "num_attention_heads", "num_heads", "n_heads", "n_head"
    )
    kv_heads: Heads = key(
        2, "Number of key and value heads, which groups of query heads share (grouped-query attention).",
        "num_key_value_heads", "num_query_groups", "n_kv_heads",
    )
    head_dim: WidthOrZero = key(0, "Width of one attention head.", "kv_channels", "d_head", least="hidden / heads")
    vocab: Tokens = key(4096, "Number of token ids.", "vocab_size", "n_vocab")
    sequence_length: Tokens = key(
        512, "Tokens of one training sequence (context length).", "max_position_embeddings", "seq_length", "seq_len",
        "max_seq_len", "context_length", "block_size",
    )
    norm_eps: Annotated[float, Interval(ge=0, le=1)] = key(
        1e-5, "Epsilon of every RMSNorm.", "rms_norm_eps", "layernorm_epsilon", "layer_norm_eps"
    )
    tied_embeddings: bool = key(
        False, "Whether the output head shares its weight with the token embedding.", "tie_word_embeddings"
    )
    init_std: Amount = key(
        0.02, "Standard deviation of the initial weight matrices.", "initializer_range", "init_method_std"
    )

    # --- attention ---------------------------------------------------------------------------------------------------

    attention: Literal["gqa", "mla"] = key(
        "gqa", "Form of attention: grouped-query (gqa) or multi-head latent attention (mla).", "attention_type"
    )
    qk_norm: Literal["none", "head", "full"] = key(
        "none", "RMSNorm of queries and keys: per head (as in Qwen3) or over all heads (full, as in OLMoE).",
        "qk_layernorm",
    )
    sliding_window: TokensOrZero = key(
        0, "Latest tokens that a token attends to, itself included.", "window_size", "attention_window",
        least="every earlier token of the document",
    )
    full_attention_every: LayersOrZero = key(
        0, "Every so many layers one attends to every earlier token, in spite of the sliding window.", "layer_types",
        "sliding_window_pattern", "window_attn_skip_freq", least="the sliding window holds in all layers",
    )
    attention_bias: bool = key(False, "Whether the projections of attention have biases.", "add_qkv_bias", "use_bias")
    attention_sinks: bool = key(
        False, "Whether a learned logit per head takes a share of every attention softmax.", "s_aux", "softmax_offset"
    )
    rope_theta: Annotated[float, Interval(gt=1, le=1e30)] = key(
        10_000.0, "Base of the frequencies of the rotary position embedding.", "rotary_base", "rope_base"
    )
    rope_interleaved: bool = key(
        False, "Whether the rotary embedding rotates pairs of neighbours, (0, 1), (2, 3), instead of elements half a "
        "head apart.", "rotary_interleaved", "rope_interleave",
    )
    rope_factor: Annotated[float, Interval(ge=1, le=1e6)] = key(
        1.0, "Factor by which YaRN extends the context length.", "factor", "rope_scaling", "yarn_factor",
        least="no YaRN",
    )
    rope_original_length: Tokens = key(
        4096, "Context length before YaRN extends it.", "original_max_position_embeddings"
    )
    rope_truncate: bool = key(
        True, "Whether YaRN rounds the pairs between which it changes from one frequency to the other.", "truncate"
    )
    rope_mscale_all_dim: Amount = key(
        0.0, "Coefficient by which YaRN scales the softmax with the logarithm of its factor (DeepSeek).",
        "mscale_all_dim", least="YaRN scales the rotary table instead",
    )
    q_lora_rank: WidthOrZero = key(
        0, "Rank of the latent that multi-head latent attention projects queries from.",
        least="queries are projected from the hidden state",
    )
    kv_lora_rank: Width = key(512, "Rank of the latent that multi-head latent attention projects keys and values from.")
    qk_nope_head_dim: Width = key(
        128, "Width of the part of a query or key head without rotary embedding (mla).", "qk_head_dim"
    )
    qk_rope_head_dim: Width = key(
        64, "Width of the part of a query or key head with rotary embedding (mla).", "qk_pos_emb_head_dim"
    )
    v_head_dim: WidthOrZero = key(0, "Width of one value head.", least="head_dim, or qk_nope_head_dim with mla")

    # --- router ------------------------------------------------------------------------------------------------------

    experts: Experts = key(
        8, "Number of routed experts of a layer.", "num_experts", "n_routed_experts", "num_local_experts",
        "moe_num_experts",
    )
    top_k: Experts = key(
        2, "Number of experts that each token is routed to.", "num_experts_per_tok", "moe_router_topk", "moe_top_k",
        "n_activated_experts",
    )
    score: Literal["softmax", "sigmoid"] = key(
        "softmax", "Function that makes scores of the router's logits.", "scoring_func", "moe_router_score_function"
    )
    router_bias: bool = key(
        False, "Whether the router's logits have a learned bias.", "moe_router_bias", "add_router_bias"
    )
    norm_top_k: bool = key(
        True, "Whether the gating weights of a token's experts are normalised to a sum of 1.", "norm_topk_prob"
    )
    routed_scaling: Factor = key(
        1.0, "Factor on the gating weights of the routed experts.", "routed_scaling_factor",
        "moe_router_topk_scaling_factor", "route_scale",
    )
    expert_groups: Experts = key(
        1, "Number of groups for group-limited routing, in which a token chooses groups before experts.", "n_group",
        "moe_router_num_groups", "n_expert_groups", least="all experts at once",
    )
    top_groups: Experts = key(
        1, "Number of expert groups that each token chooses.", "topk_group", "moe_router_group_topk",
        "n_limited_groups",
    )
    group_score: Literal["max", "top2"] = key(
        "top2", "Score of an expert group: its best expert's (max) or the sum of its two best (top2)."
    )
    correction_bias: bool = key(
        False,
        "Whether a bias on the scores, used only to choose experts, balances their load without an auxiliary loss.",
        "e_score_correction_bias", "moe_router_enable_expert_bias", "aux_loss_free_balancing",
    )
    bias_update_rate: Amount = key(
        1e-3, "How far the correction bias of an expert moves in a step.", "moe_router_bias_update_rate",
        "load_balance_coeff",
    )
    balance_loss: Amount = key(
        0.0, "Coefficient of the auxiliary load-balancing loss.", "router_aux_loss_coef", "moe_aux_loss_coeff",
        "aux_loss_alpha", least="no such loss",
    )
    balance_granularity: Literal["expert", "device"] = key(
        "expert", "Whether the auxiliary loss balances the load of single experts or of device groups."
    )
    device_groups: Experts = key(
        1, "Number of groups of experts that count as one device in the auxiliary loss and for the capacity."
    )
    z_loss: Amount = key(
        0.0, "Coefficient of the z-loss on the router's logits.", "router_z_loss_coef", "moe_z_loss_coeff",
        least="no such loss",
    )
    capacity_factor: Amount = key(
        0.0, "Assignments that a device group takes of a sequence, over its fair share of them; the rest is dropped.",
        "moe_expert_capacity_factor", "expert_capacity", least="dropless",
    )

    # --- feed-forward ------------------------------------------------------------------------------------------------

    ffn_hidden: Width = key(
        512, "Width of the feed-forward network of one expert.", "moe_intermediate_size", "moe_ffn_hidden_size",
        "moe_inter_dim",
    )
    activation: Literal["swiglu", "clamped_swiglu"] = key(
        "swiglu",
        "Activation of the feed-forward networks: SwiGLU, or that of GPT-OSS, which clamps both of its parts.",
        "hidden_act", "hidden_activation",
    )
    swiglu_alpha: Factor = key(1.702, "Factor on the gate inside the sigmoid of a clamped SwiGLU.")
    swiglu_limit: Factor = key(
        7.0, "Magnitude to which a clamped SwiGLU clamps its parts.", "swiglu_clamp", "moe_swiglu_limit"
    )
    expert_bias: bool = key(
        False, "Whether the projections of the routed experts have biases.", "moe_expert_bias", "add_bias_linear"
    )
    shared_experts: ExpertsOrZero = key(
        0, "Number of shared experts, which every token passes.", "n_shared_experts", "num_shared_experts"
    )
    shared_ffn_hidden: WidthOrZero = key(
        0, "Width of the feed-forward network of all shared experts together.", "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size", least="shared_experts x ffn_hidden",
    )
    shared_gate: bool = key(
        False, "Whether a sigmoid gate per token scales what the shared experts add.", "moe_shared_expert_gate"
    )
    dense_layers: LayersOrZero = key(
        0, "Number of layers at the front that have a dense feed-forward network instead of experts.",
        "first_k_dense_replace", "n_dense_layers", "mlp_only_layers", "moe_layer_freq",
    )
    dense_ffn_hidden: WidthOrZero = key(
        0, "Width of the feed-forward network of the dense layers.", "intermediate_size", "ffn_hidden_size",
        "inter_dim",
    )
    # fmt: on

    @property
    def query_dim(self) -> int:
        """Return the width of one query or key head."""
        if self.attention == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden // self.heads

    @property
    def value_dim(self) -> int:
        """Return the width of one value head."""
        if self.v_head_dim:
            return self.v_head_dim
        return self.qk_nope_head_dim if self.attention == "mla" else self.query_dim

    @property
    def key_heads(self) -> int:
        """Return the key and value heads of attention: MLA expands its latent to one per query head."""
        return self.heads if self.attention == "mla" else self.kv_heads

    @property
    def shared_hidden(self) -> int:
        """Return the width of the shared experts together, 0 if there are none."""
        return self.shared_ffn_hidden or self.shared_experts * self.ffn_hidden

    def spec_of(self, index: int, *, dense: bool) -> LayerSpec:
        """Return what a layer at some place of the model computes, with a dense FFN or with experts."""
        full = self.full_attention_every > 0 and (index + 1) % self.full_attention_every == 0
        return LayerSpec(
            attention=self.attention, qk_norm=self.qk_norm, window=0 if full else self.sliding_window,
            attention_bias=self.attention_bias, sinks=self.attention_sinks, dense=dense,
            router_bias=self.router_bias and not dense, expert_bias=self.expert_bias and not dense,
            clamp=None if self.activation == "swiglu" else (self.swiglu_alpha, self.swiglu_limit),
        )  # fmt: skip

    @cached_property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Return what each layer computes."""
        return tuple(self.spec_of(index, dense=index < self.dense_layers) for index in range(self.layers))

    @cached_property
    def layer_kinds(self) -> tuple[LayerSpec, ...]:
        """Return the specs that differ, in the order of their first layers."""
        return tuple(dict.fromkeys(self.layer_specs))

    @cached_property
    def kind_of_layer(self) -> tuple[int, ...]:
        """Return the index in `layer_kinds` of each layer."""
        return tuple(map(self.layer_kinds.index, self.layer_specs))

    def check(self, choices: Choices = AS_DECLARED) -> None:
        """Raise `ConfigError` if a value is out of its range, or if sizes contradict each other."""
        super().check(choices)
        if self.attention == "mla":
            for key in ("attention_bias", "attention_sinks"):
                require(not getattr(self, key), f"model.{key} = true needs model.attention = 'gqa'")
            width, key = self.qk_rope_head_dim, "qk_rope_head_dim"
        else:
            if not self.head_dim:
                self._divides("heads", "hidden", ": change one or set model.head_dim")
            self._divides("kv_heads", "heads")
            width, key = self.query_dim, "head_dim"
        require(width % 2 == 0, f"model.{key} = {width}: rotary embedding needs an even width")
        require(self.top_k <= self.experts, f"model.top_k = {self.top_k} exceeds model.experts = {self.experts}")
        self._divides("expert_groups", "experts")
        require(
            self.top_groups <= self.expert_groups,
            f"model.top_groups = {self.top_groups}: must be between 1 and model.expert_groups = {self.expert_groups}",
        )
        group = self.experts // self.expert_groups
        require(
            self.top_k <= group * self.top_groups,
            f"model.top_k = {self.top_k}: the {self.top_groups} chosen groups hold only "
            f"{group * self.top_groups} experts",
        )
        require(
            self.expert_groups == 1 or self.group_score == "max" or group > 1,
            "model.group_score = 'top2' needs at least two experts per group; use 'max'",
        )
        self._divides("device_groups", "experts")
        require(
            self.full_attention_every == 0 or self.sliding_window > 0,
            f"model.full_attention_every = {self.full_attention_every} needs model.sliding_window",
        )
        require(
            self.dense_layers <= self.layers, f"model.dense_layers = {self.dense_layers}: must be 0 to {self.layers}"
        )
        require(
            self.dense_layers == 0 or self.dense_ffn_hidden > 0,
            "model.dense_ffn_hidden must be set where model.dense_layers > 0",
        )
        require(
            not self.shared_gate or self.shared_hidden > 0, "model.shared_gate needs model.shared_experts of at least 1"
        )

    def _divides(self, key: str, whole: str, hint: str = "") -> None:
        """Raise `ConfigError` unless the size `whole` is a multiple of the size `key`."""
        size, parts = getattr(self, whole), getattr(self, key)
        require(size % parts == 0, f"model.{whole} = {size} is not divisible by model.{key} = {parts}{hint}")
