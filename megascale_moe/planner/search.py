"""The fastest layouts of a model on a cluster that fit its memory.

There are tens of thousands, and all are looked at: each has a lower bound, what its computation or one of its links
alone would take (`bounds`), and layouts are priced in the order of their lower bounds until one is above what has been
found. So nothing is left out on a guess. A layout is priced with the least recomputation that fits. The best are then
refined: one option after the other is changed and kept where that is faster. Layouts with the same inside of a stage
share its lists (`stages.Stages`), so they go to the same worker.
"""

from __future__ import annotations

import heapq
import itertools
import math
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch

from megascale_moe.config import Config, ConfigError, require
from megascale_moe.pipeline.program import collector_paused
from megascale_moe.planner.bounds import Floors, least_bytes
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.memory import RankBytes
from megascale_moe.planner.space import OPTIONS, CandidateLayout, Placement, Space, changed, placement_of, value
from megascale_moe.planner.step import PricedLayout, Pricer, StepPrice
from megascale_moe.strategies import registry

TOP = 3
"""Placements that are searched for: no other is faster, up to what options make of it. They are refined."""
SHOWN = 6
"""Placements that are returned; behind the first ones the best that were met on the way."""
TRIED = 20
"""Layouts that are looked at to say whether a model fits so many GPUs: those that should need least."""
LARGEST = 32
"""The largest cluster that is tried for a model that does not fit, over what its weights alone would fill."""

Progress = Callable[[str, int, int], None]
Map = Callable[[Callable[[Any, Any], Any], Iterable[Any], Iterable[Any]], Iterable[Any]]
"""As the built-in, with two arguments."""


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
    """Bytes that a rank may hold at its peak: what is not reserved, less what fragmentation makes unusable."""
    return (cluster.memory - cluster.reserved) / (1 + cluster.fragmentation)


def planned(config: Config, cluster: Cluster, gpus: int) -> Plan:
    """The layout and the options of a config, whether they fit or not.

    Raises:
        ConfigError: it does not fit so many ranks, or the model, or is worked out while it runs.
    """
    require(
        config.overlap.remat != "budget" and config.overlap.split != "auto",
        "overlap.remat = 'budget' and split = 'auto' follow from times measured in a run; "
        "use remat = 'none', 'paper' or 'full' and split = 'none' or a number",
    )
    return _plan(Pricer(cluster).layout(config, gpus))


@collector_paused()
def search(
    space: Space, cluster: Cluster, *, top: int = TOP, workers: int | None = None, progress: Progress = lambda *_: None
) -> SearchResult:
    """The fastest that fit.

    Raises:
        ConfigError: what is kept cannot be searched, or nothing fits: with the smallest cluster on which it would.
    """
    space.check()
    if space.config.overlap.remat == "budget":
        free = replace(space.config.overlap, remat="none", activation_bytes=0)  # the budget is the GPU's memory
        space = replace(space, config=replace(space.config, overlap=free))
    groups = _grouped(space.layouts())
    total = sum(map(len, groups))
    require(
        total > 0,
        f"no layout of {space.config.model.layers} layers and {space.config.train.global_batch} sequences has "
        f"{space.gpus} GPUs; change --gpus, train.global_batch or what is kept",
    )
    count = min(workers or os.cpu_count() or 1, len(groups))
    shares = [[layout for group in groups[first::count] for layout in group] for first in range(count)]
    found, priced = _parallel(space, cluster, shares, top, lambda done: progress("layouts", done, total))
    if not found:
        raise ConfigError(_nothing_fits(space, cluster))
    return SearchResult(found, total, priced)


def _grouped(layouts: Iterable[CandidateLayout]) -> list[list[CandidateLayout]]:
    """By what lies where in a stage, which decides about its lists up to dispatch and micro-batch; largest first."""
    groups: dict[Any, list[CandidateLayout]] = defaultdict(list)
    for layout in layouts:
        p, mesh = layout.parallel, layout.mesh
        groups[mesh.node, mesh.ep, mesh.etp, p.attention, p.ffn].append(layout)
    return sorted(groups.values(), key=len, reverse=True)


# --- one worker ------------------------------------------------------------------------------------------------------


class _Shared:
    """State that workers share: the step times of their best placements, and how many layouts are done with."""

    def __init__(self, workers: int, top: int) -> None:
        context = multiprocessing.get_context("fork")
        self.top = top
        self.times = context.Array("d", [math.inf] * (workers * top))
        self.done = context.Value("q", 0)

    @property
    def bound(self) -> float:
        """A step time that `top` placements reach; those of workers are different ones."""
        times: list[float] = sorted(self.times[:])
        return times[self.top - 1]

    def found(self, worker: int, seconds: Iterable[float]) -> None:
        """The step times of a worker's placements."""
        best = [*sorted(seconds), *[math.inf] * self.top][: self.top]
        self.times[worker * self.top : (worker + 1) * self.top] = best

    def did(self, layouts: int) -> None:
        """So many more are done with."""
        with self.done.get_lock():
            self.done.value += layouts


