"""Whatever stands behind a key: it is read, or refused in one line, at once and without filling the memory."""

from __future__ import annotations

import time
import tomllib
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megascale_moe.config import Config, ConfigError, Field, ModelConfig, fields, from_dict, load, to_toml
from megascale_moe.presets import PRESETS

FIELDS = fields()
VALUES: list[Any] = [
    *(0, 1, -1, 2, 7, 10**9, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1 << 20_000),
    *(0.0, -0.0, 0.5, 1.0, 1e9, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("", " ", "nan", "1", "auto", "a\0b", "a\nb", "\udcff", "é", "a" * 100_000),
    *(True, False, None, [], [1], [10**9], [1 << 20_000], [[]], ["a"], {}, {"a": 1}, [1] * 20_000),
]
SECONDS = 1.0  # of CPU, for what takes a millisecond
BYTES = 5_000_000


def read(raw: dict[str, Any]) -> Config | None:
    """What is read of a config, or None if it is refused, after looking at the refusal and what it took."""
    refusal = ""
    tracemalloc.start()
    begun = time.process_time()
    try:
        found = from_dict(raw, presets=PRESETS)
    except ConfigError as error:
        found, refusal = None, str(error)
    finally:
        took = time.process_time() - begun
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert took < SECONDS
    assert peak < BYTES
    assert (found is None) == bool(refusal)
    assert "\n" not in refusal
    assert len(refusal) < 500
    return found


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_any_value_is_read_or_refused_at_once(field: Field) -> None:
    """What is read is right for its field, alone and in `check`, and survives being written."""
    for value in VALUES:
        config = read({field.section: {field.key: value}})
        section = getattr(config or Config(), field.section)
        if config is None:
            try:
                replace(Config(), **{field.section: replace(section, **{field.key: value})}).check()
            except ConfigError:
                continue
            assert field.name == "model.preset", value  # which only a config that is read looks up
        else:
            config.check()
            assert field.problem(getattr(section, field.key)) == ""
            assert from_dict(tomllib.loads(to_toml(config)), presets=PRESETS) == config


@pytest.mark.parametrize("name", ["layers", "experts", "hidden", "vocab", "expert_groups", "heads"])
def test_a_billion_of_anything_is_refused(name: str) -> None:
    """A model of a billion layers, or experts, was accepted, and lists of them filled the memory."""
    assert read({"model": {name: 10**9}}) is None


def test_no_expert_groups_are_refused_and_not_divided_by() -> None:
    with pytest.raises(ConfigError, match=r"^model\.expert_groups = 0: must be at least 1"):
        ModelConfig(expert_groups=0).check()
    with pytest.raises(ConfigError, match=r"^model\.kv_heads = 0: must be at least 1"):
        ModelConfig(kv_heads=0).check()


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.kind == "float"])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "+nan"])
def test_what_is_not_finite_is_refused(name: str, text: str) -> None:
    """NaN passes every comparison that is written as a refusal: 19 fields took it."""
    with pytest.raises(ConfigError, match=rf"{name} = .*: must be a finite number"):
        from_dict({}, [f"{name}={text}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.folder=", "run.folder = '': must not be empty"),
        ('run.folder="a\\u0000b"', "run.folder = 'a\\x00b': must not contain a NUL character"),
        ("run.folder=\udcff", "run.folder = '\\udcff': must be text in UTF-8"),
        ("train.clip_norm=-0.0", "train.clip_norm = -0.0: must not be negative zero; write 0.0"),
        (f"train.steps={2**63}", "train.steps = 9223372036854775808: must be 1 to 1,000,000,000,000"),
        (f"train.steps={10**200}", "... (201 characters): must be 1 to 1,000,000,000,000"),
        (f"train.steps=0x{'f' * 5000}", "train.steps = (too long to be shown): must be 1 to 1,000,000,000,000"),
        (f"train.steps={'1' * 5000}", "... (5,002 characters): must be of type int"),
        (f"train.learning_rate=0x{'f' * 5000}", "train.learning_rate = (too long to be shown): must be 0 to 1e+30"),
        (f"overlap.split={'9' * 5000}", "must be 'none', 'auto' or a number of pieces"),
        (f"parallel.stage_layers={'[' * 5000}", "must be a list of integers, such as [4, 4, 3]"),
        ("parallel.stage_layers=[1, 1000000000]", "parallel.stage_layers = [1, 1000000000]: each must be 1 to 10,000"),
        ("train.a\nb=3", "key train.a b is unknown"),
    ],
)
def test_odd_overrides_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict({}, [override])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["[train]\nsteps = " + "1" * 5000, "a = " + "[" * 100_000, "[run]\nfolder = '\0'"])
def test_odd_files_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    """Python refuses to read integers of 4,300 digits, and recursion that deep, in its own ways."""
    path = tmp_path / "odd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.toml: not valid TOML") as refusal:
        load(path)
    assert "\n" not in str(refusal.value)


def test_whole_numbers_are_taken_for_others_and_for_texts() -> None:
    config = from_dict({"train": {"learning_rate": 1}, "overlap": {"split": 4}, "run": {"folder": 7}})
    assert type(config.train.learning_rate) is float
    assert (config.overlap.split, config.run.folder) == ("4", "7")
