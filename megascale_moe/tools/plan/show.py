"""Plans for people: tables and sentences, a step as a Chrome trace, and memory against speed of all plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megascale_moe.config import Config
from megascale_moe.engine.trace import Event, Trace, write_chrome
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.explain import WORDS, Explanation
from megascale_moe.planner.search import Plan, capacity
from megascale_moe.planner.space import parallel_words
from megascale_moe.planner.step import PricedLayout
from megascale_moe.tools.dryrun.table import size
from megascale_moe.tools.validation.validate import Validation
from megascale_moe.train.output import pyplot, table
from megascale_moe.train.timeline import simulated

WIDTH = 210  # columns that the longest layout needs
LAYERS = 2
"""Layers of a stage that are drawn operator by operator."""


def wide_console(*, stderr: bool) -> Console:
    """Return a console that does not squeeze tables: a narrow terminal wraps their lines."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    return console


def show(
    plans: Sequence[Plan], cluster: Cluster, explained: Sequence[Explanation], console: Console, ranked: bool
) -> None:
    """Print plans and what is to be known of the first, or of each where they are compared."""
    console.print(_plan_table(plans, cluster, ranked))
    names = [f"plan {number}" for number in range(1, len(explained) + 1)]
    if len(explained) > 1:
        seconds = [
            [caption, *(f"{each.seconds.get(name, 0.0):.3f}" for each in explained)] for name, caption in WORDS.items()
        ]
        console.print(table(["", *names], seconds, text=[""], title="seconds of a step"))
    for name, each in zip(names, explained, strict=True):
        gains = "; ".join(f"{gain.what} saves {gain.saved:.1%}" for gain in each.gains[1:4])
        verdict = "computes longer than" if each.criterion > 1 else "computes no longer than"
        for line in (
            f"{name}: limited by {each.limit}" if len(explained) > 1 else f"limited by {each.limit}",
            f"  {gains}", f"  R = {each.criterion:.2f}: an expert {verdict} its tokens travel",
        ):  # fmt: skip
            console.print(line, markup=False)


def _plan_table(plans: Sequence[Plan], cluster: Cluster, ranked: bool) -> Table:
    rows = []
    for number, plan in enumerate(plans, 1):
        price, over = plan.price, "" if plan.bytes.peak <= capacity(cluster) else " (does not fit)"
        seconds = f"{price.seconds:.3g} s" if price.seconds < 1000 else f"{price.seconds:,.0f} s"
        rows.append([
            str(number), seconds, f"{price.tokens_per_second:,.0f}", f"{price.mfu:.1%}",
            f"{price.exposed / price.seconds:.1%}", f"{price.bubble:.1%}", size(plan.bytes.peak) + over,
            parallel_words(plan.config.parallel), _option_words(plan.config),
        ])  # fmt: skip
    heads = ["#" if ranked else "plan", "step", "tokens/s", "MFU", "exposed", "bubble", "memory", "layout", "options"]
    title = f"{plans[0].gpus:,} GPUs, profile {cluster.name} ({cluster.stack})"
    return table(heads, rows, text=("layout", "options"), title=title)


def _option_words(config: Config) -> str:
    """Return options in a few words: "micro-batch 1, scheduled, remat paper, split 4, gradients bf16"."""
    o = config.overlap
    options = [f"{name} {value}" for name, value in (("remat", o.remat), ("split", o.split)) if value != "none"]
    options += ["two at once"] if o.in_pairs else []
    formats = ((name, getattr(config.wire, name)) for name in ("gradients", "activations", "parameters"))
    options += [f"{name} {value}" for name, value in formats if value != "fp32"]
    return ", ".join([f"micro-batch {config.train.micro_batch}", o.order, *options])


def memory_table(plan: Plan, cluster: Cluster) -> Table:
    """Return a table of what the fullest rank holds, by category."""
    categories = asdict(plan.bytes)
    heads = ["end of the step" if name == "update" else name for name in categories]
    title = f"memory of a rank at place {plan.place} of the pipeline, of {size(capacity(cluster))}"
    return table(heads, [map(size, categories.values())], title=title)


def show_validation(validation: Validation, console: Console) -> None:
    """Print every row, and the errors of each stack and of all."""
    rows = [
        [row.id, *("" if value is None else f"{value:.4g}" for value in (row.reference, row.predicted)), row.unit,
         "" if row.error is None else f"{row.error:+.1%}", row.use, row.reason if row.use == "excluded" else row.stack]
        for row in validation.rows
    ]  # fmt: skip
    heads = ("row", "measured", "predicted", "unit", "error", "use", "stack, or why it is excluded")
    console.print(table(heads, rows, text=("row", *heads[5:])))
    for name, count, mean, worst in validation.by_stack():
        console.print(f"{name}: {count} test rows, mean error {mean:.1%}, worst {worst:.1%}", markup=False)
    if errors := validation.errors():
        mean, worst = sum(errors) / len(errors), max(errors)
        console.print(f"all {len(errors)} test rows: mean error {mean:.1%}, worst {worst:.1%}")


# --- pictures ---------------------------------------------------------------------------------------------------------


def write_trace(layout: PricedLayout, path: Path) -> None:
    """Write a trace for chrome://tracing or Perfetto.

    It has a process per pipeline rank with its actions, and a forward and a backward of some layers of the middle with
    their operators.
    """
    middle, last = layout.mesh.pp // 2, layout.mesh.pp
    kind = layout.kinds[middle].at_most(LAYERS)
    events = list[Event]()
    for phase in layout.phases:
        events += simulated(layout.stages.spans(kind, phase), max((event.end for event in events), default=0.0))
    names = [f"pipeline rank {rank}" for rank in range(last)] + [f"{kind.depth} layers of pipeline rank {middle}"]
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
        for process, name in enumerate(names)
    ]
    rows += [
        {"ph": "X", "pid": rank, "tid": 0, "name": str(action), "ts": start * 1e6, "dur": (end - start) * 1e6}
        for rank, spans in enumerate(layout.timeline.spans) for action, start, end in spans
    ]  # fmt: skip
    write_chrome(path, [*rows, *Trace(events).chrome(last)])


def write_pareto(plans: Sequence[Plan], cluster: Cluster, path: Path) -> bool:
    """Draw memory of the fullest rank against tokens per second; return False where matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.2))
    points = [(plan.bytes.peak / 1e9, plan.price.tokens_per_second / 1e3) for plan in plans]
    axes.scatter(*zip(*points, strict=True), s=28, color="#8a8f98", label="plans")
    front = list[tuple[float, float]]()  # by memory
    for memory, speed in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or speed > front[-1][1]:
            front.append((memory, speed))
    axes.plot(*zip(*front, strict=True), color="#1f6feb", marker="o", label="none is both smaller and faster")
    for number, point in enumerate(points, 1):
        axes.annotate(str(number), point, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.axvline(capacity(cluster) / 1e9, color="#d1242f", linestyle="--", linewidth=1, label="what a rank can hold")
    axes.set(xlabel="GB of the fullest rank", ylabel="thousand tokens per second",
             title=f"{plans[0].gpus:,} GPUs, {cluster.name}")  # fmt: skip
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return True
