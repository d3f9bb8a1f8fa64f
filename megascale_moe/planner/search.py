"""The fastest layouts of a model on a cluster that fit its memory.

There are tens of thousands, and all are looked at: each has a lower bound, what its computation or one of its links
alone would take (`bounds`), and layouts are priced in the order of their lower bounds until one is above what has been
found. So nothing is left out on a guess. A layout is priced with the least recomputation that fits. The best are then
refined: one option after the other is changed and kept where that is faster. Layouts with the same inside of a stage
share its lists (`stages.Stages`), so they go to the same worker.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch

from megascale_moe.config import Config, ConfigError, require
from megascale_moe.pipeline.program import collector_paused
from megascale_moe.planner.bounds import LowerBounds, least_bytes
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.memory import RankBytes
from megascale_moe.planner.space import OPTIONS, CandidateLayout, Space, changed, value
from megascale_moe.planner.step import PricedLayout, Pricer, StepPrice
from megascale_moe.strategies import registry

TOP = 3
"""Placements that are searched for: no other is faster, up to what options make of it."""
SHOWN = 6
"""Placements that are returned, all of them refined; behind the first ones the best that were met on the way."""
TRIED = 20
"""Layouts that are looked at to say whether a model fits so many GPUs: those that should need least."""
LARGEST = 32
"""The largest cluster that is tried for a model that does not fit, over what its weights alone would fill."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """A layout with its options, what a step takes, and what its fullest rank holds (at a place of the pipeline)."""

    config: Config
    gpus: int
    price: StepPrice
    bytes: RankBytes
    place: int


@dataclass(frozen=True)
class SearchResult:
    """The plans that a search found, best first; how many layouts there are, and how many of them were priced."""

    plans: tuple[Plan, ...]
    layouts: int
    priced: int


def capacity(cluster: Cluster) -> float:
    """Return the bytes that a rank may hold: what is not reserved, less what fragmentation makes unusable."""
    return (cluster.memory - cluster.reserved) / (1 + cluster.fragmentation)


def planned(config: Config, cluster: Cluster, gpus: int) -> Plan:
    """Return the layout and the options of a config as a plan, whether it fits the memory or not.

    Raises:
        ConfigError: it does not fit so many ranks, or the model, or is worked out while it runs.
    """
    require(
        config.overlap.remat != "budget" and config.overlap.split != "auto",
        "overlap.remat = 'budget' and split = 'auto' follow from times measured in a run; "
        "use remat = 'none', 'paper' or 'full' and split = 'none' or a number",
    )
    return _plan(config, cluster, gpus)


def _plan(config: Config, cluster: Cluster, gpus: int) -> Plan:
    layout = Pricer(cluster).layout(config, gpus)
    mesh, p = layout.mesh, config.parallel
    held = {place: layout.bytes(place) for place in {0, mesh.pp - 1}}
    fullest = max(held, key=lambda place: held[place].peak)
    asks = registry.named(registry.FFN, p.ffn, "parallel.ffn").asked(replace(p, ep=mesh.ep, etp=mesh.etp)) > 0
    parallel = replace(p, dp=mesh.dp, node=mesh.node, ep=mesh.ep if asks else 0)  # nothing left to work out
    return Plan(replace(config, parallel=parallel), gpus, layout.price, held[fullest], fullest)


@collector_paused()
def search(
    space: Space, cluster: Cluster, *, top: int = TOP, workers: int | None = None, progress: Progress = lambda *_: None
) -> SearchResult:
    """Return the fastest plans that fit.

    Raises:
        ConfigError: what is kept cannot be searched, or nothing fits: with the smallest cluster on which it would.
    """
    space.check()
    if space.config.overlap.remat == "budget":
        free = replace(space.config.overlap, remat="none", activation_bytes=0)  # the budget is the GPU's memory
        space = replace(space, config=replace(space.config, overlap=free))
    by_stage: dict[Any, list[CandidateLayout]] = defaultdict(list)
    for layout in space.layouts():
        by_stage[layout.inside[:-2]].append(layout)  # whatever the dispatch and the micro-batch
    groups = sorted(by_stage.values(), key=len, reverse=True)
    total = sum(map(len, groups))
    require(
        total > 0,
        f"no layout of {space.config.model.layers} layers and {space.config.train.global_batch} sequences has "
        f"{space.gpus} GPUs; change --gpus, train.global_batch or what is kept",
    )
    count = min(workers or os.cpu_count() or 1, len(groups))
    context = multiprocessing.get_context("fork")
    shared = context.Array("d", [math.inf] * (count * top)), context.Array("q", count)
    with ProcessPoolExecutor(count, context, initializer=_join, initargs=shared) as pool:
        shares = ([layout for group in groups[worker::count] for layout in group] for worker in range(count))
        jobs = {pool.submit(_best, space, cluster, share, worker, top) for worker, share in enumerate(shares)}
        waiting = jobs
        while waiting:
            _, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            progress("layouts", sum(shared[1][:]), total)
        results = [job.result() for job in jobs]
        best = sorted((each for plans, _ in results for each in plans), key=lambda each: each[0])
        left, shown = [config for _, config in best], max(top, SHOWN)
        found: list[Plan] = []
        while left and len(found) < shown:  # which of them fit with the end of their step, too
            some, left = left[: shown - len(found)], left[shown - len(found) :]
            plans = pool.map(_plan, some, repeat(cluster), repeat(space.gpus))
            found += [plan for plan in plans if plan.bytes.peak <= capacity(cluster)]
    if not found:
        raise ConfigError(_nothing_fits(space, cluster))
    return SearchResult(tuple(found), total, sum(priced for _, priced in results))


# --- one worker ------------------------------------------------------------------------------------------------------

_TIMES: Any = None
_DONE: Any = None
"""What workers share: the step times of the best placements of each, and how many layouts each is done with.

