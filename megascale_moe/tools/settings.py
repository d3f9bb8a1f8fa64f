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
from collections.abc import Mapping

from megascale_moe.config import ConfigError, Field, fields, json_schema
from megascale_moe.config.fields import plain
from megascale_moe.config.load import toml_value
from megascale_moe.train.config_file import choices

WIDTH = 100
INDENT = "    "


def main(key: str, *, as_json: bool, schema: bool) -> int:
    """Print the keys that `key` names, all if it is empty, and return the exit status.

    Raises:
        ConfigError: there is no such key.
    """
    if schema:
        text = json.dumps(json_schema(choices()), indent=2, allow_nan=False)
    elif as_json:
        text = json.dumps(
            {
                field.name: {
                    "type": field.kind, "default": field.default, "range": field.range, "meaning": field.meaning,
                    "also": field.also, "choices": field.choices,
                }
                for field in matching(key, fields(choices()))
            },
            allow_nan=False,
        )  # fmt: skip
    else:
        text = "\n\n".join(map(paragraph, matching(key, fields(choices()))))
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; what is left must not be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def matching(key: str, known: Mapping[str, Field]) -> list[Field]:
    """Return the fields of a name: a key, a section, what others call it, or else a part of any of these.

    Raises:
        ConfigError: there are none.
    """
    exact = [field for field in known.values() if key in ("", field.section) or field.called(key)]
    if exact:
        return exact
    names = [(plain(name), field) for field in known.values() for name in (field.name, field.key, *field.also)]
    parts = {field.name: field for name, field in names if plain(key) in name}
    if not parts:
        near = difflib.get_close_matches(plain(key), [name for name, _ in names], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see megascale config"
        raise ConfigError(f"config key {key!r} is unknown; {hint}")
    return list(parts.values())


def paragraph(field: Field) -> str:
    """Return what is known of a field, for reading."""
    lines = [field.meaning, f"{field.kind}: {field.range}"]
    if field.also:
        lines.append(f"also known as {', '.join(field.also)}")
    wrap = textwrap.TextWrapper(
        min(shutil.get_terminal_size().columns, WIDTH), initial_indent=INDENT, subsequent_indent=INDENT,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    return "\n".join([f"{field.name} = {toml_value(field.default)}", *map(wrap.fill, lines)])
