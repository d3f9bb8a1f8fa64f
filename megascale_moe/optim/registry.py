"""The optimizers that a config can name.

To add one, write its rule in a file of its own and put the object into `RULES`; CONTRIBUTING.md goes through it.
"""

from __future__ import annotations

from megascale_moe.config import ConfigError, TrainConfig
from megascale_moe.optim.adamw import ADAMW
from megascale_moe.optim.muon import MUON
from megascale_moe.optim.rule import Rule

RULES: tuple[Rule, ...] = (ADAMW, MUON)


def rule_of(config: TrainConfig) -> Rule:
    """Return the rule that `train.optimizer` names.

    Raises:
        ConfigError: no rule has that name.
    """
    for rule in RULES:
        if rule.name == config.optimizer:
            return rule
    known = ", ".join(repr(rule.name) for rule in RULES)
    raise ConfigError(f"train.optimizer = {config.optimizer!r}: must be one of {known}")
