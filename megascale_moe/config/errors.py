"""The refusal of a user's input."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user's input is wrong: one line naming what, where and what would be right (exit status 2)."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a key or a path may have a line break in it


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
