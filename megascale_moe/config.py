"""Configuration: frozen dataclasses filled from TOML and dotted overrides.

This is the leaf module, everything may import it and it imports nothing of the package. A config is
checked completely before any work starts, and every refusal is one line that says what is wrong,
where, and what would be right. Sections and keys mirror the TOML file one to one; there is no
schema beside the dataclasses and no second place where a default lives.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar


class ConfigError(ValueError):
    """The user's input is wrong: one line naming what, where and what would be right (exit status 2)."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is computed. Sizes are elements; the field names are those of the paper's Table 2 where it has them."""

    preset: str = ""  # a name of megascale_moe.presets; every other field overrides it
    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 0  # 0: hidden / heads
    vocab: int = 4096
    sequence_length: int = 512
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    init_std: float = 0.02

    # Attention
    attention: Literal["gqa", "mla"] = "gqa"
    qk_norm: Literal["none", "head", "full"] = "none"  # per head (Qwen3) or over all heads (OLMoE)
    sliding_window: int = 0  # 0: every earlier token of the document
    rope_theta: float = 10_000.0
    rope_interleaved: bool = False  # pairs (0, 1), (2, 3) ... instead of (0, d/2), (1, d/2 + 1) ...
    rope_factor: float = 1.0  # > 1: YaRN stretches the positions by this factor
    rope_original_length: int = 4096  # YaRN: the length trained before stretching
    rope_mscale_all_dim: float = 0.0  # YaRN (DeepSeek): the softmax scale grows with the factor
    q_lora_rank: int = 0  # MLA, 0: queries are projected directly
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 0  # 0: head_dim (MLA: qk_nope_head_dim)

    # Router
    experts: int = 8
    top_k: int = 2
    score: Literal["softmax", "sigmoid"] = "softmax"
    norm_top_k: bool = True  # the chosen weights are divided by their sum
    routed_scaling: float = 1.0
    expert_groups: int = 1  # group-limited choice: tokens choose `top_groups` groups first
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"  # a group counts as its best expert, or its best two
    correction_bias: bool = False  # auxiliary-loss-free balancing: a bias added to the scores only to choose
    bias_update_rate: float = 1e-3
    balance_loss: float = 0.0  # coefficient alpha of the auxiliary loss
    balance_granularity: Literal["expert", "device"] = "expert"
    device_groups: int = 1  # groups of experts that count as one device for balance and capacity
    z_loss: float = 0.0
    capacity_factor: float = 0.0  # 0: dropless; else a device group takes at most this x its fair share

    # Feed-forward
    ffn_hidden: int = 512  # per expert
    shared_experts: int = 0
    shared_ffn_hidden: int = 0  # width of all shared experts together; 0: shared_experts x ffn_hidden
    shared_gate: bool = False
    dense_layers: int = 0  # the first layers have a plain FFN instead of experts
    dense_ffn_hidden: int = 0

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

    def check(self) -> None:
        """Raise `ConfigError` if the sizes contradict each other."""
        sizes = ("layers", "hidden", "heads", "kv_heads", "vocab", "sequence_length", "experts", "top_k", "ffn_hidden")
        for name in sizes:
            require(getattr(self, name) > 0, f"model.{name} = {getattr(self, name)}: must be at least 1")
        for name in (
            "balance_loss",
            "z_loss",
            "capacity_factor",
            "bias_update_rate",
            "init_std",
            "shared_experts",
            "shared_ffn_hidden",
            "head_dim",
            "v_head_dim",
            "sliding_window",
            "q_lora_rank",
        ):
            require(getattr(self, name) >= 0, f"model.{name} = {getattr(self, name)}: must not be negative")
        require(
            self.rope_theta > 0 and math.isfinite(self.rope_theta),
            f"model.rope_theta = {self.rope_theta}: must be a positive number",
        )
        require(
            self.rope_factor <= 1 or self.rope_original_length > 0,
            f"model.rope_original_length = {self.rope_original_length}: must be positive where model.rope_factor > 1",
        )
        if self.attention == "mla":
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
                require(getattr(self, name) > 0, f"model.{name} = {getattr(self, name)}: must be at least 1 with mla")
            require(
                self.qk_rope_head_dim % 2 == 0,
                f"model.qk_rope_head_dim = {self.qk_rope_head_dim}: rotary embedding needs an even width",
            )
        self._check_heads()
        self._check_router()

    def _check_heads(self) -> None:
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
            1 <= self.top_groups <= self.expert_groups,
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
            self.device_groups >= 1 and self.experts % self.device_groups == 0,
            f"model.experts = {self.experts} is not divisible by model.device_groups = {self.device_groups}",
        )
        require(
            0 <= self.dense_layers <= self.layers,
            f"model.dense_layers = {self.dense_layers}: must be 0 to {self.layers}",
        )
        require(
            self.dense_layers == 0 or self.dense_ffn_hidden > 0,
            "model.dense_ffn_hidden must be set where model.dense_layers > 0",
        )
        require(
            not self.shared_gate or self.shared_hidden > 0, "model.shared_gate needs model.shared_experts of at least 1"
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Which ranks share what. Ranks form a mesh pp x dp x node; 0 means: work it out from the rank count."""

    pp: int = 1
    dp: int = 0  # 0: world / (pp x node)
    node: int = 0  # ranks that share a fast link; 0: ep
    attention: Literal["sp", "tp"] = "sp"
    ffn: Literal["ep", "tp", "ep+tp"] = "ep"
    ep: int = 0  # 0: node
    etp: int = 1  # ranks that share every expert's width; with ffn = "tp" all of a node
    vocabulary: Literal["replicated", "sharded"] = "replicated"  # embedding, head and loss over the ranks of a node
    dispatch: Literal["auto", "all_to_all", "all_gather"] = "auto"
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    virtual_stages: int = 1  # stages per pipeline rank (interleaved)
    stage_layers: tuple[int, ...] = ()  # layers of each stage in order; empty: as even as possible

    def check(self) -> None:
        """Raise `ConfigError` for sizes that no mesh has."""
        for name in ("dp", "node", "ep"):
            require(getattr(self, name) >= 0, f"parallel.{name} = {getattr(self, name)}: must not be negative")
        for name in ("pp", "etp", "virtual_stages"):
            require(getattr(self, name) > 0, f"parallel.{name} = {getattr(self, name)}: must be at least 1")
        several = self.schedule == "interleaved"
        require(
            several or self.virtual_stages == 1,
            f"parallel.virtual_stages = {self.virtual_stages} with parallel.schedule = {self.schedule!r}: "
            "use 1, or schedule = 'interleaved'",
        )
        require(
            not several or self.pp == 1 or self.virtual_stages > 1,
            "parallel.schedule = 'interleaved' needs parallel.virtual_stages of at least 2; with 1 use '1f1b'",
        )


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """How communication hides behind computation."""

    order: Literal["serial", "paper", "scheduled"] = "serial"
    split: str = "none"  # "none", "auto", or how many pieces a communication and the product next to it are cut into
    remat: Literal["none", "paper", "full", "budget"] = "none"  # what backward makes again instead of keeping
    activation_bytes: int = 0  # remat "budget": what a micro-batch may keep of a rank's layers
    micro_batches: int = 1  # 2: the forward of one is woven into the backward of another, with order = "scheduled"

    @property
    def hides_synchronisation(self) -> bool:
        """Whether reductions and gathers of weights are among the operators of a step rather than behind them."""
        return self.order != "serial"

    @property
    def in_pairs(self) -> bool:
        """Whether two micro-batches are worked on at once."""
        return self.micro_batches == 2

    def check(self) -> None:
        """Raise `ConfigError` for values outside their range."""
        pieces = self.split.isascii() and self.split.isdigit() and int(self.split) > 0
        require(
            self.split in ("none", "auto") or pieces,
            f"overlap.split = {self.split!r}: must be 'none', 'auto' or a number of pieces",
        )
        wanted = self.remat == "budget"
        require(
            (self.activation_bytes > 0) == wanted,
            f"overlap.activation_bytes = {self.activation_bytes} with overlap.remat = {self.remat!r}: "
            + ("give the bytes that may be kept" if wanted else "use remat = 'budget', or leave it 0"),
        )
        require(
            self.micro_batches in (1, 2),
            f"overlap.micro_batches = {self.micro_batches}: must be 1, or 2 for two at once",
        )
        require(
            not self.in_pairs or self.order == "scheduled",
            f"overlap.micro_batches = 2 with overlap.order = {self.order!r}: use 'scheduled'",
        )


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """The format of what travels: "fp32" is as it was computed, "auto" narrower where the link is the bottleneck.

    "bf16_ring", "fp8_cast" and "fp8_tensor" are what the paper rejects, to be compared with (docs/numerics.md).
    """

    gradients: Literal["fp32", "bf16", "fp8", "auto", "bf16_ring"] = "fp32"
    activations: Literal["fp32", "bf16", "fp8", "auto", "fp8_cast", "fp8_tensor"] = "fp32"
    parameters: Literal["fp32", "bf16", "fp8", "auto"] = "fp32"

    @property
    def gates_last(self) -> bool:
        """Whether the gating weights come behind FC2, as the paper has it in FP8 runs (its section 4.3)."""
        return self.activations not in ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run. Batches count sequences; times are steps."""

    steps: int = 200
    global_batch: int = 16
    micro_batch: int = 0  # sequences per data-parallel rank and pass; 0: all of them at once, through a pipeline one
    dtype: Literal["fp32", "bf16"] = "fp32"
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = 20
    decay: int = 0  # wsd: length of the final decay; 0: a fifth of the steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_norm: float = 1.0  # 0: no clipping
    seed: int = 0
    eval_every: int = 0  # 0: only at the end
    eval_rows: int = 32  # sequences per evaluation, 0: no evaluation
    checkpoint_every: int = 0  # 0: only at the end
    keep_checkpoints: int = 2  # 0: all
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # fuse elementwise kernels; auto: on GPUs and for 500 steps or more
    sample_tokens: int = 64  # generated at the end; 0: none

    def check(self) -> None:
        """Raise `ConfigError` for values outside their range."""
        for name in ("steps", "global_batch"):
            require(getattr(self, name) > 0, f"train.{name} = {getattr(self, name)}: must be at least 1")
        counts = ("micro_batch", "warmup", "decay", "eval_every", "eval_rows", "checkpoint_every", "keep_checkpoints")
        for name in (*counts, "sample_tokens", "learning_rate", "min_learning_rate", "weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, f"train.{name} = {getattr(self, name)}: must not be negative")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name} = {value}: must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from."""

    path: str = "stdlib"  # file, folder, glob, datasets name, or the running interpreter's standard library
    tokenizer: str = ""  # a tokenizer.json; empty: a byte-level BPE trained on the corpus
    text_field: str = "text"
    validation_fraction: float = 0.02
    cache: str = ""  # empty: ~/.cache/megascale_moe

    def check(self) -> None:
        """Raise `ConfigError` for values outside their range."""
        fraction = self.validation_fraction
        require(0 < fraction < 1, f"data.validation_fraction = {fraction}: must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where results go."""

    folder: str = "runs/latest"
    resume: str = ""  # "auto", or a folder checkpoints/step-N
    log_every: int = 10
    trace_steps: int = 0  # the last N steps are traced into trace-rank-R.json


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: one attribute per TOML section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise `ConfigError` if any section contradicts itself."""
        self.model.check()
        self.parallel.check()
        self.overlap.check()
        self.train.check()
        self.data.check()


Section = TypeVar("Section")


def load(path: str | Path, overrides: list[str] | None = None, presets: dict[str, ModelConfig] | None = None) -> Config:
    """Read a TOML file and apply `section.key=value` overrides.

    Raises:
        ConfigError: unreadable file, unknown section, key or preset, a value of the wrong type, sizes that contradict.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    return from_dict(raw, overrides, presets, where=str(path))


def from_dict(
    raw: dict[str, Any],
    overrides: list[str] | None = None,
    presets: dict[str, ModelConfig] | None = None,
    where: str = "config",
) -> Config:
    """Build a checked `Config` from nested dictionaries and dotted overrides."""
    values: dict[str, dict[str, Any]] = {}
    sections = {f.name for f in dataclasses.fields(Config)}
    for section, entries in raw.items():
        _known(section, sections, f"{where}: section [{section}]")
        require(isinstance(entries, dict), f"{where}: {section} must be a section [{section}]")
        values[section] = dict(entries)
    for override in overrides or []:
        section, key, value = _parse_override(override, sections)
        values.setdefault(section, {})[key] = value
    types_of = typing.get_type_hints(Config)
    built: dict[str, Any] = {}
    for section, entries in values.items():
        base = _preset(entries, presets or {}, where) if section == "model" else types_of[section]()
        built[section] = _fill(base, section, entries, where)
    config = Config(**built)
    config.check()
    return config


def _preset(entries: dict[str, Any], presets: dict[str, ModelConfig], where: str) -> ModelConfig:
    name = entries.get("preset", "")
    if not name:
        return ModelConfig()
    _known(str(name), set(presets), f"{where}: model.preset = {name!r}")
    return presets[name]


def _known(name: str, allowed: set[str], what: str) -> None:
    if name in allowed:
        return
    near = difflib.get_close_matches(name, sorted(allowed), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(allowed))}"
    raise ConfigError(f"{what} is unknown; {hint}")


