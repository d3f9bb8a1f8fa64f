"""`megascale config`: what each key of the configuration means, what it takes, and what it is by default.

All of it is read from the declarations of the fields (`megascale_moe.config`); what is here is how it is searched and
printed.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from megascale_moe.config import ConfigError, Field, fields, json_schema
from megascale_moe.config.fields import plain
from megascale_moe.config.load import toml_value
from megascale_moe.train.config_file import choices

"""What is known only here, above the configuration."""
WIDTH = 100
INDENT = "    "


def main(key: str, *, as_json: bool, schema: bool) -> int:
    """Print the keys that `key` names, all if it is empty; returns the exit status.

    Raises:
        ConfigError: there is no such key.
    """
    if schema:
        _print(json.dumps(json_schema(choices()), indent=2, allow_nan=False))
        return 0
    found = matching(key, fields(choices()))
    if as_json:
        _print(json.dumps({field.name: document(field) for field in found}, allow_nan=False))
        return 0
    width = min(shutil.get_terminal_size().columns, WIDTH)
    _print("\n\n".join(paragraph(field, width) for field in found))
    return 0


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; what is left must not be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def matching(key: str, known: Mapping[str, Field]) -> list[Field]:
    """Return the fields of a name: a key, a section, what others call it, or else a part of any of these.

    Raises:
        ConfigError: there are none.
    """
    exact = [field for field in known.values() if key in ("", field.section) or field.called(key)]
    found = exact or [field for field in known.values() if any(plain(key) in plain(name) for name in _names(field))]
    if not found:
        near = difflib.get_close_matches(plain(key), [name for field in known.values() for name in _names(field)], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see megascale config"
        raise ConfigError(f"config key {key!r} is unknown; {hint}")
    return found


def document(field: Field) -> dict[str, Any]:
    """Return what is known of a field, for --json."""
    return {
        "type": field.kind, "default": field.default, "range": field.range, "meaning": field.meaning,
        "also": list(field.also), "choices": list(field.choices),
    }  # fmt: skip


def paragraph(field: Field, width: int) -> str:
    """Return what is known of a field, for reading."""
    lines = [field.meaning, f"{field.kind}: {field.range}"]
    if field.also:
        lines.append(f"also known as {', '.join(field.also)}")
    return "\n".join([f"{field.name} = {toml_value(field.default)}", *_wrapped(lines, width)])


def _wrapped(lines: Iterable[str], width: int) -> list[str]:
    wrap = textwrap.TextWrapper(
        width, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False, break_long_words=False
    )
    return [part for line in lines for part in wrap.wrap(line)]


def _names(field: Field) -> tuple[str, ...]:
    return (field.name, field.key, *field.also)