def _parallel(
    space: Space, cluster: Cluster, shares: Sequence[Sequence[CandidateLayout]], top: int,
    progress: Callable[[int], None],
) -> tuple[tuple[Plan, ...], int]:  # fmt: skip
    """The best that fit, and how many layouts were priced."""
    shared, shown = _Shared(len(shares), top), max(top, SHOWN)
    if len(shares) == 1:
        plans, priced = _best(space, cluster, shares[0], 0, shared)
        return _fitting(plans, cluster, shown, map), priced
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(shares), context, initializer=_join, initargs=(shared,)) as pool:
        jobs = [pool.submit(_best, space, cluster, share, worker) for worker, share in enumerate(shares)]
        waiting = set(jobs)
        while waiting:
            _, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            progress(shared.done.value)
        results = [job.result() for job in jobs]
        plans = [plan for plans, _ in results for plan in plans]
        return _fitting(plans, cluster, shown, pool.map), sum(priced for _, priced in results)


_JOINED: list[_Shared] = []
"""The shared state of a worker process: locks are inherited, they cannot be sent with a job."""


def _join(shared: _Shared) -> None:
    torch.set_num_threads(1)
    _JOINED.append(shared)


def _best(
    space: Space, cluster: Cluster, layouts: Sequence[CandidateLayout], number: int, shared: _Shared | None = None
) -> tuple[list[Plan], int]:  # fmt: skip
    """The best of each placement among the layouts of a worker, and how many were priced."""
    shared = shared or _JOINED[0]
    worker, best, priced = _Worker(space, cluster), dict[Placement, Plan](), 0
    # Floors that look at memory take longer to find: only of layouts whose quick floor is the lowest left.
    heap = [(floor, place, "") for place, floor in enumerate(map(worker.floors.quick, layouts)) if floor < math.inf]
    heapq.heapify(heap)
    shared.did(len(layouts) - len(heap))
    while heap and heap[0][0] < shared.bound:
        floor, place, remat = heapq.heappop(heap)
        layout = layouts[place]
        placement = placement_of(layout.parallel)
        known = best.get(placement)
        limit = min(shared.bound, known.price.seconds if known else math.inf)
        if floor < limit and not remat:
            floor, remat = worker.floors.of(layout)
            if floor < math.inf:
                heapq.heappush(heap, (floor, place, remat))
                continue
        elif floor < limit:
            plan = worker.least(layout, remat, limit)
            priced += 1
            if plan is not None:
                best[placement] = plan
                shared.found(number, (each.price.seconds for each in best.values()))
        shared.did(1)
    shared.did(len(heap))
    plans = sorted(best.values(), key=lambda plan: plan.price.seconds)
    within = sum(plan.price.seconds <= shared.bound for plan in plans[: shared.top])
    return [worker.refined(plan) for plan in plans[:within]] + plans[within:SHOWN], priced


class _Worker:
    """Prices layouts of one space."""

    def __init__(self, space: Space, cluster: Cluster) -> None:
        self.space, self.pricer = space, Pricer(cluster)
        self.capacity = capacity(cluster)
        remats = space.options("overlap.remat")
        self.floors = Floors(space.config, space.gpus, self.pricer, self.capacity, remats)

    def least(self, layout: CandidateLayout, remat: str, bound: float = math.inf) -> Plan | None:
        """With the least recomputation that fits, all other options as they are first tried.

        Args:
            remat: less than this does not fit. bound: seconds that are of interest.
        """
        config = layout.of(self.space.config)
        for key in OPTIONS:
            config = changed(config, key, self.space.options(key)[0])
        if layout.mesh.dp > 1:
            config = changed(config, "wire.gradients", self.space.options("wire.gradients")[-1])
        remats = self.space.options("overlap.remat")
        for more in remats[remats.index(remat) :]:
            found = self.pricer.layout(changed(config, "overlap.remat", more), self.space.gpus)
            if any(seconds >= bound for seconds in found.closer()):  # more takes longer
                return None
            if self._fits(found):
                return _plan(found, update=False)
        return None

    def _fits(self, layout: PricedLayout) -> bool:
        """Whether the first rank does: it has most micro-batches under way. What is shown is looked at whole."""
        return layout.bytes(0, update=False).peak <= self.capacity

    def refined(self, plan: Plan) -> Plan:
        """With every option that makes it faster; two micro-batches at once with more recomputation where that fits."""
        remats = self.space.options("overlap.remat")
        more = remats[remats.index(value(plan.config, "overlap.remat")) :][1:2]
        for key in OPTIONS:
            for other in self.space.options(key):
                if key == "overlap.remat" or other == value(plan.config, key):  # the least that fits is there already
                    continue
                tried = changed(plan.config, key, other)
                found = self._better(plan, tried)
                if found is plan and key == "overlap.micro_batches" and more:
                    found = self._better(plan, changed(tried, "overlap.remat", more[0]))
                plan = found
        return plan

    def _better(self, plan: Plan, config: Config) -> Plan:
        try:
            config.overlap.check()
            found = self.pricer.layout(config, self.space.gpus)
        except ConfigError:  # options that exclude each other
            return plan
        if any(seconds >= plan.price.seconds for seconds in found.closer()) or not self._fits(found):
            return plan
        return _plan(found, update=False)


