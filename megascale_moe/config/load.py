"""Configs from TOML and dotted overrides, and back.

A config is checked completely before any work starts, and every refusal is one line that says what is wrong, where,
and what would be right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megascale_moe.config.fields import AS_DECLARED, Choices, ConfigError, Section, require, shown
from megascale_moe.config.model import ModelConfig
from megascale_moe.config.whole import SECTIONS, Config, fields


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
        _refuse_unknown(section, SECTIONS, f"{where}: section [{section}]")
        require(isinstance(entries, dict), f"{where}: {section} must be a section [{section}]")
        values[section] = dict(entries)
    for override in overrides or []:
        name, equals, text = override.removeprefix("--").partition("=")
        section, dot, key = name.partition(".")
        require(bool(equals and dot and key), f"override {override!r}: write it as --section.key=value")
        _refuse_unknown(section, SECTIONS, f"override {override!r}: section {section!r}")
        value: Any = text  # a bare word is a string
        with contextlib.suppress(ValueError, RecursionError):
            value = tomllib.loads(f"x = {text}")["x"]
        values.setdefault(section, {})[key.replace("-", "_")] = value
    built: dict[str, Any] = {}
    for section, entries in values.items():
        base = SECTIONS[section]()
        if section == "model":
            name = str(ModelConfig.fields()["preset"].read(entries.get("preset", ""), f"{where}: "))
            if name:
                _refuse_unknown(name, presets or {}, f"{where}: model.preset = {shown(name)}")
                base = (presets or {})[name]
        built[section] = _filled(base, entries, where, choices)
    config = Config(**built)
    config.check(choices)
    return config


def _filled(base: Section, entries: Mapping[str, Any], where: str, choices: Choices) -> Section:
    """Return a section with its entries in a file; a key that another library or section has is told ours."""
    known = base.fields(choices)
    changes: dict[str, Any] = {}
    for key, value in entries.items():
        if key not in known:
            meant = [field for field in fields().values() if field.called(str(key))]
            names = [field.key for field in meant if field.section == base.section] + [field.name for field in meant]
            _refuse_unknown(str(key), known, f"{where}: key {base.section}.{key}", *names[:1])
        changes[key] = known[key].read(value, f"{where}: ")
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _refuse_unknown(name: str, known: Collection[str], what: str, meant: str = "") -> None:
    """Raise `ConfigError` for a name that is not known, with `meant` or else the nearest one that is."""
    if name in known:
        return
    meant = meant or next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)), "")
    hint = f"did you mean {meant!r}?" if meant else f"known: {', '.join(sorted(known))}"
    raise ConfigError(f"{what} is unknown; {hint}")


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
    return json.dumps(value).replace("\x7f", "\\u007f")  # a JSON string is a TOML basic string