def _parse_override(text: str, sections: set[str]) -> tuple[str, str, Any]:
    name, equals, value = text.removeprefix("--").partition("=")
    section, dot, key = name.partition(".")
    require(bool(equals and dot and key), f"override {text!r}: write it as --section.key=value")
    _known(section, sections, f"override {text!r}: section {section!r}")
    try:
        return section, key.replace("-", "_"), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return section, key.replace("-", "_"), value  # a bare word is a string


def _fill(base: Section, section: str, entries: dict[str, Any], where: str) -> Section:
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in entries.items():
        _known(key, set(hints), f"{where}: key {section}.{key}")
        changes[key] = _convert(value, hints[key], f"{where}: {section}.{key}")
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _convert(value: Any, kind: Any, where: str) -> Any:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        require(value in choices, f"{where} = {value!r}: must be one of {', '.join(map(repr, choices))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) is int:
        return str(value)
    if kind == tuple[int, ...]:
        fits = isinstance(value, list | tuple) and all(type(item) is int for item in value)
        require(fits, f"{where} = {value!r}: must be a list of integers, such as [4, 4, 3]")
        return tuple(value)
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    fits = not isinstance(kind, types.UnionType) and type(value) is kind
    require(fits, f"{where} = {value!r}: must be of type {name}")
    return value


def to_toml(config: Config) -> str:
    """The resolved config as TOML text that `load` reads back to an equal `Config`."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        values = getattr(config, section.name)
        lines += [f"{f.name} = {_toml_value(getattr(values, f.name))}" for f in dataclasses.fields(values)]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")  # a JSON string is a TOML basic string
    return repr(list(value) if isinstance(value, tuple) else value)
