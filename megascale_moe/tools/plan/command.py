"""`megascale plan`: search, or price what a config says; print, and write what other commands take."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megascale_moe.config import Config, ConfigError, require, to_toml
from megascale_moe.planner.cluster import load
from megascale_moe.planner.explain import Explanation, explain, most
from megascale_moe.planner.search import Plan, capacity, planned, search
from megascale_moe.planner.space import Space
from megascale_moe.planner.step import PricedLayout, Pricer
from megascale_moe.tools.plan.pictures import write_pareto, write_trace
from megascale_moe.tools.plan.table import memory_table, show, show_search, show_validation, wide_console
from megascale_moe.tools.report.command import plan_report
from megascale_moe.tools.validation.validate import validate
from megascale_moe.train.progress import counted_progress


@dataclass(frozen=True)
class PlanOptions:
    """The arguments of the command.

    Attributes:
        configs: one to search or to price, two to compare. kept: keys that a search leaves as they are. fixed: price
            the layout as it is. out: folder for the files of the best plan.
    """

    configs: tuple[Config, ...]
    cluster: str
    gpus: int
    kept: frozenset[str]
    fixed: bool
    out: Path

    @classmethod
    def of(
        cls, configs: Sequence[Config], cluster: str | None, gpus: int | None, keep: str, *, fixed: bool, out: Path
    ) -> PlanOptions:  # fmt: skip
        """From the command line.

        Raises:
            ConfigError: something is missing.
        """
        require(cluster is not None, "--cluster is missing: name a profile (h800) or a TOML file")
        require(gpus is not None, "--gpus is missing: how many GPUs has the cluster")
        kept = frozenset(key.strip() for key in keep.split(",") if key.strip())
        require(not (kept and fixed), "--keep with --fixed: a fixed layout is not searched; leave one out")
        assert cluster is not None
        assert gpus is not None
        return cls(tuple(configs), cluster, gpus, kept, fixed, out)


def plan(order: PlanOptions, *, as_json: bool) -> int:
    """Do it.

    Raises:
        ConfigError: see `search` and `planner.cluster.load`.
    """
    cluster, console = load(order.cluster), wide_console(stderr=as_json)
    pricer = Pricer(cluster)
    ranked = len(order.configs) == 1 and not order.fixed
    if ranked:
        start = time.monotonic()
        space = Space(order.configs[0], order.gpus, cluster.node, order.kept)
        with counted_progress() as progress:
            found = search(space, cluster, progress=progress)
        seconds = time.monotonic() - start
        show_search(found, seconds, console)
        more = {"layouts": found.layouts, "priced": found.priced, "search_seconds": seconds}
        plans: Sequence[Plan] = found.plans
    else:
        plans, more = [planned(config, cluster, order.gpus) for config in order.configs], {}
    layouts = [pricer.layout(each.config, order.gpus) for each in plans]
    explained = [explain(layout) for layout in (layouts[:1] if ranked else layouts)]
    show(plans, cluster, explained, console, ranked)
    if len(order.configs) == 1:
        console.print(memory_table(plans[0], cluster))
        _write(plans, layouts[0], order.out, console)
    if as_json:
        about = {"cluster": cluster.name, "stack": cluster.stack, "gpus": order.gpus, **more}
        rows = [_row(*each, capacity(cluster)) for each in itertools.zip_longest(plans, layouts, explained)]
        print(json.dumps(about | {"plans": rows}, allow_nan=False))
    return 0


def validate_rows(path: Path, *, as_json: bool) -> int:
    """Predict the rows of a file beside what they say was measured.

    Raises:
        ConfigError: see `planner.validate.validate`.
    """
    with counted_progress() as progress:
        found = validate(path, progress)
    show_validation(found, wide_console(stderr=as_json))
    if as_json:
        print(json.dumps(found.document(), allow_nan=False))
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
    """The best plan as a config, a trace and a page, and all as a picture."""
    cluster, prices, path = best.cluster, best.prices, folder / "plan.toml"
    assert cluster is not None
    assert prices is not None
    files = ["plan.toml", "trace.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(best.config), encoding="utf-8")
        write_trace(best, folder / "trace.json")
        files += ["pareto.png"] if write_pareto(plans, cluster, folder / "pareto.png") else []
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
    words = f"Seconds of operators are predicted from the profile {cluster.name} ({cluster.stack})."
    plan_report(best.config, best.mesh.world, path, folder / "report.html", (prices, words))
    console.print(f"{folder}: {', '.join([*files, 'report.html'])}", markup=False)
