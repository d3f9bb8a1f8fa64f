"""Results of one case as a table: medians over rounds, ratios to ours, and whether the losses agree."""

from collections.abc import Callable
from statistics import median
from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]
# Relative difference of losses that counts as the same training: sums in another order in FP32,
# rounding to BF16 (8 bits of mantissa, averaged over 4,096 tokens) otherwise.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-3}
CELLS: dict[str, Callable[[Row], str]] = {
    "side": lambda row: row["side"],
    "tokens/s": lambda row: f"{row['tokens_per_s']:.0f}",
    "min - max": lambda row: f"{row['slowest']:.0f} - {row['fastest']:.0f}",
    "CPU ms/step": lambda row: f"{row['cpu_ms']:.0f}",
    "speed": lambda row: f"{row['speed_ratio']:.2f}",
    "CPU": lambda row: f"{row['cpu_ratio']:.2f}",
    "GiB": lambda row: f"{row['memory_gib']:.1f}",
    "others": lambda row: f"{row['others']:.2f}",
    "loss": lambda row: f"{row['loss']:.4f}",
    "difference": lambda row: f"{row['difference']:.0e}",
    "agrees": lambda row: "yes" if row["agrees"] else "NO",
}
"""Columns by name: what they show of a row."""


def summarize(results: Results) -> list[Row]:
    """One row per side, the baseline's ratios being 1."""
    answers = results["answers"]
    reference = reference_side(results)
    return [summarize_side(results, name, answers.get(reference)) for name in answers]


def reference_side(results: Results) -> str | None:
    """Ours, or the first side of full precision while ours is missing."""
    sides = list(results["answers"])
    exact = [name for name in sides if name not in results["half"]] or sides
    return results["baseline"] if results["baseline"] in sides else next(iter(exact), None)


def summarize_side(results: Results, name: str, reference: list[Row]) -> Row:
    answers = results["answers"][name]
    tokens = results["tokens_per_step"]
    speeds = [tokens * answer["steps"] / answer["wall"] for answer in answers[1:]]
    difference = loss_difference(answers, reference)
    loose = results["dtype"] == "bf16" or name in results["half"]
    return {
        "side": name,
        "tokens_per_s": median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "cpu_ms": median(1000 * answer["cpu"] / answer["steps"] for answer in answers[1:]),
        "speed_ratio": ratio(reference, answers, "wall"),
        "cpu_ratio": ratio(answers, reference, "cpu"),
        "memory_gib": max(answer["memory"] for answer in answers) / 2**30,
        "others": median(answer["others"] / answer["wall"] for answer in answers[1:]),
        "loss": answers[-1]["losses"][-1],
        "difference": difference,
        "agrees": difference <= TOLERANCE["bf16" if loose else "fp32"],
    }


def ratio(above: list[Row], below: list[Row], key: str) -> float:
    """Median over rounds of the ratio within a round, so that slow drifts of the machine cancel."""
    return float(median(a[key] / b[key] for a, b in zip(above[1:], below[1:], strict=True)))


def loss_difference(answers: list[Row], reference: list[Row]) -> float:
    """Largest relative difference of any step's loss."""
    pairs = zip(all_losses(answers), all_losses(reference), strict=True)
    return max(abs(ours - theirs) / theirs for ours, theirs in pairs)


def all_losses(answers: list[Row]) -> list[float]:
    return [loss for answer in answers for loss in answer["losses"]]


def grid(found: list[Row], columns: dict[str, Callable[[Row], str]]) -> list[list[str]]:
    """A table as text, its head first."""
    return [list(columns), *([cell(row) for cell in columns.values()] for row in found)]


def title(results: Results) -> str:
    ranks, threads = results["ranks"], results["threads"]
    place = f"1 process, {threads} threads" if ranks == 1 else f"{ranks} ranks, {threads} thread each"
    place = "1 GPU" if results.get("device") == "cuda" else place
    return f"{results['dtype'].upper()}, {place}"


def origin(results: Results) -> str:
    """Where and how the figures came to be, in one line."""
    machine = results["machine"]
    gpus = {version["gpu"] for version in results["versions"].values() if "gpu" in version}
    hardware = ", ".join([*gpus, f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"])
    amount = f"{results['rounds']} rounds of {results['steps']} steps"
    return f"{results['date']}; {hardware}; {amount}"


def base(results: Results) -> str:
    """What the ratios are to."""
    return f"ratios to {reference_side(results)}"


def footnotes(results: Results) -> list[str]:
    """What a reader must not miss: partial precision and sides that failed."""
    notes = [f"{name}: its experts compute in BF16" for name in results["half"] if results["dtype"] == "fp32"]
    return notes + [f"{name}: {reason}" for name, reason in results["failures"].items()]


def plain_table(results: Results) -> str:
    """Aligned columns for a terminal."""
    lines = aligned(grid(summarize(results), CELLS))
    return "\n".join(["", title(results), f"{origin(results)}; {base(results)}", "", *lines, *footnotes(results)])


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(results: Results) -> str:
    """The same for README.md."""
    lines = piped(grid(summarize(results), CELLS))
    notes = [f"- {note}" for note in footnotes(results)]
    top = [f"### {title(results)}", "", f"{origin(results)}; {base(results)}", ""]
    return "\n".join([*top, *lines, *(["", *notes] if notes else [])])


def piped(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, the first row being its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]
