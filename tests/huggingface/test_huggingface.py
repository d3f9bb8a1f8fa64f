"""The reference model against transformers: the same weights give the same logits, loss and gradients.

`oracles.CASES` x `oracles.SHAPES` cover every branch of the four families; the mapping of configs and weights is tested
by the same runs, and on its own for what they do not reach: released config files, checkpoints on disk, refusals.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megascale_moe.config import ConfigError, ModelConfig
from megascale_moe.huggingface.conversion import (
    config_from_huggingface,
    config_to_huggingface,
    parameters_from_huggingface,
    parameters_to_huggingface,
)
from megascale_moe.model.router import balance_sum, balance_weights, route
from megascale_moe.presets import PRESETS
from tests.oracles import CASES, SHAPES, batch, case, errors, oracle, relative_error, run, worst

pytestmark = pytest.mark.bulky  # transformers

# float32 carries 6e-8 per operation; two layers with their backward chain some hundred dependent sums of up to 64
# terms, taken in another order by each side. Measured: 1e-6 for logits, at worst 5e-6 for a gradient.
TOLERANCE = 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_every_gradient_equal_transformers(name: str, shape: tuple[int, int]) -> None:
    theirs = case(name)
    tokens, targets = batch(theirs.config, *shape)
    found = errors(run(theirs.ours(), tokens, targets), theirs.run(tokens, targets))
    tensor, error = worst(found)
    assert error < TOLERANCE, f"{tensor}: {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_cases_give_every_parameter_a_gradient(name: str) -> None:
    """Else the comparison above would hold for parameters that take part in nothing."""
    theirs = case(name)
    result = theirs.run(*batch(theirs.config, 2, 37))
    dead = [name for name, gradient in result.gradients.items() if not gradient.abs().max() > 0]
    # A softmax over one expert is 1 whatever the router says; GPT-OSS takes it over the chosen ones.
    constant_gate = theirs.config.experts == 1 or name == "gpt-oss-k1"
    assert dead == ([name for name in result.gradients if ".router." in name] if constant_gate else [])


@pytest.mark.parametrize(("experts", "top_k"), [(5, 2), (8, 8), (7, 1)])
def test_balance_loss_is_theirs_over_top_k(experts: int, top_k: int) -> None:
    """transformers: E sum f P over all tokens; ours: E / k sum f P per document. Their mask picks one document."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = ModelConfig(experts=experts, top_k=top_k)
    lengths = torch.tensor([13, 1, 24])
    documents = torch.repeat_interleave(torch.arange(3), lengths)
    logits = torch.randn(38, experts, generator=torch.Generator().manual_seed(1)).requires_grad_()
    _, choice, probabilities = route(logits, None, config)
    ours = top_k * balance_sum(probabilities, documents, balance_weights(choice, documents, lengths, config))
    theirs = torch.zeros(())
    for document, length in enumerate(lengths.tolist()):
        mask = (documents == document).long()[None]
        theirs = theirs + length * load_balancing_loss_func((logits,), experts, top_k, mask)
    our_gradient, their_gradient = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    # One softmax and one weighted sum of 38 x experts terms: a few roundings.
    assert relative_error(ours.detach(), theirs.detach()) < 1e-6
    # With k = E every f is 1 and the gradient is zero but for rounding: compare with the size of its terms, P <= 1.
    assert relative_error(our_gradient, their_gradient, floor=1.0) < 1e-6


@pytest.mark.parametrize("name", ["mixtral-tied", "qwen3-dense-first", "olmoe", "deepseek", "deepseek-direct-query"])
def test_checkpoint_saved_by_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    """Saved files hold one tensor per expert, the module holds fused ones."""
    theirs = case(name)
    theirs.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert any("experts.0." in key for key in saved)
    assert_equal(parameters_from_huggingface(saved, theirs.config), theirs.parameters)


@pytest.mark.parametrize(
    "name",
    [
        "mixtral", "mixtral-tied", "mixtral-window", "qwen3-dense-first", "qwen3-window", "qwen3-yarn", "olmoe",
        "deepseek", "deepseek-yarn",
    ],
)  # fmt: skip
def test_checkpoint_written_by_us_loads_in_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    theirs = case(name)
    tokens, _ = batch(theirs.config, 2, 9)
    state = parameters_to_huggingface(theirs.parameters, theirs.config)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    raw = config_to_huggingface(theirs.config)
    transformers.AutoConfig.for_model(**raw).save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.get_input_embeddings().padding_idx is None  # the default of OLMoE would freeze row 1
    # The same program on the same weights.
    assert torch.equal(loaded(tokens).logits, theirs.model(tokens).logits)


