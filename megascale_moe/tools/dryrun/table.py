"""A dry run as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megascale_moe.tools.dryrun.step import DryRun

UNITS = ("B", "KB", "MB", "GB", "TB")
PHASES = {"F": "forward", "B": "backward", "R": "recomputed", "W": "synchronisation"}
NOTES = {"activations": "kept between operators", "buffers": "messages and intermediate results at the peak"}
WIDTH = 110  # columns that the longest operator's name needs


def show(run: DryRun) -> None:
    """Print everything."""
    console = Console(highlight=False, soft_wrap=True)
    mesh, rank, agreement = run.mesh, run.rank, run.agreement
    console.print(
        f"{many(run.parameters_total)} parameters, {many(run.parameters_active)} active, "
        f"{run.flops_per_token / 1e9:,.4g} GFLOP per token, {many(run.tokens_per_step)} tokens per step"
    )
    console.print(
        f"{run.ranks:,} ranks = pp {mesh['pp']} x dp {mesh['dp']} x node {mesh['node']}; experts over "
        f"ep {mesh['ep']} x etp {mesh['etp']}; {run.micro_batches} micro-batches; pipeline bubble {run.bubble:.1%}"
    )
    stages, layers = rank["stages"], rank["layers"]
    held = f"pipeline stages {', '.join(map(str, stages))}, {len(layers)} layers"
    if len(stages) == 1:
        held = f"pipeline stage {stages[0]}, layers {layers[0]} to {layers[-1]}"
    console.print(f"rank {rank['index']}: {held}; {rank['flops'] / 1e12:,.1f} TFLOP per step\n")
    memory = _table("memory of the rank", "", "", numbers=slice(1, 2))
    for name, count in rank["memory"].items():
        memory.add_row(name, size(count), NOTES.get(name, ""), style="bold" if name == "peak" else "")
    console.print(memory)
    console.print(_wire(run), width=max(console.width, WIDTH))
    if agreement is not None:
        outcome = agreement.disagreement or "agree on every message"
        console.print(f"all {agreement.ranks:,} ranks ({agreement.messages:,} messages compared): {outcome}")


def many(count: float) -> str:
    """Return a count with its unit: thousands, million, billion."""
    for scale, unit in ((1e9, " billion"), (1e6, " million")):
        if count >= scale:
            return f"{count / scale:,.1f}{unit}"
    return f"{count:,.0f}"


def size(count: float) -> str:
    """Return bytes in the unit that leaves one to three digits before the point; powers of 1,000."""
    for unit in UNITS:
        if abs(count) < 1000 or unit == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


def _table(*headers: str, numbers: slice) -> Table:
    table = Table(*headers, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[numbers]:
        column.justify = "right"
    return table


def _wire(run: DryRun) -> Table:
    table = _table("\nsent by the rank in a step", "\naxis", "", "\nmessages", "\nbytes", numbers=slice(3, None))
    totals: dict[str, int] = {}
    for wire in run.rank["wire"]:
        phase = "W" if wire["op"].startswith(("gradients.", "parameters.")) else wire["phase"]
        table.add_row(wire["op"], wire["axis"], PHASES[phase], f"{wire['count']:,}", size(wire["bytes"]))
        totals[wire["axis"]] = totals.get(wire["axis"], 0) + wire["bytes"]
    for axis, count in totals.items():
        table.add_row("total", axis, "", "", size(count), style="bold")
    return table
