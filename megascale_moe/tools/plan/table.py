"""Plans as tables and sentences for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megascale_moe.config import Config
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.explain import WORDS, Explanation
from megascale_moe.planner.search import Plan, SearchResult, capacity
from megascale_moe.planner.space import parallel_words
from megascale_moe.tools.dryrun.table import size
from megascale_moe.tools.validation.validate import Validation

WIDTH = 210  # columns that the longest layout needs


def wide_console(*, stderr: bool) -> Console:
    """One that does not squeeze tables: a narrow terminal wraps their lines."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    return console


def option_words(config: Config) -> str:
    """Options in a few words: "micro-batch 1, scheduled, remat paper, split 4, gradients bf16"."""
    o, w = config.overlap, config.wire
    found = [f"micro-batch {config.train.micro_batch}", o.order]
    found += [f"remat {o.remat}"] if o.remat != "none" else []
    found += [f"split {o.split}"] if o.split != "none" else []
    found += ["two at once"] if o.in_pairs else []
    found += [f"{name} {value}" for name in ("gradients", "activations", "parameters")
              if (value := getattr(w, name)) != "fp32"]  # fmt: skip
    return ", ".join(found)


def show(
    plans: Sequence[Plan], cluster: Cluster, explained: Sequence[Explanation], console: Console, ranked: bool
) -> None:
    """Print plans and what is to be known of the first, or of each where they are compared."""
    console.print(_table(plans, cluster, ranked))
    if len(explained) > 1:
        console.print(_breakdown(explained))
    for number, each in enumerate(explained, 1):
        name = f"plan {number}: " if len(explained) > 1 else ""
        console.print(f"{name}limited by {each.limit}", markup=False)
        more = "; ".join(f"{gain.what} saves {gain.saved:.1%}" for gain in each.gains[1:4])
        console.print(f"  {more}", markup=False)
        verdict = "computes longer than" if each.criterion > 1 else "computes no longer than"
        console.print(f"  R = {each.criterion:.2f}: an expert {verdict} its tokens travel", markup=False)


def show_search(found: SearchResult, seconds: float, console: Console) -> None:
    """One line about what was looked at."""
    console.print(f"{found.layouts:,} layouts looked at, {found.priced:,} priced, in {seconds:.1f} s", markup=False)


def show_validation(found: Validation, console: Console) -> None:
    """Print every row, and the errors of each stack and of all."""
    table = Table(box=None, pad_edge=False)
    table.add_column("row", no_wrap=True)
    for name in ("measured", "predicted", "unit", "error"):
        table.add_column(name, justify="right", no_wrap=True, min_width=9)
    table.add_column("use", no_wrap=True)
    table.add_column("stack, or why it is excluded", no_wrap=True)
    for row in found.rows:
        numbers = ["" if value is None else f"{value:.4g}" for value in (row.reference, row.predicted)]
        error = "" if row.error is None else f"{row.error:+.1%}"
        table.add_row(row.id, *numbers, row.unit, error, row.use, row.reason if row.use == "excluded" else row.stack)
    console.print(table)
    for name, count, mean, worst in found.by_stack():
        console.print(f"{name}: {count} test rows, mean error {mean:.1%}, worst {worst:.1%}", markup=False)
    if found.mean_error is not None and found.worst_error is not None:
        count = len(found.errors())
        console.print(f"all {count} test rows: mean error {found.mean_error:.1%}, worst {found.worst_error:.1%}")


def _table(plans: Sequence[Plan], cluster: Cluster, ranked: bool) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left",
                  title=f"{plans[0].gpus:,} GPUs, profile {cluster.name} ({cluster.stack})")  # fmt: skip
    table.add_column("#" if ranked else "plan", justify="right")
    for name in ("step", "tokens/s", "MFU", "exposed", "bubble", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    table.add_column("options", no_wrap=True)
    for number, plan in enumerate(plans, 1):
        price = plan.price
        over = "" if plan.bytes.peak <= capacity(cluster) else " (does not fit)"
        table.add_row(
            str(number), seconds_words(price.seconds), f"{price.tokens_per_second:,.0f}", f"{price.mfu:.1%}",
            f"{price.exposed / price.seconds:.1%}", f"{price.bubble:.1%}", size(plan.bytes.peak) + over,
            parallel_words(plan.config.parallel), option_words(plan.config),
        )  # fmt: skip
    return table


def memory_table(plan: Plan, cluster: Cluster) -> Table:
    """Return a table of what the fullest rank holds, by category."""
    b = plan.bytes
    title = f"memory of a rank at place {plan.place} of the pipeline, of {size(capacity(cluster))}"
    table = Table(box=None, pad_edge=False, title_justify="left", title=title)
    rows = {"parameters": b.parameters, "gradients": b.gradients, "optimizer": b.optimizer,
            "activations": b.activations, "end of the step": b.update, "peak": b.peak}  # fmt: skip
    for name in rows:
        table.add_column(name, justify="right")
    table.add_row(*map(size, rows.values()))
    return table


def _breakdown(explained: Sequence[Explanation]) -> Table:
    table = Table(box=None, pad_edge=False, title="seconds of a step", title_justify="left")
    table.add_column("")
    for number in range(1, len(explained) + 1):
        table.add_column(f"plan {number}", justify="right")
    for name, words in WORDS.items():
        table.add_row(words, *(f"{each.seconds.get(name, 0.0):.3f}" for each in explained))
    return table


def seconds_words(seconds: float) -> str:
    """Seconds with three digits."""
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