They are inherited, since they have locks, which cannot be sent with a job.
"""


def _join(times: Any, done: Any) -> None:
    global _TIMES, _DONE
    torch.set_num_threads(1)
    _TIMES, _DONE = times, done


def _best(
    space: Space, cluster: Cluster, layouts: Sequence[CandidateLayout], number: int, top: int
) -> tuple[list[tuple[float, Config]], int]:
    """Return the step times and configs of the best of a worker's layouts, and how many layouts were priced."""
    worker, best, priced = _Worker(space, cluster), dict[Any, PricedLayout](), 0  # best: of each placement

    def reached() -> float:
        """Return a step time that `top` placements reach; those of workers are different ones."""
        times: list[float] = sorted(_TIMES[:])
        return times[top - 1]

    ranked = sorted(zip(map(worker.bounds.of, layouts), layouts, strict=True), key=lambda each: each[0][0])
    for done, ((bound, remat), layout) in enumerate(ranked):
        if bound >= reached():
            break
        _DONE[number] = done
        here = best.get(layout.placement)
        limit = min(reached(), here.price.seconds if here else math.inf)
        if bound >= limit:
            continue
        priced += 1
        found = worker.least(layout, remat, limit)
        if found is not None:
            best[layout.placement] = found
            seconds = sorted(each.price.seconds for each in best.values())[:top]
            _TIMES[number * top : number * top + len(seconds)] = seconds
    _DONE[number] = len(layouts)
    fastest = sorted(best.values(), key=lambda each: each.price.seconds)[: max(top, SHOWN)]
    return [(each.price.seconds, each.config) for each in map(worker.refined, fastest)], priced


