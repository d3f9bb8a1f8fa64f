"""`megascale plan`: search, or price what a config says; print, and write what other commands take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from megascale_moe.config import Config, ConfigError, require, to_toml
from megascale_moe.pipeline.program import collector_paused
from megascale_moe.planner.cluster import load
from megascale_moe.planner.explain import Explanation, explain, most
from megascale_moe.planner.search import Plan, capacity, planned, search
from megascale_moe.planner.space import Space
from megascale_moe.planner.step import PricedLayout, Pricer
from megascale_moe.tools.plan.show import (
    memory_table,
    show,
    show_validation,
    wide_console,
    write_pareto,
    write_trace,
)
from megascale_moe.tools.report.command import plan_report
from megascale_moe.tools.validation.validate import validate
from megascale_moe.train.output import print_json
from megascale_moe.train.progress import counted_progress


@collector_paused()
def plan(
    configs: Sequence[Config], cluster_name: str | None, gpus: int | None, keep: str, *, fixed: bool, out: Path,
    as_json: bool,
) -> int:  # fmt: skip
    """Find the fastest plans of a config, or price those of one or two; print them and write the files of the best.

    Args:
        keep: keys that a search leaves as they are, comma-separated. fixed: price the layout as it is.

    Raises:
        ConfigError: something is missing; see also `search` and `planner.cluster.load`.
    """
    if cluster_name is None:
        raise ConfigError("--cluster is missing: name a profile (h800) or a TOML file")
    if gpus is None:
        raise ConfigError("--gpus is missing: how many GPUs has the cluster")
    kept = frozenset(key.strip() for key in keep.split(",") if key.strip())
    require(not (kept and fixed), "--keep with --fixed: a fixed layout is not searched; leave one out")
    cluster, console = load(cluster_name), wide_console(stderr=as_json)
    document: dict[str, Any] = {"cluster": cluster.name, "stack": cluster.stack, "gpus": gpus}
    ranked = len(configs) == 1 and not fixed
    if ranked:
        start = time.monotonic()
        with counted_progress() as progress:
            result = search(Space(configs[0], gpus, cluster.node, kept), cluster, progress=progress)
        seconds, plans = time.monotonic() - start, result.plans
        numbers = f"{result.layouts:,} layouts looked at, {result.priced:,} priced, in {seconds:.1f} s"
        console.print(numbers, markup=False)
        document |= {"layouts": result.layouts, "priced": result.priced, "search_seconds": seconds}
    else:
        plans = tuple(planned(config, cluster, gpus) for config in configs)
    pricer = Pricer(cluster)
    layouts = [pricer.layout(each.config, gpus) for each in plans]
    explained = [explain(layout) for layout in (layouts[:1] if ranked else layouts)]
    show(plans, cluster, explained, console, ranked)
    if len(configs) == 1:
        console.print(memory_table(plans[0], cluster))
        _write(plans, layouts[0], out, console)
    if as_json:
        rows = [_row(*each, capacity(cluster)) for each in itertools.zip_longest(plans, layouts, explained)]
        print_json(document | {"plans": rows})
    return 0


def validate_rows(path: Path, *, as_json: bool) -> int:
    """Predict the rows of a file beside what they say was measured.

    Raises:
        ConfigError: see `validate`.
    """
    with counted_progress() as progress:
        validation = validate(path, progress)
    show_validation(validation, wide_console(stderr=as_json))
    if as_json:
        print_json(validation.document())
    return 0


def _row(plan: Plan, layout: PricedLayout, why: Explanation | None, holds: float) -> dict[str, Any]:
    """Return the --json document of a plan. One that is not explained says what takes most of its step."""
    price = plan.price
    row: dict[str, Any] = {
        "config": asdict(plan.config), "step_seconds": price.seconds, "tokens_per_second": price.tokens_per_second,
        "mfu": price.mfu, "exposed_comm_seconds": price.exposed, "bubble": price.bubble,
        "memory_bytes": plan.bytes.peak, "memory": asdict(plan.bytes), "fits": plan.bytes.peak <= holds,
        "limit": why.limit if why else most(layout),
    }  # fmt: skip
    if why:
        row |= {"seconds": dict(why.seconds), "criterion": why.criterion, "gains": [asdict(g) for g in why.gains]}
    return row


def _write(plans: Sequence[Plan], best: PricedLayout, folder: Path, console: Console) -> None:
    """Write the best plan as a config, a trace and a page, and all as a picture."""
    cluster, path = best.cluster, folder / "plan.toml"
    files = ["plan.toml", "trace.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(best.config), encoding="utf-8")
        write_trace(best, folder / "trace.json")
        files += ["pareto.png"] if write_pareto(plans, cluster, folder / "pareto.png") else []
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
    source = f"Seconds of operators are predicted from the profile {cluster.name} ({cluster.stack})."
    plan_report(best.config, best.mesh.world, path, folder / "report.html", (best.prices, source))
    console.print(f"{folder}: {', '.join([*files, 'report.html'])}", markup=False)
