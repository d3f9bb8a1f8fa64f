"""Configs from TOML and dotted overrides, and back.

A config is checked completely before any work starts, and every refusal is one line that says what is wrong, where,
and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from megascale_moe.config.errors import ConfigError, require
from megascale_moe.config.fields import AS_DECLARED, Choices, chosen, fields_of, shown
from megascale_moe.config.model import ModelConfig
from megascale_moe.config.whole import Config, fields, sections

Section = TypeVar("Section")


def load(
    path: str | Path,
    overrides: list[str] | None = None,
    presets: dict[str, ModelConfig] | None = None,
    choices: Choices = AS_DECLARED,
) -> Config:
    """Read a TOML file and apply `section.key=value` overrides.

    Args:
        choices: the values that a key may have, by "section.key", where the caller knows them better than its type.

    Raises:
        ConfigError: unreadable file, unknown section, key or preset, a value of the wrong type or out of its range,
            sizes that contradict.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except (ValueError, RecursionError) as error:  # also numbers of 4,300 digits, lists in lists in lists
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    return from_dict(raw, overrides, presets, where=str(path), choices=choices)


def from_dict(
    raw: dict[str, Any],
    overrides: list[str] | None = None,
    presets: dict[str, ModelConfig] | None = None,
    where: str = "config",
    choices: Choices = AS_DECLARED,
) -> Config:
    """Build a checked `Config` from nested dictionaries and dotted overrides; see `load`."""
    values: dict[str, dict[str, Any]] = {}
    for section, entries in raw.items():
        _known(section, sections(), f"{where}: section [{section}]")
        require(isinstance(entries, dict), f"{where}: {section} must be a section [{section}]")
        values[section] = dict(entries)
    for override in overrides or []:
        section, key, value = _parse_override(override)
        values.setdefault(section, {})[key] = value
    built: dict[str, Any] = {}
    for section, entries in values.items():
        base = _preset(entries, presets or {}, where) if section == "model" else sections()[section]()
        built[section] = _fill(base, section, entries, where, choices)
    config = Config(**built)
    config.check(choices)
    return config


def _preset(entries: dict[str, Any], presets: dict[str, ModelConfig], where: str) -> ModelConfig:
    name = str(fields_of("model", ModelConfig)["preset"].read(entries.get("preset", ""), f"{where}: "))
    if not name:
        return ModelConfig()
    _known(name, presets, f"{where}: model.preset = {shown(name)}")
    return presets[name]


def _known(name: str, allowed: Collection[str], what: str, other: str = "") -> None:
    """Refuse a name that there is not; `other` is what it is called here, if that is known."""
    if name in allowed:
        return
    near = difflib.get_close_matches(name, sorted(allowed), n=1, cutoff=0.5)
    meant = other or next(iter(near), "")
    hint = f"did you mean {meant!r}?" if meant else f"known: {', '.join(sorted(allowed))}"
    raise ConfigError(f"{what} is unknown; {hint}")


def _parse_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.removeprefix("--").partition("=")
    section, dot, key = name.partition(".")
    require(bool(equals and dot and key), f"override {text!r}: write it as --section.key=value")
    _known(section, sections(), f"override {text!r}: section {section!r}")
    try:
        return section, key.replace("-", "_"), tomllib.loads(f"x = {value}")["x"]
    except (ValueError, RecursionError):
        return section, key.replace("-", "_"), value  # a bare word is a string


def _fill(base: Section, section: str, entries: Mapping[str, Any], where: str, choices: Choices) -> Section:
    known = fields_of(section, type(base))
    changes: dict[str, Any] = {}
    for key, value in entries.items():
        if key not in known:
            _known(str(key), known, f"{where}: key {section}.{key}", _elsewhere(section, str(key)))
        changes[key] = chosen(known[key], choices).read(value, f"{where}: ")
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _elsewhere(section: str, key: str) -> str:
    """Return the key that another library, or another section, has under this name; "" if there is none."""
    found = [field for field in fields().values() if field.called(key)]
    found.sort(key=lambda field: field.section != section)
    return next((field.key if field.section == section else field.name for field in found), "")


def to_toml(config: Config) -> str:
    """Return the resolved config as TOML text that `load` reads back to an equal `Config`."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        values = getattr(config, section.name)
        lines += [f"{f.name} = {toml_value(getattr(values, f.name))}" for f in dataclasses.fields(values)]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: object) -> str:
    """Return a value of a field as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")  # a JSON string is a TOML basic string
    return repr(list(value) if isinstance(value, tuple) else value)
