"""A whole config, and all of its fields."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from functools import cache

from megascale_moe.config.fields import AS_DECLARED, Choices, Field, chosen, fields_of
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
        for name in sections():
            getattr(self, name).check(choices)


@cache
def sections() -> dict[str, type]:
    """Return the dataclass of each section."""
    hints = typing.get_type_hints(Config)
    return {each.name: hints[each.name] for each in dataclasses.fields(Config)}


def fields(choices: Choices = AS_DECLARED) -> dict[str, Field]:
    """Return every field by its "section.key", in the order of the config."""
    found = [field for name, kind in sections().items() for field in fields_of(name, kind).values()]
    return {field.name: chosen(field, choices) for field in found}
