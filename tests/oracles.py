"""Independent answers: small transformers models with random weights, and the same weights under our names.

`oracle` starts from a Hugging Face config, not from ours, so that the mapping of configs is under test as well.
Attention and experts run in transformers' plain ("eager") forms: the fewer fused kernels, the more independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megascale_moe.config import ModelConfig
from megascale_moe.huggingface.conversion import config_from_huggingface, parameters_from_huggingface
from megascale_moe.model.transformer import Transformer

COMMON_SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 128,
    # The default of OLMoE is 1: that embedding row would then get no gradient.
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
DEEPSEEK_SIZES: dict[str, Any] = {
    "num_key_value_heads": 4, "intermediate_size": 20, "moe_intermediate_size": 12, "n_routed_experts": 8,
    "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 10,
    "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32,
    "beta_slow": 1,
}  # fmt: skip

GPT_OSS_SIZES: dict[str, Any] = {  # a limit that clamps a third of the gates
    "intermediate_size": 20, "num_local_experts": 5, "head_dim": 8, "sliding_window": 5, "swiglu_limit": 0.6,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 20, "num_local_experts": 5}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"moe_intermediate_size": 20, "intermediate_size": 28, "num_experts": 5, "head_dim": 8, "norm_topk_prob": True},
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 20, "num_experts": 5}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK_SIZES),
    "gpt_oss": ("GptOss", GPT_OSS_SIZES),
}

# name of a case: (family, what differs from the sizes above). Every branch of the five models is in one of them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {"sliding_window": 5}),
    "mixtral-one-kv-head": ("mixtral", {"num_key_value_heads": 1, "head_dim": 10}),
    "mixtral-k1": ("mixtral", {"num_experts_per_tok": 1}),
    "mixtral-all-experts": ("mixtral", {"num_experts_per_tok": 5}),
    "mixtral-one-expert": ("mixtral", {"num_experts_per_tok": 1, "num_local_experts": 1}),
    "mixtral-tied": ("mixtral", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3_moe", {}),
    "qwen3-unnormalised": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "qwen3-one-kv-head-tied": ("qwen3_moe", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3-k1": ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "qwen3-dense-first": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen3-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}),
    "qwen3-yarn": ("qwen3_moe", {"rope_parameters": YARN}),
    "olmoe": ("olmoe", {}),
    "olmoe-normalised": ("olmoe", {"norm_topk_prob": True}),
    "olmoe-all-experts": ("olmoe", {"num_experts_per_tok": 5, "num_key_value_heads": 1}),
    "deepseek": ("deepseek_v3", {}),
    "deepseek-direct-query": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek-halves": ("deepseek_v3", {"rope_interleave": False}),
    "deepseek-no-groups": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "deepseek-two-shared": ("deepseek_v3", {"n_shared_experts": 2, "norm_topk_prob": False}),
    "deepseek-k1": ("deepseek_v3", {"num_experts_per_tok": 1}),
    "deepseek-all-experts": ("deepseek_v3", {"num_experts_per_tok": 8, "topk_group": 4}),
    "deepseek-yarn": ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "gpt-oss": ("gpt_oss", {}),
    "gpt-oss-three-layers": ("gpt_oss", {"num_hidden_layers": 3, "sliding_window": 1, "num_experts_per_tok": 3}),
    "gpt-oss-one-kv-head": ("gpt_oss", {"num_key_value_heads": 1, "head_dim": 10, "swiglu_limit": 7.0}),
    "gpt-oss-k1": ("gpt_oss", {"num_experts_per_tok": 1, "swiglu_alpha": 0.7}),
    "gpt-oss-all-experts": ("gpt_oss", {"num_experts_per_tok": 5, "tie_word_embeddings": True}),
    "gpt-oss-no-full-layer": ("gpt_oss", {"layer_types": ["sliding_attention"] * 2}),
    "gpt-oss-truncated-yarn": ("gpt_oss", {"rope_parameters": YARN}),
    "deepseek-yarn-scaled-table": ("deepseek_v3", {"rope_parameters": YARN}),
}

# (rows, length): nothing divides anything, a single token, one long row.
SHAPES = ((3, 17), (1, 1), (2, 37), (1, 64))


@dataclass(frozen=True)
class Oracle:
    """A transformers model, our config for it, and its weights under our names (with the correction bias)."""

    model: Any
    config: ModelConfig
    parameters: dict[str, Tensor]

    def ours(self) -> Transformer:
        """Our reference model with these weights."""
        model = Transformer(self.config)
        model.load_state_dict(self.parameters)
        return model

    def run(self, tokens: Tensor, targets: Tensor) -> Result:
        """Logits, mean cross-entropy and gradients of transformers' model."""
        self.model.zero_grad(set_to_none=True)
        # `shift_labels` are targets in place; `labels` would be shifted by one and leave a single token without loss.
        output = self.model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False)
        output.loss.backward()
        return Result(output.logits.detach(), output.loss.detach(), self._gradients())

    def _gradients(self) -> dict[str, Tensor]:
        """Its gradients under our names: the mapping is linear, so it maps gradients like weights."""
        state = {name: torch.zeros_like(value) for name, value in self.model.state_dict().items()}
        state |= {name: value.grad for name, value in self.model.named_parameters() if value.grad is not None}
        trained = dict(self.ours().named_parameters())
        mapped = parameters_from_huggingface(state, self.config)
        return {name: gradient for name, gradient in mapped.items() if name in trained}


