"""Hugging Face configs and weights to ours and back: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, GPT-OSS.

What the families are is data, in `huggingface_families`; here is one small interpreter per direction. Released
checkpoints hold one tensor per expert and projection, the modules of transformers 5 hold fused ones; both are read, the
released form is written. What our model does not compute is refused by name, never approximated: a silently different
model costs more than an error.

The coefficient of the balance loss is carried over as a number. Its meaning differs (transformers pools all documents
and layers and does not divide by top_k), so no factor would make the two losses equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from megascale_moe.config import ConfigError, ModelConfig, from_dict, require
from megascale_moe.huggingface.families import DIRECT_QUERY_RULE, FAMILIES, REQUIRED, ConfigName, Family, NameRule
from megascale_moe.model.transformer import Transformer

# Fields that train a model but do not change what it computes; capacity is one, because released models drop nothing.
TRAINING_FIELDS = (
    "preset", "sequence_length", "init_std", "balance_loss", "balance_granularity", "device_groups", "z_loss",
    "bias_update_rate", "capacity_factor",
)


def config_from_huggingface(raw: Mapping[str, Any]) -> ModelConfig:
    """Our config for the contents of a `config.json` (of transformers 4 or 5).

    `sequence_length` becomes the longest context the model supports; override it to train on shorter rows.

    Raises:
        ConfigError: an unknown family, a missing key, or something we do not compute.
    """
    name = str(raw.get("model_type"))
    family = _family(name)
    flat = _flatten(raw)
    for key, allowed in family.supported.items():
        right = " or ".join(repr(value) for value in allowed if value is not None) or "null"
        require(flat.get(key) in allowed, f"{name}: {key} = {flat.get(key)!r} is not supported, only {right}")
    values = {field.ours: _read_field(field, flat, name) for field in family.fields} | dict(family.implied)
    _check_yarn(flat, family, name)
    return from_dict({"model": values}, where=f"{name} config").model


def _family(name: str) -> Family:
    require(name in FAMILIES, f"model_type = {name!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One level without nulls: the rotary dictionary of either transformers version merged in, defaults filled."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    flat = {key: value for key, value in {**raw, **rope}.items() if value is not None}
    flat.setdefault("num_key_value_heads", flat.get("num_attention_heads"))
    if flat["rope_type"] == "default":  # what a stretched table would need is inert
        flat = {key: value for key, value in flat.items() if key not in ("factor", "mscale", "mscale_all_dim")}
    if not flat.get("use_sliding_window", True):
        flat.pop("sliding_window", None)
    return flat


def _read_field(field: ConfigName, flat: Mapping[str, Any], name: str) -> Any:
    found = [flat[key] for key in field.theirs if key in flat]
    require(bool(found) or field.default is not REQUIRED, f"{name} config: key {field.theirs[0]!r} is missing")
    return field.read(found[0]) if found else field.default


def _check_yarn(flat: Mapping[str, Any], family: Family, name: str) -> None:
    """Refuse the forms of YaRN whose attention factor is not ours."""
    if flat["rope_type"] != "yarn":
        return
    for key in ("factor", "original_max_position_embeddings"):
        require(key in flat, f"{name}: YaRN needs {key!r} in rope_scaling")
    all_dim, factor = flat.get("mscale_all_dim", 0.0), flat["factor"]
    if all_dim:
        require(
            family.implied.get("attention") == "mla" and flat.get("mscale") == all_dim,
            f"{name}: mscale = {flat.get('mscale')!r} with mscale_all_dim = {all_dim!r} is not supported",
        )
    ours = 1.0 if all_dim or factor <= 1 else 0.1 * math.log(factor) + 1.0
    given = flat.get("attention_factor", ours)
    same = math.isclose(given, ours, rel_tol=1e-6)
    require(same, f"{name}: attention_factor = {given!r} is not supported, only {ours:.6g}")


def config_to_huggingface(config: ModelConfig, family: str = "") -> dict[str, Any]:
    """The contents of a `config.json` that transformers 4 and 5 read; `family` is found from the config by default.

    Raises:
        ConfigError: the family cannot express this model; the message names the fields.
    """
    name = family or family_of(config)
    table = _family(name)
    config = _resolved(config)
    raw = {
        field.theirs[0]: field.write_of(config) if field.write_of else field.write(getattr(config, field.ours))
        for field in table.fields
    }
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
    _check_expressed(config, config_from_huggingface(raw), name)
    return raw


def _check_expressed(ours: ModelConfig, back: ModelConfig, name: str) -> None:
    """A table expresses a config if it comes back the same."""
    a, b = _essence(ours), _essence(back)
    lost = [f"model.{f.name} = {getattr(a, f.name)!r}" for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)]
    require(not lost, f"Hugging Face {name} cannot express {', '.join(lost)}")


def family_of(config: ModelConfig) -> str:
    """The family whose tensors have the shape of this config's."""
    if config.attention == "mla":
        return "deepseek_v3"
    if config.attention_sinks:
        return "gpt_oss"
    return {"head": "qwen3_moe", "full": "olmoe"}.get(config.qk_norm, "mixtral")