class _Worker:
    """Prices layouts of one space."""

    def __init__(self, space: Space, cluster: Cluster) -> None:
        self.space, self.pricer, self.capacity = space, Pricer(cluster), capacity(cluster)
        self.remats = list(space.options("overlap.remat"))
        self.bounds = LowerBounds(space.config, space.gpus, cluster, self.capacity, self.remats)

    def least(self, layout: CandidateLayout, remat: str, bound: float = math.inf) -> PricedLayout | None:
        """Return a layout with the least recomputation that fits, all other options as they are first tried.

        Args:
            remat: less than this does not fit. bound: seconds that are of interest.
        """
        config = layout.of(self.space.config)
        for key in OPTIONS:
            config = changed(config, key, self.space.options(key)[0])
        if layout.mesh.dp > 1:
            config = changed(config, "wire.gradients", self.space.options("wire.gradients")[-1])
        for more in self.remats[self.remats.index(remat) :]:
            found = self._faster(changed(config, "overlap.remat", more), bound)
            if found is None or self._fits(found):  # what is too slow is slower with more recomputation
                return found
        return None

    def refined(self, best: PricedLayout) -> PricedLayout:
        """Return a layout with every option that makes it faster.

        Two micro-batches at once are also tried with more recomputation, where they do not fit otherwise.
        """
        more = self.remats[self.remats.index(best.config.overlap.remat) :][1:2]
        for key in OPTIONS:
            for other in self.space.options(key):
                if key == "overlap.remat" or other == value(best.config, key):  # the least that fits is there already
                    continue
                tried, before = changed(best.config, key, other), best
                best = self._better(best, tried)
                if best is before and key == "overlap.micro_batches" and more:
                    best = self._better(best, changed(tried, "overlap.remat", more[0]))
        return best

    def _better(self, best: PricedLayout, config: Config) -> PricedLayout:
        """Return the layout of a config if it is faster than the best and fits, else the best."""
        try:
            config.overlap.check()
            found = self._faster(config, best.price.seconds)
        except ConfigError:  # options that exclude each other
            return best
        return found if found is not None and self._fits(found) else best

    def _faster(self, config: Config, bound: float) -> PricedLayout | None:
        """Return the layout of a config if it takes less than so many seconds, as soon as that is known."""
        layout = self.pricer.layout(config, self.space.gpus)
        return None if any(seconds >= bound for seconds in layout.closer()) else layout

    def _fits(self, layout: PricedLayout) -> bool:
        """Return whether the first rank does: it has most micro-batches under way. Plans are checked whole later."""
        return layout.bytes(0, update=False).peak <= self.capacity


# --- what does not fit -----------------------------------------------------------------------------------------------


def _nothing_fits(space: Space, cluster: Cluster) -> str:
    """Return why nothing fits, and where something does."""
    where = f"{cluster.memory / 1e9:.0f} GB of each of {space.gpus} GPUs ({cluster.name})"
    name = space.config.model.preset or f"the model of {space.config.model.layers} layers"
    smallest = _smallest(space, cluster)
    fits = f"the smallest cluster on which one does has {smallest} GPUs" if smallest else "nor does one with more GPUs"
    kept = f" with {', '.join(sorted(space.kept))} kept" if space.kept else ""
    return f"--gpus {space.gpus}: no layout of {name}{kept} fits the {where}; {fits}"


def _smallest(space: Space, cluster: Cluster) -> int | None:
    """Return GPUs, in whole nodes with few prime factors, from what weights need if nothing is held twice.

    Steps of about one and a half until something fits, then what lies between: not by halves, for more GPUs do not
    always help, a batch must divide.
    """
    node, least = cluster.node, max(space.gpus, least_bytes(space.config) / capacity(cluster))
    multiples: list[int] = sorted(node * 2**a * 3**b * 5**c for a in range(15) for b in range(3) for c in range(2))
    sizes = [size for size in multiples if least < size <= LARGEST * max(least, node)]

    def fits(gpus: int) -> bool:
        return _any_fits(replace(space, gpus=gpus), cluster)

    last, skipped = 0, list[int]()
    for size in sizes:
        if size < 1.5 * last and size < sizes[-1]:
            skipped.append(size)
        elif fits(size):
            return next(filter(fits, skipped), size)
        else:
            last, skipped = size, []
    return None


def _any_fits(space: Space, cluster: Cluster) -> bool:
    """Return whether one of the layouts fits that should need least."""
    worker, layouts = _Worker(space, cluster), list(space.layouts())
    fewest = min((layout.rows for layout in layouts), default=0)
    small = sorted((each for each in layouts if each.rows == fewest), key=worker.bounds.weights)[:TRIED]
    most = worker.remats[-1]
    least = sorted(small, key=lambda layout: worker.bounds.bytes(layout, most))[: TRIED // 5]
    return any(worker.least(layout, most) is not None for layout in least)