def _plan(layout: PricedLayout, *, update: bool = True) -> Plan:
    places = {place: layout.bytes(place, update=update) for place in {0, layout.mesh.pp - 1 if update else 0}}
    fullest = max(places, key=lambda place: places[place].peak)
    p, mesh = layout.config.parallel, layout.mesh
    asks = registry.named(registry.FFN, p.ffn, "parallel.ffn").asked(replace(p, ep=mesh.ep, etp=mesh.etp)) > 0
    parallel = replace(p, dp=mesh.dp, node=mesh.node, ep=mesh.ep if asks else 0)  # nothing left to work out
    config = replace(layout.config, parallel=parallel)
    return Plan(config, mesh.world, layout.price, places[fullest], fullest)


def _fitting(plans: Iterable[Plan], cluster: Cluster, wanted: int, each: Map) -> tuple[Plan, ...]:
    """The fastest of those that fit with the end of their step, too; several are looked at at once by `each`."""
    left, found = sorted(plans, key=lambda plan: plan.price.seconds), list[Plan]()
    while left and len(found) < wanted:
        count = wanted - len(found)
        whole = each(_whole, left[:count], itertools.repeat(cluster))
        found += [plan for plan in whole if plan.bytes.peak <= capacity(cluster)]
        del left[:count]
    return tuple(found)


def _whole(plan: Plan, cluster: Cluster) -> Plan:
    """With the end of its step in its bytes."""
    return _plan(Pricer(cluster).layout(plan.config, plan.gpus))


# --- what does not fit -----------------------------------------------------------------------------------------------


def _nothing_fits(space: Space, cluster: Cluster) -> str:
    """Why, and where something does."""
    where = f"{cluster.memory / 1e9:.0f} GB of each of {space.gpus} GPUs ({cluster.name})"
    name = space.config.model.preset or f"the model of {space.config.model.layers} layers"
    smallest = _smallest(space, cluster)
    fits = f"the smallest cluster on which one does has {smallest} GPUs" if smallest else "nor does one with more GPUs"
    kept = f" with {', '.join(sorted(space.kept))} kept" if space.kept else ""
    return f"--gpus {space.gpus}: no layout of {name}{kept} fits the {where}; {fits}"


def _smallest(space: Space, cluster: Cluster) -> int | None:
    """GPUs, in whole nodes with few prime factors, from what weights, gradients and optimizer need if nothing is twice.

    Steps of about one and a half until something fits, then what lies between: not by halves, for more GPUs do not
    always help, a batch must divide.
    """
    least = max(space.gpus, least_bytes(space.config) / capacity(cluster))
    sizes = [size for size in _sizes(cluster.node) if least < size <= LARGEST * max(least, cluster.node)]
    last = -1
    for place, size in enumerate(sizes):
        if last >= 0 and size < 1.5 * sizes[last] and place + 1 < len(sizes):
            continue
        if _any_fits(replace(space, gpus=size), cluster):
            between = sizes[last + 1 : place]
            return next((each for each in between if _any_fits(replace(space, gpus=each), cluster)), size)
        last = place
    return None


def _sizes(node: int) -> list[int]:
    """Multiples of a node by 2, 3 and 5."""
    return sorted(node * 2**a * 3**b * 5**c for a in range(15) for b in range(3) for c in range(2))


def _any_fits(space: Space, cluster: Cluster) -> bool:
    """Whether one of the layouts does that should need least."""
    worker = _Worker(space, cluster)
    layouts = list(space.layouts())
    fewest = min((layout.rows for layout in layouts), default=0)
    small = sorted((each for each in layouts if each.rows == fewest), key=worker.floors.weights)[:TRIED]
    most = worker.floors.remats[-1]
    least = sorted(small, key=lambda layout: worker.floors.bytes(layout, most))[: TRIED // 5]
    return any(worker.least(layout, most) is not None for layout in least)
