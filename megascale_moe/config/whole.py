"""A whole config, all of its fields, and its JSON schema, for editors that complete and check TOML files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megascale_moe.config.fields import AS_DECLARED, Choices, Field, Section
from megascale_moe.config.model import ModelConfig
from megascale_moe.config.parallel import OverlapConfig, ParallelConfig, WireConfig
from megascale_moe.config.run import DataConfig, RunConfig, TrainConfig


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

    def check(self, choices: Choices = AS_DECLARED) -> None:
        """Raise `ConfigError` if a value is out of its range, or if a section contradicts itself.

        Args:
            choices: what else than declared a key may be, by "section.key".
        """
        for name in SECTIONS:
            getattr(self, name).check(choices)


SECTIONS: dict[str, type[Section]] = {
    each.name: each.default_factory for each in dataclasses.fields(Config)  # type: ignore[misc]
}
"""The dataclass of each section."""


def fields(choices: Choices = AS_DECLARED) -> dict[str, Field]:
    """Return every field by its "section.key", in the order of the config."""
    return {each.name: each for section in SECTIONS.values() for each in section.fields(choices).values()}


def json_schema(choices: Choices = AS_DECLARED) -> dict[str, Any]:
    """Return the schema of a config file: what it takes is what `load` takes, up to what keys say about each other."""
    sections = {
        name: {
            "type": "object",
            "description": (section.__doc__ or "").partition("\n")[0],
            "additionalProperties": False,
            "properties": {key: each.schema for key, each in section.fields(choices).items()},
        }
        for name, section in SECTIONS.items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "MegaScale-MoE",
        "type": "object",
        "additionalProperties": False,
        "properties": sections,
    }
