"""What commands show: one JSON document for programs, tables without lines and plots for people."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.table import Table


def print_json(document: dict[str, Any]) -> None:
    """Print a document to standard output.

    Raises:
        ValueError: it holds a number that is not finite, which JSON cannot.
    """
    print(json.dumps(document, allow_nan=False), flush=True)


def table(
    heads: Sequence[str], rows: Iterable[Iterable[str]], *, text: Collection[str] = (), title: str | None = None
) -> Table:
    """Return a table for a console; `text` are the columns that hold no numbers, which stand to the left."""
    made = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for head in heads:
        made.add_column(head, justify="left" if head in text else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def pyplot() -> Any:
    """Return pyplot with a backend that needs no screen, None where matplotlib is missing; its import is slow."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
