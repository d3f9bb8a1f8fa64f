"""A dry run as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megascale_moe.tools.dryrun.step import DryRun

UNITS = ("B", "KB", "MB", "GB", "TB")
PHASES = {"F": "forward", "B": "backward", "R": "made again", "W": "synchronisation"}


WIDTH = 110  # columns that the longest operator's name needs


def show(run: DryRun, console: Console | None = None) -> None:
    """Print everything."""
    console = console or Console(highlight=False, soft_wrap=True)
    mesh = run.mesh
    console.print(
        f"{many(run.parameters_total)} parameters, {many(run.parameters_active)} active, "
        f"{run.flops_per_token / 1e9:,.4g} GFLOP per token, {many(run.tokens_per_step)} tokens per step"
    )
    console.print(
        f"{run.ranks:,} ranks = pp {mesh['pp']} x dp {mesh['dp']} x node {mesh['node']}; experts over "
        f"ep {mesh['ep']} x etp {mesh['etp']}; {run.micro_batches} micro-batches; pipeline bubble {run.bubble:.1%}"
    )
    rank = run.rank
    console.print(f"rank {rank['index']}: {_stages(rank)}; {rank['flops'] / 1e12:,.1f} TFLOP per step\n")
    console.print(_memory(run))
    console.print(_wire(run), width=max(console.width, WIDTH))
    if run.agreement is not None:
        what = run.agreement.disagreement or "agree on every message"
        console.print(f"all {run.agreement.ranks:,} ranks ({run.agreement.messages:,} messages compared): {what}")


def _stages(rank: dict[str, list[int]]) -> str:
    numbers = rank["stages"]
    layers = f"layers {rank['layers'][0]} to {rank['layers'][-1]}"
    if len(numbers) == 1:
        return f"pipeline stage {numbers[0]}, {layers}"
    return f"pipeline stages {', '.join(map(str, numbers))}, {len(rank['layers'])} layers"


def many(count: float) -> str:
    """A count with its unit: thousands, million, billion."""
    for scale, unit in ((1e9, " billion"), (1e6, " million")):
        if count >= scale:
            return f"{count / scale:,.1f}{unit}"
    return f"{count:,.0f}"


def size(count: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point; powers of 1,000."""
    for unit in UNITS:
        if abs(count) < 1000 or unit == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


def _memory(run: DryRun) -> Table:
    table = Table("memory of the rank", "", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    notes = {"activations": "kept between operators", "buffers": "messages and intermediate results at the peak"}
    table.add_column("")
    for name, count in run.rank["memory"].items():
        style = "bold" if name == "peak" else ""
        table.add_row(name, size(count), notes.get(name, ""), style=style)
    return table


def _wire(run: DryRun) -> Table:
    table = Table("\nsent by the rank in a step", "\naxis", "", "\nmessages", "\nbytes", box=None, pad_edge=False,
                  header_style="bold")  # fmt: skip
    for column in table.columns[3:]:
        column.justify = "right"
    totals: dict[str, int] = {}
    for wire in run.rank["wire"]:
        table.add_row(wire["op"], wire["axis"], PHASES[_what(wire)], f"{wire['count']:,}", size(wire["bytes"]))
        totals[wire["axis"]] = totals.get(wire["axis"], 0) + wire["bytes"]
    for axis, count in totals.items():
        table.add_row("total", axis, "", "", size(count), style="bold")
    return table


def _what(wire: dict[str, str]) -> str:
    return "W" if wire["op"].startswith(("gradients.", "parameters.")) else wire["phase"]
