"""A config file, read with all that is registered: presets, strategies, optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megascale_moe.config import Choices, Config, load
from megascale_moe.optim import registry as optimizers
from megascale_moe.presets import PRESETS
from megascale_moe.strategies import registry


def choices() -> Choices:
    """Return the values that keys may have which name something registered, by "section.key"."""
    rules = tuple(rule.name for rule in optimizers.RULES)
    return {"model.preset": ("", *PRESETS), **registry.choices(), "train.optimizer": rules}


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a TOML file with overrides, checked.

    Raises:
        ConfigError: what is wrong, where, and what would be right, in one line.
    """
    return load(path, list(overrides), PRESETS, choices())