@dataclass(frozen=True)
class Result:
    """What two implementations must agree on."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def oracle(family: str, seed: int = 0, **sizes: Any) -> Oracle:
    """A random transformers model of the family; `sizes` are Hugging Face config keys."""
    import transformers  # here and not above: it doubles what every fork of this process has to copy

    prefix, defaults = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(
        **{**COMMON_SIZES, **defaults, **sizes}, attn_implementation="eager", experts_implementation="eager"
    )
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    _randomise(model, seed)
    ours = config_from_huggingface(config.to_dict())
    return Oracle(model, ours, parameters_from_huggingface(model.state_dict(), ours))


def case(name: str, seed: int = 0) -> Oracle:
    """The oracle of one of `CASES`."""
    family, sizes = CASES[name]
    return oracle(family, seed, **sizes)


def batch(config: ModelConfig, rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens and targets, int64 [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(config.vocab, (2, rows, length), generator=generator)
    return tokens, targets


@torch.no_grad()
def _randomise(model: nn.Module, seed: int) -> None:
    """Weights that keep activations near one, norms away from one, and a correction bias that changes choices."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            centre = 0.0 if name.endswith("e_score_correction_bias") else 1.0
            tensor.normal_(centre, 0.2, generator=generator)
        else:
            tensor.normal_(0.0, 1 / math.sqrt(tensor.shape[-1]), generator=generator)


def run(model: Transformer, tokens: Tensor, targets: Tensor) -> Result:
    """Logits, mean cross-entropy and gradients of our reference model."""
    model.zero_grad(set_to_none=True)
    loss = model.losses(tokens, targets)[0] / targets.numel()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return Result(model(tokens).detach(), loss.detach(), gradients)


def errors(ours: Result, theirs: Result) -> dict[str, float]:
    """Relative error of every tensor: largest difference over largest entry.

    The entry counts as at least 1e-2 of the largest gradient entry of the model: gradients that are zero in exact
    arithmetic (the router's with a normalised k = 1, queries and keys of a single token) hold only the rounding of sums
    that cancel, and have no digits to agree on.
    """
    assert ours.gradients.keys() == theirs.gradients.keys()
    floor = 1e-2 * max(float(value.abs().max()) for value in theirs.gradients.values())
    found = {
        "logits": relative_error(ours.logits, theirs.logits),
        "loss": relative_error(ours.loss, theirs.loss),
    }
    return found | {
        name: relative_error(value, theirs.gradients[name], floor) for name, value in ours.gradients.items()
    }


def relative_error(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest entry of `theirs`, which counts as at least `floor`."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), floor, 1e-30)


def worst(found: Mapping[str, float]) -> tuple[str, float]:
    """The tensor with the largest error."""
    return max(found.items(), key=lambda item: item[1])