def _resolved(config: ModelConfig) -> ModelConfig:
    """Every width that follows from others written out; shared experts counted in units of one routed expert."""
    return replace(
        config,
        head_dim=0 if config.attention == "mla" else config.query_dim,
        kv_heads=config.key_heads,
        v_head_dim=config.value_dim,
        shared_experts=config.shared_hidden // config.ffn_hidden,
        shared_ffn_hidden=config.shared_hidden,
    )


def _essence(config: ModelConfig) -> ModelConfig:
    """What is computed: widths resolved, and fields that have no effect here set to their defaults."""
    inert = list(TRAINING_FIELDS)
    latent = ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"]
    inert += [] if config.attention == "mla" else latent
    stretch = ["rope_factor", "rope_original_length", "rope_mscale_all_dim", "rope_truncate"]
    inert += [] if config.rope_factor > 1 else stretch
    inert += [] if config.activation == "clamped_swiglu" else ["swiglu_alpha", "swiglu_limit"]
    inert += [] if config.dense_layers else ["dense_ffn_hidden"]
    inert += [] if config.expert_groups > 1 else ["group_score"]
    default = ModelConfig()
    return replace(_resolved(config), **{name: getattr(default, name) for name in inert})


def parameters_from_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our parameters (and the router's correction bias) from a checkpoint, as they came: dtype and device kept.

    `state` is read one tensor at a time, so it may be a lazy mapping; unfused tensors are not copied.

    Raises:
        ConfigError: a tensor is missing, has another shape than the config says, or is left over.
    """
    rules, used = _rules(config), set[str]()
    parameters = {}
    for name, shape in tensor_shapes(config).items():
        rule, layer = _match(name, rules, config)
        if rule.whole and rule.whole.format(layer=layer) in state:
            rule = replace(rule, parts=(rule.whole,))
        sources = _sources(rule, layer, config)
        tensor = _as_ours(_assemble(state, sources, _stacked(rule)), rule)
        used.update(source for group in sources for source in group)
        found = tuple(tensor.shape)
        require(found == shape, f"{sources[0][0]} makes {name} {found}, the config says {shape}")
        parameters[name] = tensor
    _check_nothing_left(set(state) - used, config)
    return parameters


def parameters_to_huggingface(
    parameters: Mapping[str, Tensor], config: ModelConfig, family: str = ""
) -> dict[str, Tensor]:
    """The tensors of a released checkpoint: views of ours where the family has the same order of elements."""
    config_to_huggingface(config, family)  # refuses what the family cannot hold
    rules, state = _rules(config, family), dict[str, Tensor]()
    for name, shape in tensor_shapes(config).items():
        require(name in parameters, f"parameter {name} is missing")
        tensor = parameters[name]
        require(tuple(tensor.shape) == shape, f"parameter {name} is {tuple(tensor.shape)}, the config says {shape}")
        rule, layer = _match(name, rules, config)
        sources = _sources(rule, layer, config)
        tensor = _as_theirs(tensor, rule)
        for group, rows in zip(sources, tensor if _stacked(rule) else (tensor,), strict=True):
            state.update(zip(group, rows.split(_part_rows(name, len(rows), len(group), config)), strict=True))
    return state


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter and buffer of our model."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}


def _rules(config: ModelConfig, family: str = "") -> dict[str, NameRule]:
    rules = {rule.ours: rule for rule in _family(family or family_of(config)).rules}
    if config.attention == "mla" and not config.q_lora_rank:
        rules[DIRECT_QUERY_RULE.ours] = DIRECT_QUERY_RULE
    return rules


def _match(name: str, rules: Mapping[str, NameRule], config: ModelConfig) -> tuple[NameRule, str]:
    """The rule for one of our tensors, and its layer."""
    layer = re.match(r"layers\.(\d+)\.(.*)", name)
    pattern = f"layers.{{layer}}.{layer[2]}" if layer else name
    require(pattern in rules, f"Hugging Face {family_of(config)} has no place for {name}")
    return rules[pattern], layer[1] if layer else ""


def _stacked(rule: NameRule) -> bool:
    return "{expert}" in rule.parts[0]


def _sources(rule: NameRule, layer: str, config: ModelConfig) -> list[list[str]]:
    """Their names, one group per expert (one group in all where nothing is stacked)."""
    experts: Iterable[int] = range(config.experts) if _stacked(rule) else (0,)
    return [[part.format(layer=layer, expert=expert) for part in rule.parts] for expert in experts]


def _assemble(state: Mapping[str, Tensor], sources: list[list[str]], stacked: bool) -> Tensor:
    rows = [[_fetch(state, name) for name in group] for group in sources]
    joined = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in rows]
    return torch.stack(joined) if stacked else joined[0]


def _as_ours(tensor: Tensor, rule: NameRule) -> Tensor:
    """From their order of elements: outputs last and halves of them alternating, where the rule says so."""
    if rule.interleaved:
        tensor = torch.cat((tensor[..., 0::2], tensor[..., 1::2]), dim=-1)
    return tensor.transpose(-1, -2).contiguous() if rule.transposed else tensor


def _as_theirs(tensor: Tensor, rule: NameRule) -> Tensor:
    """The inverse of `_as_ours`."""
    if rule.transposed:
        tensor = tensor.transpose(-1, -2).contiguous()
    return torch.stack(tensor.chunk(2, dim=-1), dim=-1).flatten(-2) if rule.interleaved else tensor


def _fetch(state: Mapping[str, Tensor], name: str) -> Tensor:
    blocks = f"{name}_blocks" in state
    require(not blocks, f"{name} is quantized (MXFP4): convert the checkpoint to bfloat16 or float32 first")
    require(name in state, f"the checkpoint lacks {name}")
    tensor = state[name]
    wide = tensor.is_floating_point() and tensor.element_size() > 1
    require(wide, f"{name} is quantized ({tensor.dtype}): convert the checkpoint to bfloat16 or float32 first")
    return tensor


def _part_rows(name: str, rows: int, parts: int, config: ModelConfig) -> list[int]:
    """How the rows of one of our tensors divide into theirs: equally, but for queries, keys and values."""
    if parts == 3:
        return [config.heads * config.query_dim, config.kv_heads * config.query_dim, config.kv_heads * config.value_dim]
    return [rows // parts] * parts


def _check_nothing_left(names: set[str], config: ModelConfig) -> None:
    """Refuse unknown tensors, but for those that hold nothing of the model we build."""
    left = sorted(name for name in names if not _ignorable(name, config))
    if left:
        raise ConfigError(f"the checkpoint has {len(left)} tensors that the config does not know, first {left[0]}")


def _ignorable(name: str, config: ModelConfig) -> bool:
    """Cached rotary tables, the copy of tied embeddings, and DeepSeek's extra layers for multi-token prediction."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    extra = layer is not None and int(layer[1]) >= config.layers and config.attention == "mla"
    return extra or name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")
