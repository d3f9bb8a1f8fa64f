"""Configuration: what is accepted, what survives, and what each refusal says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megascale_moe.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    load,
    to_toml,
)
from megascale_moe.presets import PRESETS


def refused(raw: dict[str, Any], *overrides: str) -> str:
    """The message of the refusal, which is one line."""
    with pytest.raises(ConfigError) as refusal:
        from_dict(raw, list(overrides), PRESETS)
    message = str(refusal.value)
    assert message
    assert "\n" not in message
    return message


# What is accepted


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert load(path) == Config()


def test_fields_override_the_preset() -> None:
    config = from_dict({"model": {"preset": "mixtral-8x7b", "layers": 2}}, presets=PRESETS)
    assert config.model == replace(PRESETS["mixtral-8x7b"], layers=2)


def test_every_preset_is_consistent() -> None:
    for name in PRESETS:
        assert from_dict({"model": {"preset": name}}, presets=PRESETS).model == PRESETS[name]


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("--model.layers=3", "model", "layers", 3),
        ("model.layers=3", "model", "layers", 3),
        ("--train.learning-rate=1e-4", "train", "learning_rate", 1e-4),
        ("--train.learning_rate=1", "train", "learning_rate", 1.0),
        ("--parallel.attention=tp", "parallel", "attention", "tp"),
        ("--parallel.ffn=ep+tp", "parallel", "ffn", "ep+tp"),
        ("--overlap.split=4", "overlap", "split", "4"),
        ("--overlap.split=auto", "overlap", "split", "auto"),
        ("--model.tied_embeddings=true", "model", "tied_embeddings", True),
        ("--data.path=/some/folder/*.txt", "data", "path", "/some/folder/*.txt"),
        ("--run.folder='runs/1'", "run", "folder", "runs/1"),
        ("--data.text_field=a=b", "data", "text_field", "a=b"),
    ],
)
def test_overrides(override: str, section: str, key: str, value: object) -> None:
    found = getattr(getattr(from_dict({}, [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_overrides_win_over_the_file_and_the_last_one_wins() -> None:
    config = from_dict({"model": {"layers": 2}}, ["--model.layers=3", "--model.layers=5"])
    assert config.model.layers == 5


def test_preset_by_override() -> None:
    config = from_dict({"model": {"layers": 2}}, ["--model.preset=olmoe-1b-7b"], PRESETS)
    assert config.model == replace(PRESETS["olmoe-1b-7b"], layers=2)


# What survives


@pytest.mark.parametrize("name", PRESETS)
def test_resolved_config_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = Config(
        model=PRESETS[name],
        train=TrainConfig(learning_rate=3e-5, adam_eps=1e-15),
        data=DataConfig(path='C:\\texts\\"quoted"\\*.txt'),
        run=RunConfig(folder="runs/Größe"),
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(path, presets=PRESETS) == config


def test_resolved_default_reads_back_without_presets(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(Config()), encoding="utf-8")
    assert load(path) == Config()


# What is refused


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"modle": {}}, "config: section [modle] is unknown; did you mean 'model'?"),
        ({"zzz": {}}, "config: section [zzz] is unknown; known: data, model, overlap, parallel, run, train, wire"),
        ({"model": {"layer": 3}}, "config: key model.layer is unknown; did you mean 'layers'?"),
        ({"train": {"lr": 1.0}}, "config: key train.lr is unknown; did you mean 'learning_rate'?"),
        ({"model": {"preset": "mixtral-8x7"}}, "model.preset = 'mixtral-8x7' is unknown; did you mean 'mixtral-8x7b'?"),
        ({"model": 3}, "config: model must be a section [model]"),
        ({"model": {"layers": "3"}}, "config: model.layers = '3': must be of type int"),
        ({"model": {"layers": 3.0}}, "config: model.layers = 3.0: must be of type int"),
        ({"model": {"layers": True}}, "config: model.layers = True: must be of type int"),
        ({"model": {"norm_eps": True}}, "config: model.norm_eps = True: must be of type float"),
        ({"model": {"tied_embeddings": 1}}, "config: model.tied_embeddings = 1: must be of type bool"),
        ({"run": {"folder": ["a"]}}, "config: run.folder = ['a']: must be of type str"),
        ({"parallel": {"attention": "ring"}}, "config: parallel.attention = 'ring': must be one of 'sp', 'tp', 'cp'"),
        ({"wire": {"gradients": "fp16"}}, "wire.gradients = 'fp16': must be one of 'fp32', 'bf16', 'fp8', 'auto'"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused(raw: dict[str, Any], message: str) -> None:
    assert message in refused(raw)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.layers", "override '--model.layers': write it as --section.key=value"),
        ("--layers=3", "override '--layers=3': write it as --section.key=value"),
        ("--modell.layers=3", "section 'modell' is unknown; did you mean 'model'?"),
        ("--model.hiden=3", "key model.hiden is unknown; did you mean 'hidden'?"),
        ("--model.layers=three", "model.layers = 'three': must be of type int"),
        ("--model.layers=", "model.layers = '': must be of type int"),
    ],
)
def test_wrong_overrides_are_refused(override: str, message: str) -> None:
    assert message in refused({}, override)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"layers": 0}, "model.layers = 0: must be at least 1"),
        ({"hidden": 100, "heads": 8}, "model.hidden = 100 is not divisible by model.heads = 8"),
        ({"heads": 8, "kv_heads": 3}, "model.heads = 8 is not divisible by model.kv_heads = 3"),
        ({"head_dim": 15}, "model.head_dim = 15: rotary embedding needs an even width"),
        ({"experts": 4, "top_k": 5}, "model.top_k = 5 exceeds model.experts = 4"),
        ({"experts": 8, "expert_groups": 3}, "model.experts = 8 is not divisible by model.expert_groups = 3"),
        ({"expert_groups": 2, "top_groups": 3}, "model.top_groups = 3: must be between 1 and model.expert_groups = 2"),
        ({"expert_groups": 4, "top_groups": 1, "top_k": 3}, "model.top_k = 3: the 1 chosen groups hold only 2 experts"),
        ({"experts": 8, "device_groups": 3}, "model.experts = 8 is not divisible by model.device_groups = 3"),
        ({"layers": 2, "dense_layers": 3}, "model.dense_layers = 3: must be 0 to 2"),
        ({"dense_layers": 1}, "model.dense_ffn_hidden must be set where model.dense_layers > 0"),
        ({"shared_gate": True}, "model.shared_gate needs model.shared_experts of at least 1"),
        ({"balance_loss": -0.1}, "model.balance_loss = -0.1: must not be negative"),
    ],
)
def test_sizes_that_contradict_are_refused(model: dict[str, Any], message: str) -> None:
    assert message in refused({"model": model})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train": {"steps": 0}}, "train.steps = 0: must be at least 1"),
        ({"train": {"warmup": -1}}, "train.warmup = -1: must not be negative"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate = nan: must be a finite number"),
        ({"train": {"beta2": 1.0}}, "train.beta2 = 1.0: must be at least 0 and below 1"),
        ({"data": {"validation_fraction": 1.0}}, "data.validation_fraction = 1.0: must be above 0 and below 1"),
    ],
)
def test_values_out_of_range_are_refused(raw: dict[str, Any], message: str) -> None:
    assert message in refused(raw)


def test_presets_with_widths_of_their_own_need_no_division() -> None:
    """A head width that is given frees `hidden`; a latent model does not share key heads."""
    from_dict({"model": {"hidden": 100, "heads": 8, "kv_heads": 8, "head_dim": 16}})
    from_dict({"model": {"attention": "mla", "hidden": 100, "heads": 3, "kv_heads": 2}})
    assert ModelConfig(attention="mla", qk_nope_head_dim=6, qk_rope_head_dim=4).query_dim == 10


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match=r"missing.toml: cannot be read \(No such file or directory\); give the path"):
        load(missing)
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\nlayers = 3")
    with pytest.raises(ConfigError, match=r"broken.toml: not valid TOML \(.*line 1"):
        load(broken)
    broken.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match=r"broken.toml: not valid TOML"):
        load(broken)


def test_refusals_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\nlayer = 3")
    with pytest.raises(ConfigError, match=r"run.toml: key model.layer is unknown"):
        load(path)
