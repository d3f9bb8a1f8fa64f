"""What is declared with each field, read in three ways: ours, pydantic's, and by people who look for a name."""

from __future__ import annotations

import typing
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from annotated_types import Interval
from pydantic import TypeAdapter, ValidationError

from megascale_moe.config import Config, ConfigError, Field, ParallelConfig, fields, from_dict, json_schema
from megascale_moe.config.fields import LIST
from megascale_moe.config.whole import SECTIONS
from megascale_moe.huggingface.families import FAMILIES

FIELDS = fields()
NUMBERS = {name: field for name, field in FIELDS.items() if field.kind in ("int", "float", LIST)}


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_every_field_says_in_one_sentence_what_it_means(field: Field) -> None:
    assert field.meaning[0].isupper()
    assert field.meaning.endswith(".")
    assert ". " not in field.meaning
    assert 10 < len(field.meaning) <= 200


@pytest.mark.parametrize("field", NUMBERS.values(), ids=NUMBERS)
def test_every_number_has_a_lower_and_an_upper_bound(field: Field) -> None:
    rule: Interval = field.rule
    assert (rule.ge is None) + (rule.gt is None) == 1
    assert (rule.le is None) + (rule.lt is None) == 1


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_defaults_and_special_values_are_in_their_range(field: Field) -> None:
    assert field.problem(field.default) == ""
    if field.least:
        assert field.problem(field.least_value) == ""
        assert type(field.least_value) is type(field.default)


def test_a_name_from_elsewhere_means_one_key() -> None:
    """But for "betas", a pair elsewhere; and none is the name of another key of its section."""
    names = Counter(name for field in FIELDS.values() for name in field.also)
    assert {name for name, times in names.items() if times > 1} == {"betas"}
    taken = {(field.section, field.key) for field in FIELDS.values()}
    assert not [name for field in FIELDS.values() for name in field.also if (field.section, name) in taken]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_names_are_among_the_names_from_elsewhere(family: str) -> None:
    for ours, key in FAMILIES[family].keys.items():
        if ours != "ffn_hidden":  # "intermediate_size" where there are no dense layers, which have it elsewhere
            assert FIELDS[f"model.{ours}"].called(key.theirs)
            assert not key.also or FIELDS[f"model.{ours}"].called(key.also)


# --- in words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers", "1 to 10,000"),
        ("model.head_dim", "0 to 16,777,216; 0: hidden / heads"),
        ("model.rope_theta", "above 1 and at most 1e+30"),
        ("model.tied_embeddings", "true or false"),
        ("parallel.ffn", "'ep', 'tp' or 'ep+tp'"),
        ("parallel.stage_layers", "each 1 to 10,000; []: as even as possible"),
        ("overlap.split", "'none', 'auto' or a number of pieces"),
        ("train.beta1", "at least 0 and below 1"),
        ("train.clip_norm", "0 to 1e+30; 0: no clipping"),
        ("data.path", "text, not empty"),
        ("data.cache", "text; '': ~/.cache/megascale_moe"),
    ],
)
def test_ranges_in_words(name: str, words: str) -> None:
    assert FIELDS[name].range == words


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("model.layers", 0, "must be at least 1"),
        ("model.layers", 10_001, "must be 1 to 10,000"),
        ("model.layers", 3.0, "must be of type int"),
        ("model.layers", True, "must be of type int"),
        ("parallel.ep", -4, "must not be negative (0: node / etp)"),
        ("train.beta2", 1.0, "must be at least 0 and below 1"),
        ("train.clip_norm", float("inf"), "must be a finite number (0: no clipping)"),
        ("train.clip_norm", -0.0, "must not be negative zero; write 0.0"),
        ("train.adam_eps", 0, "must be above 0"),
        ("train.learning_rate", True, "must be of type float"),
        ("data.path", "", "must not be empty"),
        ("data.path", "a\0b", "must not contain a NUL character"),
        ("data.path", "\udcff", "must be text in UTF-8"),
        ("run.folder", "a" * 4097, "must have at most 4,096 characters"),
        ("overlap.split", "0", "must be 'none', 'auto' or a number of pieces"),
        ("parallel.stage_layers", [2, 0], "each must be at least 1 ([]: as even as possible)"),
        ("parallel.stage_layers", [2, True], "must be a list of integers, such as [4, 4, 3]"),
    ],
)
def test_problems_in_words(name: str, value: object, problem: str) -> None:
    assert FIELDS[name].problem(value) == problem


# --- against pydantic, which reads the same declarations -------------------------------------------------------------

