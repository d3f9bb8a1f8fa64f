"""Results of one link speed as a table: as table.py, with bytes on the wire and ratios to the best Megatron layout."""

from collections.abc import Callable
from statistics import median

from table import CELLS, Results, Row, aligned, footnotes, grid, origin, piped, ratio, summarize

OWN: dict[str, Callable[[Row], str]] = {
    "ms/step": lambda row: f"{row['ms']:.0f}",
    "MB/step": lambda row: f"{row['wire_mb']:.0f}",
    "x Megatron": lambda row: f"{row['of_megatron']:.2f}" if row["of_megatron"] else "-",
}
COLUMNS = {
    name: (CELLS | OWN)[name]
    for name in ("side", "tokens/s", "min - max", "ms/step", "CPU ms/step", "MB/step", "x Megatron", "GiB", "others",
                 "difference", "agrees")
}  # fmt: skip


def rows(results: Results) -> list[Row]:
    """One row per side, fastest first."""
    found = summarize(results)
    best = fastest(found, "megatron")
    for row in found:
        answers = results["answers"][row["side"]]
        row["ms"] = median(1000 * answer["wall"] / answer["steps"] for answer in answers[1:])
        row["wire_mb"] = median(answer["wire"] / answer["steps"] / 1e6 for answer in answers[1:])
        row["of_megatron"] = ratio(results["answers"][best["side"]], answers, "wall") if best else 0.0
    return sorted(found, key=lambda row: -row["tokens_per_s"])


def fastest(found: list[Row], library: str) -> Row | None:
    """The best layout of a library, as a user would choose it for these links."""
    return max((row for row in found if row["side"].startswith(library)), key=lambda r: r["tokens_per_s"], default=None)


def title(results: Results) -> str:
    links, case = results["links"], results["case"]
    return (
        f"{case['experts']} experts of {case['expert_width']}, top-{case['top_k']}, links x{links['speed']:g}: "
        f"{links['bits_per_s'] / 1e6:.0f} Mbit/s for {links['flops'] / 1e9:.1f} GFLOP/s "
        f"a rank, R {links['R_cluster']:.2f} (of an H800 over NVLink: {links['R_node']:.2f})"
    )


def summary(results: Results) -> list[str]:
    """Best against best, where both libraries took part."""
    found = rows(results)
    ours, theirs = fastest(found, "megascale"), fastest(found, "megatron")
    if ours is None or theirs is None:
        return []
    return [f"best of ours {ours['side']}, best of Megatron-Core {theirs['side']}: {ours['of_megatron']:.2f}x"]


def plain_table(results: Results) -> str:
    """Aligned columns for a terminal."""
    lines = aligned(grid(rows(results), COLUMNS))
    return "\n".join(["", title(results), origin(results), "", *lines, *footnotes(results), *summary(results)])


def markdown(results: Results) -> str:
    """The same for README.md."""
    lines = piped(grid(rows(results), COLUMNS))
    notes = [f"- {note}" for note in [*summary(results), *footnotes(results)]]
    return "\n".join([f"### {title(results)}", "", origin(results), "", *lines, "", *notes])
