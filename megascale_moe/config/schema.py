"""The JSON schema of a config, for editors that complete and check TOML files."""

from __future__ import annotations

from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

from megascale_moe.config.declare import TextForm
from megascale_moe.config.fields import AS_DECLARED, LIST, Choices, Field, chosen, fields_of
from megascale_moe.config.whole import sections

DRAFT = "https://json-schema.org/draft/2020-12/schema"
TYPES: dict[str, Any] = {
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "str": ["string", "integer"],
    LIST: "array",
}
"""A whole number is taken for a text that looks like one: split = 4."""


def json_schema(choices: Choices = AS_DECLARED) -> dict[str, Any]:
    """Return the schema of a config file: what it takes is what `load` takes, up to what keys say about each other."""
    return {
        "$schema": DRAFT,
        "title": "MegaScale-MoE",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _section(name, kind, choices) for name, kind in sections().items()},
    }


def _section(name: str, kind: type, choices: Choices) -> dict[str, Any]:
    return {
        "type": "object",
        "description": (kind.__doc__ or "").partition("\n")[0],
        "additionalProperties": False,
        "properties": {key: _key(chosen(field, choices)) for key, field in fields_of(name, kind).items()},
    }


def _key(field: Field) -> dict[str, Any]:
    default = list(field.default) if field.kind == LIST else field.default
    description = f"{field.meaning} ({field.exception})" if field.special else field.meaning
    about = {"description": description, "default": default}
    if field.choices:
        return {"enum": list(field.choices), **about}
    rules: dict[str, Any] = {}
    for rule in field.rules:
        rules |= _rule(rule)
    if field.kind == LIST:
        return {"type": "array", "items": {"type": "integer", **rules}, **about}
    return {"type": TYPES[field.kind], **rules, **about}


def _rule(rule: Any) -> dict[str, Any]:
    if isinstance(rule, TextForm):
        return {"pattern": f"^({rule.pattern})$"}
    attribute, keyword = _KEYWORDS[type(rule)]
    return {keyword: getattr(rule, attribute)}


_KEYWORDS: dict[type, tuple[str, str]] = {
    Ge: ("ge", "minimum"),
    Gt: ("gt", "exclusiveMinimum"),
    Le: ("le", "maximum"),
    Lt: ("lt", "exclusiveMaximum"),
    MinLen: ("min_length", "minLength"),
    MaxLen: ("max_length", "maxLength"),
}