@pytest.mark.parametrize("name", CASES)
def test_configs_and_parameters_survive_a_round_trip(name: str) -> None:
    theirs = case(name)
    assert same_model(config_from_huggingface(config_to_huggingface(theirs.config)), theirs.config)
    state = parameters_to_huggingface(theirs.parameters, theirs.config)
    assert_equal(parameters_from_huggingface(state, theirs.config), theirs.parameters)


DEEPSEEK_YARN: dict[str, Any] = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
RELEASED: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024,
        "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": {"quant_method": "fp8"},
        "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 129280,
        "rope_scaling": DEEPSEEK_YARN,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "attention_bias": True,
        "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
        "quantization_config": {"quant_method": "mxfp4"}, "rms_norm_eps": 1e-05, "rope_theta": 150000,
        "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "vocab_size": 201088,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_our_presets(name: str) -> None:
    preset = PRESETS[name]
    if name == "deepseek-v3":  # the preset is the model as pre-trained, the release has its context stretched
        preset = replace(preset, rope_factor=40.0, rope_mscale_all_dim=1.0)
    assert same_model(config_from_huggingface(RELEASED[name]), preset)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral-8x7b", {"model_type": "llama"}, "model_type = 'llama' is not supported; known: mixtral, qwen3_moe"),
        ("mixtral-8x7b", {"hidden_act": "gelu"}, "mixtral: hidden_act = 'gelu' is not supported, only 'silu'"),
        ("mixtral-8x7b", {"vocab_size": None}, "mixtral config: key 'vocab_size' is missing"),
        ("mixtral-8x7b", {"hidden_size": "wide"}, "model.hidden = 'wide': must be of type int"),
        ("mixtral-8x7b", {"num_key_value_heads": 5}, "model.heads = 32 is not divisible by model.kv_heads = 5"),
        ("mixtral-8x7b", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear' is not supported"),
        ("mixtral-8x7b", {"rope_scaling": {"type": "yarn"}}, "YaRN needs 'factor'"),
        ("qwen3-30b-a3b", {"attention_bias": True}, "qwen3_moe: attention_bias = True is not supported, only False"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported, only 1"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [3]}, "mlp_only_layers = [3]: only the first layers can be dense"),
        ("olmoe-1b-7b", {"clip_qkv": 8.0}, "olmoe: clip_qkv = 8.0 is not supported, only null"),
        ("gpt-oss-20b", {"layer_types": ["full_attention", "sliding_attention"] * 12}, "full attention has to be in"),
        ("gpt-oss-20b", {"rope_scaling": None}, "gpt_oss: rope_type = 'default' is not supported, only 'yarn'"),
        ("gpt-oss-20b", {"attention_bias": False}, "gpt_oss: attention_bias = False is not supported, only True"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported, only 'sigmoid'"),
        ("deepseek-v3", {"rope_scaling": {**DEEPSEEK_YARN, "mscale": 0.7}}, "mscale = 0.7"),
        ("deepseek-v3", {"rope_scaling": {**DEEPSEEK_YARN, "beta_fast": 16}}, "beta_fast = 16"),
        ("deepseek-v3", {"rope_scaling": {**DEEPSEEK_YARN, "attention_factor": 2.0}}, "attention_factor = 2.0"),
    ],
)
def test_what_we_do_not_compute_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_from_huggingface({**RELEASED[name], **changes})
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("preset", "family", "message"),
    [
        ("internal-352b", "", "Hugging Face mixtral cannot express model.shared_experts = 1"),
        ("hunyuan-large", "", "Hugging Face qwen3_moe cannot express model.shared_experts = 1"),
        ("qwen3-30b-a3b", "mixtral", "Hugging Face mixtral cannot express model.qk_norm = 'head'"),
        ("mixtral-8x7b", "deepseek_v3", "model.attention = 'gqa'"),
        ("deepseek-v3", "phi", "model_type = 'phi' is not supported"),
    ],
)
def test_what_a_family_cannot_express_is_refused(preset: str, family: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_to_huggingface(PRESETS[preset], family)
    assert message in str(refusal.value)


def test_a_window_counts_only_where_it_is_in_use() -> None:
    raw = {**RELEASED["qwen3-30b-a3b"], "sliding_window": 4096}
    assert config_from_huggingface(raw).sliding_window == 0
    assert config_from_huggingface({**raw, "use_sliding_window": True}).sliding_window == 4096


def test_presets_of_the_families_survive_a_round_trip() -> None:
    for name in (
        "mixtral-8x7b", "mixtral-8x22b", "phi-3.5-moe", "qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v3", "gpt-oss-20b",
        "gpt-oss-120b",
    ):  # fmt: skip
        assert same_model(config_from_huggingface(config_to_huggingface(PRESETS[name])), PRESETS[name]), name


def test_checkpoint_with_tensors_missing_left_over_or_misshapen_is_refused() -> None:
    theirs = oracle("qwen3_moe")
    state = parameters_to_huggingface(theirs.parameters, theirs.config)
    up, norm = "model.layers.1.mlp.experts.4.up_proj.weight", "model.norm.weight"
    with pytest.raises(ConfigError, match=f"lacks {up}"):
        parameters_from_huggingface({key: value for key, value in state.items() if key != up}, theirs.config)
    with pytest.raises(ConfigError, match=r"1 tensors that the config does not know, first model.layers.0.extra"):
        parameters_from_huggingface({**state, "model.layers.0.extra": torch.ones(1)}, theirs.config)
    with pytest.raises(ConfigError, match=r"model.norm.weight makes norm.weight \(3,\), the config says \(24,\)"):
        parameters_from_huggingface({**state, norm: torch.ones(3)}, theirs.config)
    with pytest.raises(ConfigError, match=r"model.norm.weight is quantized"):
        parameters_from_huggingface({**state, norm: state[norm].to(torch.float8_e4m3fn)}, theirs.config)
    with pytest.raises(ConfigError, match=r"parameter embedding.weight is missing"):
        parameters_to_huggingface({}, theirs.config)


def test_weights_in_mxfp4_are_refused() -> None:
    """As released: blocks and scales in place of the experts' weights."""
    theirs = oracle("gpt_oss")
    state = parameters_to_huggingface(theirs.parameters, theirs.config)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    released = {key: value for key, value in state.items() if key != name} | {f"{name}_blocks": torch.zeros(1)}
    with pytest.raises(ConfigError, match=r"gate_up_proj is quantized \(MXFP4\): convert the checkpoint"):
        parameters_from_huggingface(released, theirs.config)


def test_parts_of_a_checkpoint_that_hold_nothing_of_the_model_are_skipped() -> None:
    """DeepSeek's layer for multi-token prediction, cached rotary tables, the second copy of tied embeddings."""
    theirs = oracle("deepseek_v3", tie_word_embeddings=True)
    state = parameters_to_huggingface(theirs.parameters, theirs.config)
    assert "lm_head.weight" not in state
    extra = {
        "model.layers.2.eh_proj.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "lm_head.weight": state["model.embed_tokens.weight"],
    }
    assert_equal(parameters_from_huggingface({**state, **extra}, theirs.config), theirs.parameters)


def test_dtype_is_kept() -> None:
    theirs = oracle("olmoe")
    parameters = {name: tensor.bfloat16() for name, tensor in theirs.parameters.items()}
    state = parameters_to_huggingface(parameters, theirs.config)
    assert_equal(parameters_from_huggingface(state, theirs.config), parameters)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal bit by bit: mapping only moves numbers."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


# Fields that do not change the output, or only through the properties in `DERIVED`.
LOOSE = {
    "preset", "sequence_length", "balance_loss", "z_loss", "head_dim", "v_head_dim", "kv_heads", "shared_ffn_hidden",
    "shared_experts",
}  # fmt: skip
DERIVED = {"query_dim", "value_dim", "key_heads", "shared_hidden"}


def same_model(a: ModelConfig, b: ModelConfig) -> bool:
    """True if the two agree in all that changes the output; widths may be written out or left to follow."""
    loose = set(LOOSE)
    loose |= set() if a.attention == "mla" else {"qk_nope_head_dim", "kv_lora_rank", "qk_rope_head_dim"}
    loose |= set() if a.dense_layers else {"dense_ffn_hidden"}
    loose |= set() if a.rope_factor > 1 else {"rope_original_length", "rope_mscale_all_dim"}
    names = {field.name for field in fields(a)} - loose | DERIVED
    return all(getattr(a, name) == getattr(b, name) for name in names)