EDGES = (0, 1, 2, 2**15, 2**16, 2**20, 2**24, 10**4, 10**12, 10**18, 2**63)
CANDIDATES: list[Any] = [
    *(edge + near for edge in EDGES for near in (-1, 0, 1)),
    *(-1.5, 0.0, 5e-324, 0.5, 1.0, 1.5, 1e30, 1.1e30, 1e308),
    *(-(2**63), -(2**63) - 1, "", "1", True, None, (), (1,), (0,), (3, 4), (3, 4.0), (10**5,)),
]


@pytest.mark.parametrize("field", NUMBERS.values(), ids=NUMBERS)
def test_pydantic_takes_the_same_numbers(field: Field) -> None:
    hint = typing.get_type_hints(SECTIONS[field.section], include_extras=True)[field.key]
    reader: TypeAdapter[Any] = TypeAdapter(hint)
    taken = [value for value in CANDIDATES if field.problem(value) == ""]
    assert 0 < len(taken) < len(CANDIDATES)
    assert taken == [value for value in CANDIDATES if accepts(reader, value)]


def accepts(reader: TypeAdapter[Any], value: Any) -> bool:
    try:
        reader.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("section", SECTIONS)
def test_the_schema_is_pydantics(section: str) -> None:
    """But for its titles, our descriptions, and what TOML has no types for."""
    wanted = TypeAdapter(SECTIONS[section]).json_schema()["properties"]
    found = json_schema()["properties"][section]["properties"]
    assert list(found) == list(wanted)
    for key, theirs in wanted.items():
        ours = {name: value for name, value in found[key].items() if name not in ("description", "pattern")}
        if ours.get("type") == ["string", "integer"]:
            ours["type"] = "string"
        if "enum" in ours:
            ours["type"] = "string"
        del theirs["title"]
        assert ours == theirs, key


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "hint"),
    [
        ({"train": {"lr": 1.0}}, "key train.lr is unknown; did you mean 'learning_rate'?"),
        ({"train": {"max_grad_norm": 1.0}}, "key train.max_grad_norm is unknown; did you mean 'clip_norm'?"),
        ({"train": {"gradient_accumulation_steps": 4}}, "did you mean 'micro_batch'?"),
        ({"model": {"num_hidden_layers": 4}}, "did you mean 'layers'?"),
        ({"model": {"lr": 1.0}}, "key model.lr is unknown; did you mean 'train.learning_rate'?"),
        ({"model": {"steps": 3}}, "key model.steps is unknown; did you mean 'train.steps'?"),
        ({"train": {"stepz": 3}}, "key train.stepz is unknown; did you mean 'steps'?"),
    ],
)
def test_a_name_from_elsewhere_is_told_ours(raw: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict(raw)
    assert hint in str(refusal.value)


# --- choices that the caller knows -----------------------------------------------------------------------------------

CHOICES = {"parallel.attention": ("sp", "tp", "ring")}


def test_choices_of_the_caller_replace_those_of_the_type() -> None:
    raw = {"parallel": {"attention": "ring"}}
    config = from_dict(raw, choices=CHOICES)
    assert config.parallel.attention == "ring"
    config.check(CHOICES)
    with pytest.raises(ConfigError, match=r"parallel\.attention = 'ring': must be one of 'sp', 'tp', 'cp'$"):
        config.check()
    with pytest.raises(ConfigError, match=r"config: parallel\.attention = 'ring': must be one of 'sp', 'tp', 'cp'$"):
        from_dict(raw)
    with pytest.raises(ConfigError, match=r"parallel\.attention = 'cp': must be one of 'sp', 'tp', 'ring'$"):
        from_dict({}, ["parallel.attention=cp"], choices=CHOICES)
    assert fields(CHOICES)["parallel.attention"].range == "'sp', 'tp' or 'ring'"
    assert json_schema(CHOICES)["properties"]["parallel"]["properties"]["attention"]["enum"] == ["sp", "tp", "ring"]


def test_a_config_that_a_program_made_is_checked_like_one_that_was_read() -> None:
    for values in ({"ep": -1}, {"ep": True}, {"attention": "ring"}, {"stage_layers": (0,)}):
        with pytest.raises(ConfigError) as read:
            from_dict({"parallel": values})
        with pytest.raises(ConfigError) as made:
            Config(parallel=replace(ParallelConfig(), **values)).check()  # type: ignore[arg-type]
        shown = str(read.value).removeprefix("config: ")
        assert str(made.value) == shown
