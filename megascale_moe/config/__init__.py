"""Configuration: what a TOML file may say, what it means, and how it becomes checked dataclasses.

This is the leaf of the package: everything may import it, it imports nothing of the rest. Sections and keys mirror the
TOML file one to one. All that is known of a key stands at its field (`ModelConfig`, `TrainConfig`, ...): type, range,
default, meaning, other names. What is refused and in which words, what `megascale config` prints (`fields`) and the
JSON schema for editors (`json_schema`) are read from there; there is no second table.
"""

from megascale_moe.config.fields import Choices, ConfigError, Field, require
from megascale_moe.config.load import from_dict, load, to_toml
from megascale_moe.config.model import LayerSpec, ModelConfig
from megascale_moe.config.parallel import OverlapConfig, ParallelConfig, WireConfig
from megascale_moe.config.run import DataConfig, RunConfig, TrainConfig
from megascale_moe.config.whole import Config, fields, json_schema

__all__ = [
    "Choices",
    "Config",
    "ConfigError",
    "DataConfig",
    "Field",
    "LayerSpec",
    "ModelConfig",
    "OverlapConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "WireConfig",
    "fields",
    "from_dict",
    "json_schema",
    "load",
    "require",
    "to_toml",
]
