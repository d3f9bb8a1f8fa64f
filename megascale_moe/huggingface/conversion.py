"""Hugging Face configs and weights to ours and back: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, GPT-OSS.

What the families are is data, in `families`; here is one small interpreter per direction. Released
checkpoints hold one tensor per expert and projection, the modules of transformers 5 hold fused ones; both are read, the
released form is written. What our model does not compute is refused by name, never approximated: a silently different
model costs more than an error.

The coefficient of the balance loss is carried over as a number. Its meaning differs (transformers pools all documents
and layers and does not divide by top_k), so no factor would make the two losses equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from megascale_moe.config import ConfigError, ModelConfig, from_dict, require
from megascale_moe.huggingface.families import DIRECT_QUERY_RULE, FAMILIES, OUTER_RULES, REQUIRED, Family, TensorRule
from megascale_moe.model.transformer import Transformer

# Fields that train a model but do not change what it computes; capacity is one, because released models drop nothing.
TRAINING_FIELDS = (
    "preset", "sequence_length", "init_std", "balance_loss", "balance_granularity", "device_groups", "z_loss",
    "bias_update_rate", "capacity_factor",
)


def config_from_huggingface(raw: Mapping[str, Any]) -> ModelConfig:
    """Return our config for the contents of a `config.json` (of transformers 4 or 5).

    `sequence_length` becomes the longest context the model supports; override it to train on shorter rows.

    Raises:
        ConfigError: an unknown family, a missing key, or something we do not compute.
    """
    name = str(raw.get("model_type"))
    family = _family(name)
    flat = _flatten(raw)
    for key, allowed in family.supported.items():
        right = " or ".join(map(repr, allowed)) or "null"
        require(flat.get(key) in (*allowed, None), f"{name}: {key} = {flat.get(key)!r} is not supported, only {right}")
    values = dict(family.implied)
    for ours, field in family.keys.items():
        theirs = next((key for key in (field.theirs, field.also) if key in flat), None)
        require(bool(theirs) or field.default is not REQUIRED, f"{name} config: key {field.theirs!r} is missing")
        values[ours] = field.read(flat[theirs]) if theirs else field.default
    if flat["rope_type"] == "yarn":
        _check_yarn(flat, name, latent=values.get("attention") == "mla")
    return from_dict({"model": values}, where=f"{name} config").model


def _family(name: str) -> Family:
    require(name in FAMILIES, f"model_type = {name!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return one level without nulls: the rotary dictionary of either transformers merged in, defaults filled."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    flat = {key: value for key, value in {**raw, **rope}.items() if value is not None}
    flat.setdefault("num_key_value_heads", flat.get("num_attention_heads"))
    if flat["rope_type"] == "default":  # what a stretched table would need is inert
        flat = {key: value for key, value in flat.items() if key not in ("factor", "mscale", "mscale_all_dim")}
    if not flat.get("use_sliding_window", True):
        flat.pop("sliding_window", None)
    return flat


def _check_yarn(flat: Mapping[str, Any], name: str, *, latent: bool) -> None:
    """Refuse the forms of YaRN whose attention factor is not ours."""
    for key in ("factor", "original_max_position_embeddings"):
        require(key in flat, f"{name}: YaRN needs {key!r} in rope_scaling")
    all_dim, factor = flat.get("mscale_all_dim", 0.0), flat["factor"]
    require(
        not all_dim or (latent and flat.get("mscale") == all_dim),
        f"{name}: mscale = {flat.get('mscale')!r} with mscale_all_dim = {all_dim!r} is not supported",
    )
    ours = 1.0 if all_dim or factor <= 1 else 0.1 * math.log(factor) + 1.0
    given = flat.get("attention_factor", ours)
    same = math.isclose(given, ours, rel_tol=1e-6)
    require(same, f"{name}: attention_factor = {given!r} is not supported, only {ours:.6g}")


def config_to_huggingface(config: ModelConfig, family: str = "") -> dict[str, Any]:
    """Return the contents of a `config.json` that transformers 4 and 5 read.

    Args:
        family: found from the config by default.

    Raises:
        ConfigError: the family cannot express this model, whose config would not come back the same; the message names
            the fields.
    """
    name = family or family_of(config)
    table, config = _family(name), _resolved(config)
    raw = {key.theirs: key.write(getattr(config, ours), config) for ours, key in table.keys.items()}
    keys = ("factor", "original_max_position_embeddings", "mscale_all_dim", "truncate")
    stretch = {key: raw.pop(key) for key in keys if key in raw}
    stretch |= {"rope_type": "yarn", "type": "yarn", "beta_fast": 32, "beta_slow": 1}
    stretch["mscale"] = stretch["mscale_all_dim"]
    raw |= {
        "model_type": name,
        "architectures": [table.architecture],
        "hidden_act": "silu",
        "rope_scaling": stretch if config.rope_factor > 1 else None,
        # A matter of the tokenizer; left out, the defaults of some families would freeze an embedding row.
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }
    if raw.get("sliding_window"):
        raw["use_sliding_window"] = True
    ours, theirs = _essence(config), _essence(config_from_huggingface(raw))
    values = ((field.name, getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(ours))
    changed = [f"model.{key} = {value!r}" for key, value, read in values if value != read]
    require(not changed, f"Hugging Face {name} cannot express {', '.join(changed)}")
    return raw


def family_of(config: ModelConfig) -> str:
    """Return the family whose tensors have the shape of this config's."""
    if config.attention == "mla":
        return "deepseek_v3"
    if config.attention_sinks:
        return "gpt_oss"
    return {"head": "qwen3_moe", "full": "olmoe"}.get(config.qk_norm, "mixtral")


