"""The section [model]: what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from annotated_types import Interval

from megascale_moe.config.declare import (
    Amount,
    Doc,
    Experts,
    ExpertsOrZero,
    Factor,
    Heads,
    Layers,
    LayersOrZero,
    Special,
    Text,
    Tokens,
    TokensOrZero,
    Width,
    WidthOrZero,
)
from megascale_moe.config.errors import require
from megascale_moe.config.fields import AS_DECLARED, Choices, checked
from megascale_moe.config.layers import LayerSpec


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is computed. Sizes are elements; the field names are those of the paper's Table 2 where it has them."""

    preset: Annotated[
        Text,
        Doc(
            "Published model that gives the value of every key that the config leaves out.",
            ("model_name", "model_type"),
        ),
        Special("", "none"),
    ] = ""
    layers: Annotated[
        Layers, Doc("Number of transformer layers.", ("num_hidden_layers", "num_layers", "n_layers", "n_layer"))
    ] = 4
    hidden: Annotated[
        Width, Doc("Width of the hidden state (residual stream).", ("hidden_size", "d_model", "n_embd", "embed_dim"))
    ] = 256
    heads: Annotated[
        Heads,
        Doc("Number of attention heads (query heads).", ("num_attention_heads", "num_heads", "n_heads", "n_head")),
    ] = 8
    kv_heads: Annotated[
        Heads,
        Doc(
            "Number of key and value heads, which groups of query heads share (grouped-query attention).",
            ("num_key_value_heads", "num_query_groups", "n_kv_heads"),
        ),
    ] = 2
    head_dim: Annotated[
        WidthOrZero,
        Doc("Width of one attention head.", ("kv_channels", "d_head")),
        Special(0, "hidden / heads"),
    ] = 0
    vocab: Annotated[Tokens, Doc("Number of token ids.", ("vocab_size", "n_vocab"))] = 4096
    sequence_length: Annotated[
        Tokens,
        Doc(
            "Tokens of one training sequence (context length).",
            ("max_position_embeddings", "seq_length", "seq_len", "max_seq_len", "context_length", "block_size"),
        ),
    ] = 512
    norm_eps: Annotated[
        float,
        Interval(ge=0, le=1),
        Doc("Epsilon of every RMSNorm.", ("rms_norm_eps", "layernorm_epsilon", "layer_norm_eps")),
    ] = 1e-5
    tied_embeddings: Annotated[
        bool, Doc("Whether the output head shares its weight with the token embedding.", ("tie_word_embeddings",))
    ] = False
    init_std: Annotated[
        Amount,
        Doc("Standard deviation of the initial weight matrices.", ("initializer_range", "init_method_std")),
    ] = 0.02

    # --- attention ---------------------------------------------------------------------------------------------------

    attention: Annotated[
        Literal["gqa", "mla"],
        Doc("Form of attention: grouped-query (gqa) or multi-head latent attention (mla).", ("attention_type",)),
    ] = "gqa"
    qk_norm: Annotated[
        Literal["none", "head", "full"],
        Doc(
            "RMSNorm of queries and keys: per head (as in Qwen3) or over all heads (full, as in OLMoE).",
            ("qk_layernorm",),
        ),
    ] = "none"
    sliding_window: Annotated[
        TokensOrZero,
        Doc("Latest tokens that a token attends to, itself included.", ("window_size", "attention_window")),
        Special(0, "every earlier token of the document"),
    ] = 0
    full_attention_every: Annotated[
        LayersOrZero,
        Doc(
            "Every so many layers one attends to every earlier token, in spite of the sliding window.",
            ("layer_types", "sliding_window_pattern", "window_attn_skip_freq"),
        ),
        Special(0, "the sliding window holds in all layers"),
    ] = 0
    attention_bias: Annotated[
        bool, Doc("Whether the projections of attention have biases.", ("add_qkv_bias", "use_bias"))
    ] = False
    attention_sinks: Annotated[
        bool,
        Doc("Whether a learned logit per head takes a share of every attention softmax.", ("s_aux", "softmax_offset")),
    ] = False
    rope_theta: Annotated[
        float,
        Interval(gt=1, le=1e30),
        Doc("Base of the frequencies of the rotary position embedding.", ("rotary_base", "rope_base")),
    ] = 10_000.0
    rope_interleaved: Annotated[
        bool,
        Doc(
            "Whether the rotary embedding rotates pairs of neighbours, (0, 1), (2, 3), instead of elements half a head "
            "apart.",
            ("rotary_interleaved", "rope_interleave"),
        ),
    ] = False
    rope_factor: Annotated[
        float,
        Interval(ge=1, le=1e6),
        Doc("Factor by which YaRN extends the context length.", ("factor", "rope_scaling", "yarn_factor")),
        Special(1.0, "no YaRN"),
    ] = 1.0
    rope_original_length: Annotated[
        Tokens,
        Doc("Context length before YaRN extends it.", ("original_max_position_embeddings",)),
    ] = 4096
    rope_truncate: Annotated[
        bool,
        Doc("Whether YaRN rounds the pairs between which it changes from one frequency to the other.", ("truncate",)),
    ] = True
    rope_mscale_all_dim: Annotated[
        Amount,
        Doc(
            "Coefficient by which YaRN scales the softmax with the logarithm of its factor (DeepSeek).",
            ("mscale_all_dim",),
        ),
        Special(0.0, "YaRN scales the rotary table instead"),
    ] = 0.0
    q_lora_rank: Annotated[
        WidthOrZero,
        Doc("Rank of the latent that multi-head latent attention projects queries from."),
        Special(0, "queries are projected from the hidden state"),
    ] = 0
    kv_lora_rank: Annotated[
        Width, Doc("Rank of the latent that multi-head latent attention projects keys and values from.")
    ] = 512
    qk_nope_head_dim: Annotated[
        Width, Doc("Width of the part of a query or key head without rotary embedding (mla).", ("qk_head_dim",))
    ] = 128
    qk_rope_head_dim: Annotated[
        Width,
        Doc("Width of the part of a query or key head with rotary embedding (mla).", ("qk_pos_emb_head_dim",)),
    ] = 64
    v_head_dim: Annotated[
        WidthOrZero,
        Doc("Width of one value head."),
        Special(0, "head_dim, or qk_nope_head_dim with mla"),
    ] = 0

    # --- router ------------------------------------------------------------------------------------------------------

    experts: Annotated[
        Experts,
        Doc(
            "Number of routed experts of a layer.",
            ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
        ),
    ] = 8
    top_k: Annotated[
        Experts,
        Doc(
            "Number of experts that each token is routed to.",
            ("num_experts_per_tok", "moe_router_topk", "moe_top_k", "n_activated_experts"),
        ),
    ] = 2
    score: Annotated[
        Literal["softmax", "sigmoid"],
        Doc("Function that makes scores of the router's logits.", ("scoring_func", "moe_router_score_function")),
    ] = "softmax"
    router_bias: Annotated[
        bool, Doc("Whether the router's logits have a learned bias.", ("moe_router_bias", "add_router_bias"))
    ] = False
    norm_top_k: Annotated[
        bool,
        Doc("Whether the gating weights of a token's experts are normalised to a sum of 1.", ("norm_topk_prob",)),
    ] = True
    routed_scaling: Annotated[
        Factor,
        Doc(
            "Factor on the gating weights of the routed experts.",
            ("routed_scaling_factor", "moe_router_topk_scaling_factor", "route_scale"),
        ),
    ] = 1.0
    expert_groups: Annotated[
        Experts,
        Doc(
            "Number of groups for group-limited routing, in which a token chooses groups before experts.",
            ("n_group", "moe_router_num_groups", "n_expert_groups"),
        ),
        Special(1, "all experts at once"),
    ] = 1
    top_groups: Annotated[
        Experts,
        Doc(
            "Number of expert groups that each token chooses.",
            ("topk_group", "moe_router_group_topk", "n_limited_groups"),
        ),
    ] = 1
    group_score: Annotated[
        Literal["max", "top2"],
        Doc("Score of an expert group: its best expert's (max) or the sum of its two best (top2)."),
    ] = "top2"
    correction_bias: Annotated[
        bool,
        Doc(
            "Whether a bias on the scores, used only to choose experts, balances their load without an auxiliary loss.",
            ("e_score_correction_bias", "moe_router_enable_expert_bias", "aux_loss_free_balancing"),
        ),
    ] = False
    bias_update_rate: Annotated[
        Amount,
        Doc(
            "How far the correction bias of an expert moves in a step.",
            ("moe_router_bias_update_rate", "load_balance_coeff"),
        ),
    ] = 1e-3
    balance_loss: Annotated[
        Amount,
        Doc(
            "Coefficient of the auxiliary load-balancing loss.",
            ("router_aux_loss_coef", "moe_aux_loss_coeff", "aux_loss_alpha"),
        ),
        Special(0.0, "no such loss"),
    ] = 0.0
    balance_granularity: Annotated[
        Literal["expert", "device"],
        Doc("Whether the auxiliary loss balances the load of single experts or of device groups."),
    ] = "expert"
    device_groups: Annotated[
        Experts,
        Doc("Number of groups of experts that count as one device in the auxiliary loss and for the capacity."),
    ] = 1
    z_loss: Annotated[
        Amount,
        Doc("Coefficient of the z-loss on the router's logits.", ("router_z_loss_coef", "moe_z_loss_coeff")),
        Special(0.0, "no such loss"),
    ] = 0.0
    capacity_factor: Annotated[
        Amount,
        Doc(
            "Assignments that a device group takes of a sequence, over its fair share of them; the rest is dropped.",
            ("moe_expert_capacity_factor", "expert_capacity"),
        ),
        Special(0.0, "dropless"),
    ] = 0.0

    # --- feed-forward ------------------------------------------------------------------------------------------------

    ffn_hidden: Annotated[
        Width,
        Doc(
            "Width of the feed-forward network of one expert.",
            ("moe_intermediate_size", "moe_ffn_hidden_size", "moe_inter_dim"),
        ),
    ] = 512
    activation: Annotated[
        Literal["swiglu", "clamped_swiglu"],
        Doc(
            "Activation of the feed-forward networks: SwiGLU, or that of GPT-OSS, which clamps both of its parts.",
            ("hidden_act", "hidden_activation"),
        ),
    ] = "swiglu"
    swiglu_alpha: Annotated[Factor, Doc("Factor on the gate inside the sigmoid of a clamped SwiGLU.")] = 1.702
    swiglu_limit: Annotated[
        Factor, Doc("Magnitude to which a clamped SwiGLU clamps its parts.", ("swiglu_clamp", "moe_swiglu_limit"))
    ] = 7.0
    expert_bias: Annotated[
        bool, Doc("Whether the projections of the routed experts have biases.", ("moe_expert_bias", "add_bias_linear"))
    ] = False
    shared_experts: Annotated[
        ExpertsOrZero,
        Doc("Number of shared experts, which every token passes.", ("n_shared_experts", "num_shared_experts")),
    ] = 0
    shared_ffn_hidden: Annotated[
        WidthOrZero,
        Doc(
            "Width of the feed-forward network of all shared experts together.",
            ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        ),
        Special(0, "shared_experts x ffn_hidden"),
    ] = 0
    shared_gate: Annotated[
        bool, Doc("Whether a sigmoid gate per token scales what the shared experts add.", ("moe_shared_expert_gate",))
    ] = False
    dense_layers: Annotated[
        LayersOrZero,
        Doc(
            "Number of layers at the front that have a dense feed-forward network instead of experts.",
            ("first_k_dense_replace", "n_dense_layers", "mlp_only_layers", "moe_layer_freq"),
        ),
    ] = 0
    dense_ffn_hidden: Annotated[
        WidthOrZero,
        Doc(
            "Width of the feed-forward network of the dense layers.",
            ("intermediate_size", "ffn_hidden_size", "inter_dim"),
        ),
    ] = 0

    @property
    def query_dim(self) -> int:
        """Width of one query or key head."""
        if self.attention == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden // self.heads

    @property
    def value_dim(self) -> int:
        """Width of one value head."""
        if self.v_head_dim:
            return self.v_head_dim
        return self.qk_nope_head_dim if self.attention == "mla" else self.query_dim

    @property
    def key_heads(self) -> int:
        """Key and value heads that take part in attention: MLA expands its latent to one per query head."""
        return self.heads if self.attention == "mla" else self.kv_heads

    @property
    def shared_hidden(self) -> int:
        """Width of the always-on experts together, 0 if there are none."""
        return self.shared_ffn_hidden or self.shared_experts * self.ffn_hidden

    def spec_of(self, index: int, *, dense: bool) -> LayerSpec:
        """Return what a layer at some place of the model computes, with a dense FFN or with experts."""
        full = self.full_attention_every > 0 and (index + 1) % self.full_attention_every == 0
        return LayerSpec(
            attention=self.attention, qk_norm=self.qk_norm, window=0 if full else self.sliding_window,
            attention_bias=self.attention_bias, sinks=self.attention_sinks, dense=dense,
            router_bias=self.router_bias and not dense, expert_bias=self.expert_bias and not dense,
            activation=self.activation, swiglu_alpha=self.swiglu_alpha, swiglu_limit=self.swiglu_limit,
        )  # fmt: skip

    @cached_property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """What each layer computes."""
        return tuple(self.spec_of(index, dense=index < self.dense_layers) for index in range(self.layers))

    @cached_property
    def layer_kinds(self) -> tuple[LayerSpec, ...]:
        """The layers that differ, in the order in which they come first."""
        return tuple(dict.fromkeys(self.layer_specs))

    @cached_property
    def kind_of_layer(self) -> tuple[int, ...]:
        """Of each layer the place in `layer_kinds`."""
        places = {spec: place for place, spec in enumerate(self.layer_kinds)}
        return tuple(places[spec] for spec in self.layer_specs)

    def check(self, choices: Choices = AS_DECLARED) -> None:
        """Raise `ConfigError` if a value is out of its range, or if sizes contradict each other."""
        checked("model", self, choices)
        self._check_heads()
        self._check_router()
        self._check_layers()

    def _check_heads(self) -> None:
        if self.attention == "mla":
            for key in ("attention_bias", "attention_sinks"):
                require(not getattr(self, key), f"model.{key} = true needs model.attention = 'gqa'")
            require(
                self.qk_rope_head_dim % 2 == 0,
                f"model.qk_rope_head_dim = {self.qk_rope_head_dim}: rotary embedding needs an even width",
            )
        if self.attention == "gqa":
            require(
                self.head_dim > 0 or self.hidden % self.heads == 0,
                f"model.hidden = {self.hidden} is not divisible by model.heads = {self.heads}: "
                "change one or set model.head_dim",
            )
            require(
                self.heads % self.kv_heads == 0,
                f"model.heads = {self.heads} is not divisible by model.kv_heads = {self.kv_heads}",
            )
            require(self.query_dim % 2 == 0, f"model.head_dim = {self.query_dim}: rotary embedding needs an even width")

    def _check_router(self) -> None:
        require(self.top_k <= self.experts, f"model.top_k = {self.top_k} exceeds model.experts = {self.experts}")
        require(
            self.experts % self.expert_groups == 0,
            f"model.experts = {self.experts} is not divisible by model.expert_groups = {self.expert_groups}",
        )
        require(
            self.top_groups <= self.expert_groups,
            f"model.top_groups = {self.top_groups}: must be between 1 and model.expert_groups = {self.expert_groups}",
        )
        require(
            self.top_k <= self.experts // self.expert_groups * self.top_groups,
            f"model.top_k = {self.top_k}: the {self.top_groups} chosen groups hold only "
            f"{self.experts // self.expert_groups * self.top_groups} experts",
        )
        require(
            self.expert_groups == 1 or self.group_score == "max" or self.experts // self.expert_groups > 1,
            "model.group_score = 'top2' needs at least two experts per group; use 'max'",
        )
        require(
            self.experts % self.device_groups == 0,
            f"model.experts = {self.experts} is not divisible by model.device_groups = {self.device_groups}",
        )

    def _check_layers(self) -> None:
        require(
            self.full_attention_every == 0 or self.sliding_window > 0,
            f"model.full_attention_every = {self.full_attention_every} needs model.sliding_window",
        )
        require(
            self.dense_layers <= self.layers,
            f"model.dense_layers = {self.dense_layers}: must be 0 to {self.layers}",
        )
        require(
            self.dense_layers == 0 or self.dense_ffn_hidden > 0,
            "model.dense_ffn_hidden must be set where model.dense_layers > 0",
        )
        require(
            not self.shared_gate or self.shared_hidden > 0, "model.shared_gate needs model.shared_experts of at least 1"
        )
