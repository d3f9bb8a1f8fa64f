"""Published measurements as a file of comma-separated values has them: a line of text per row, checked cell by cell."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megascale_moe.config import ConfigError, require

NEEDED = ("id", "stack", "model", "gpu", "gpus", "sequence_length")
UNITS = {"step_s": "s", "tokens_per_s_gpu": "tokens/s/GPU", "tflops_gpu": "TFLOP/s/GPU", "mfu_pct": "% MFU"}
"""Columns of what was measured, the first that a row has counts, and their units."""


@dataclass(frozen=True)
class PublishedRow:
    """A line of the file, by column."""

    file: str
    cells: Mapping[str, str]

    @property
    def id(self) -> str:
        """Its name."""
        return self.cells["id"]

    def text(self, column: str) -> str:
        """Return the text of a column, empty if there is none."""
        return self.cells.get(column, "")

    def count(self, column: str, default: int = 1) -> int:
        """Return a whole number; a column without one holds `default`."""
        text = self.text(column)
        if not text:
            return default
        require(text.isascii() and text.isdigit() and int(text) > 0, self.refusal(column, "a whole number above 0"))
        return int(text)

    def number(self, column: str) -> float | None:
        """Return the number that a column begins with ("432 non-causal" is 432); None if there is none."""
        text = self.text(column)
        match = re.match(r"[\d.]+(?:e[+-]?\d+)?(?![\w.])", text)
        if not match:
            return None
        try:
            value = float(match[0])
        except ValueError as error:
            raise ConfigError(self.refusal(column, "a number")) from error
        require(value > 0, self.refusal(column, "a positive number, or nothing"))
        return value

    def refusal(self, column: str, wanted: str) -> str:
        """Return a one-line refusal of a column."""
        return f"{self.file}: row {self.id}: {column} = {self.text(column)!r}: must be {wanted}"


def read(path: Path) -> list[PublishedRow]:
    """Return the rows of a file.

    Raises:
        ConfigError: it cannot be read, lacks a column, or a row lacks what every row must have.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            lines = [(reader.line_num, line) for line in reader]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    for column in NEEDED:
        require(column in names, f"{path}: column {column} is missing; needed are {', '.join(NEEDED)}")
    measured = not UNITS.keys().isdisjoint(names)
    require(measured, f"{path}: no column of a measurement; give one of {', '.join(UNITS)}")
    rows: dict[str, PublishedRow] = {}
    for number, line in lines:
        at = f"{path}: line {number}"
        require(None not in line, f"{at}: more cells than the first line has columns; put text with commas in quotes")
        row = PublishedRow(str(path), {column: (cell or "").strip() for column, cell in line.items()})
        require(row.id != "", f"{at}: id is empty; give each row a name")
        require(row.id not in rows, f"{at}: id = {row.id!r} is there twice; give each row its own")
        rows[row.id] = row
    require(bool(rows), f"{path}: has no rows; give at least one below the names of the columns")
    return list(rows.values())