def _resolved(config: ModelConfig) -> ModelConfig:
    """Write out every width that follows from others; count shared experts in units of one routed expert."""
    return replace(
        config,
        head_dim=0 if config.attention == "mla" else config.query_dim,
        kv_heads=config.key_heads,
        v_head_dim=config.value_dim,
        shared_experts=config.shared_hidden // config.ffn_hidden,
        shared_ffn_hidden=config.shared_hidden,
    )


def _essence(config: ModelConfig) -> ModelConfig:
    """Return what is computed: widths resolved, and fields that have no effect here set to their defaults."""
    unused = (
        (True, TRAINING_FIELDS),
        (config.attention != "mla", ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")),
        (config.rope_factor <= 1, ("rope_factor", "rope_original_length", "rope_mscale_all_dim", "rope_truncate")),
        (config.activation != "clamped_swiglu", ("swiglu_alpha", "swiglu_limit")),
        (not config.dense_layers, ("dense_ffn_hidden",)),
        (config.expert_groups == 1, ("group_score",)),
    )
    default = ModelConfig()
    inert = {key: getattr(default, key) for without_effect, keys in unused if without_effect for key in keys}
    return replace(_resolved(config), **inert)


def parameters_from_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return our parameters (and the router's correction bias) from a checkpoint, in its dtype and on its device.

    `state` is read one tensor at a time, so it may be a lazy mapping; unfused tensors are not copied.

    Raises:
        ConfigError: a tensor is missing, has another shape than the config says, or is left over.
    """
    used = set[str]()
    parameters = {}
    for name, shape, rule, sources in _tensors(config, present=state):
        experts = []
        for group in sources:
            parts = [_fetch(state, source) for source in group]
            experts.append(torch.cat(parts) if len(parts) > 1 else parts[0])
            used.update(group)
        tensor = torch.stack(experts) if rule.by_expert else experts[0]
        if rule.interleaved:
            tensor = torch.cat((tensor[..., 0::2], tensor[..., 1::2]), dim=-1)
        if rule.transposed:
            tensor = tensor.transpose(-1, -2).contiguous()
        read = tuple(tensor.shape)
        require(read == shape, f"{sources[0][0]} makes {name} {read}, the config says {shape}")
        parameters[name] = tensor
    left = sorted(name for name in state if name not in used and not _ignorable(name, config))
    if left:
        raise ConfigError(f"the checkpoint has {len(left)} tensors that the config does not know, first {left[0]}")
    return parameters


def parameters_to_huggingface(
    parameters: Mapping[str, Tensor], config: ModelConfig, family: str = ""
) -> dict[str, Tensor]:
    """Return the tensors of a released checkpoint: views of ours where the family has the same order of elements."""
    config_to_huggingface(config, family)  # refuses what the family cannot hold
    state: dict[str, Tensor] = {}
    for name, shape, rule, sources in _tensors(config, family):
        require(name in parameters, f"parameter {name} is missing")
        tensor = parameters[name]
        require(tuple(tensor.shape) == shape, f"parameter {name} is {tuple(tensor.shape)}, the config says {shape}")
        if rule.transposed:
            tensor = tensor.transpose(-1, -2).contiguous()
        if rule.interleaved:
            tensor = torch.stack(tensor.chunk(2, dim=-1), dim=-1).flatten(-2)
        for group, rows in zip(sources, tensor if rule.by_expert else (tensor,), strict=True):
            sizes = [len(rows) // len(group)] * len(group)
            if len(group) == 3:  # queries, keys and values
                c = config
                sizes = [c.heads * c.query_dim, c.kv_heads * c.query_dim, c.kv_heads * c.value_dim]
            state.update(zip(group, rows.split(sizes), strict=True))
    return state


def _tensors(
    config: ModelConfig, family: str = "", present: Container[str] = ()
) -> Iterator[tuple[str, tuple[int, ...], TensorRule, list[list[str]]]]:
    """Yield of every parameter and buffer of our model its name, its shape, its rule and the tensors it is made of.

    These are one group per expert, or one group in all where nothing is stacked; a fused one that is `present` goes
    before its parts.
    """
    family = family or family_of(config)
    rules = {**OUTER_RULES, **_family(family).layer_rules}
    if config.attention == "mla" and not config.q_lora_rank:
        rules |= DIRECT_QUERY_RULE
    with torch.device("meta"):
        tensors = Transformer(config).state_dict()
    for name, tensor in tensors.items():
        layer, key = re.match(r"(layers\.\d+\.)?(.*)", name).groups("")  # type: ignore[union-attr]
        require(key in rules, f"Hugging Face {family} has no place for {name}")
        rule = rules[key]
        if isinstance(rule, str):
            rule = TensorRule((rule,))
        prefix = layer and f"model.{layer}"
        if rule.fused and prefix + rule.fused in present:
            rule = replace(rule, parts=(rule.fused,))
        experts = range(config.experts) if rule.by_expert else range(1)
        sources = [[prefix + part.format(expert=expert) for part in rule.parts] for expert in experts]
        yield name, tuple(tensor.shape), rule, sources


def _fetch(state: Mapping[str, Tensor], name: str) -> Tensor:
    blocks = f"{name}_blocks" in state
    require(not blocks, f"{name} is quantized (MXFP4): convert the checkpoint to bfloat16 or float32 first")
    require(name in state, f"the checkpoint lacks {name}")
    tensor = state[name]
    wide = tensor.is_floating_point() and tensor.element_size() > 1
    require(wide, f"{name} is quantized ({tensor.dtype}): convert the checkpoint to bfloat16 or float32 first")
    return tensor


def _ignorable(name: str, config: ModelConfig) -> bool:
    """Recognise rotary tables, the copy of tied embeddings, and DeepSeek's layers for multi-token prediction."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    extra = layer is not None and int(layer[1]) >= config.layers and config.attention == "mla"
    return extra or name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")
