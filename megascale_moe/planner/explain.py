"""Why a plan is as fast as it is: where the seconds of its step go, what limits it, what other hardware would buy.

The limit is found by asking, not by looking: each resource of the cluster is made twice as good and the same layout is
priced again. What saves most is the limit, whatever a breakdown looks like; a link that is busy all the time but hidden
limits nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, Stream
from megascale_moe.engine.order import Span
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.space import changed
from megascale_moe.planner.stages import StageKind, along
from megascale_moe.planner.step import PricedLayout, Pricer

SHARES = ("product", "grouped", "attention", "rows", "intra", "inter")
"""What a rank does in the seconds of a list: kinds of work, and waiting by link."""
WORDS = {
    "product": "products", "grouped": "products of experts", "attention": "attention",
    "rows": "operators bound by memory", "intra": "waiting for links inside a node",
    "inter": "waiting for links between nodes", "bubble": "pipeline bubble",
    "synchronisation": "gradients and update", "waits": "host and slowest rank",
}  # fmt: skip
"""What a step consists of, for people."""


class Resource(NamedTuple):
    """Something that may limit a step.

    Attributes:
        name: as the limit. shares: of the step, which show it. better: a cluster that has twice as much of it.
    """

    name: str
    shares: tuple[str, ...]
    better: Callable[[Cluster], Cluster]


def _faster(stream: Stream, c: Cluster) -> Cluster:
    return replace(c, links={**c.links, stream: replace(c.links[stream], rate=2 * c.links[stream].rate)})


def _at_once(c: Cluster) -> Cluster:
    links = {stream: replace(link, latency=0.0, peer=0.0) for stream, link in c.links.items()}
    return replace(c, links=links, overhead=0.0, host=0.0)


LARGER_BATCH = "a batch twice as large, per sequence"
RESOURCES = {
    "twice the FLOP/s": Resource(
        "computation", ("grouped", "product", "attention"),
        lambda c: replace(c, peaks={name: 2 * peak for name, peak in c.peaks.items()}),
    ),
    "twice the memory bandwidth": Resource(
        "memory bandwidth", ("rows",), lambda c: replace(c, bandwidth=2 * c.bandwidth)
    ),
    "links inside a node twice as fast": Resource(
        "the links inside a node", ("intra",), partial(_faster, Stream.INTRA)
    ),
    "links between nodes twice as fast": Resource(
        "the links between nodes", ("inter", "synchronisation"), partial(_faster, Stream.INTER)
    ),
    "no latency and no overhead": Resource("latency and overhead", (), _at_once),
    "balanced experts and equal ranks": Resource(
        "imbalance and jitter", ("waits",), lambda c: replace(c, imbalance=1.0, jitter=0.0)
    ),
    LARGER_BATCH: Resource("the pipeline's bubble", ("bubble",), lambda c: c),
}  # fmt: skip
"""By what would be better."""


@dataclass(frozen=True)
class Gain:
    """How much shorter a step would be on a better cluster."""

    what: str
    seconds: float
    saved: float  # fraction of the step


@dataclass(frozen=True)
class Explanation:
    """Why a plan takes as long as it does.

    Attributes:
        seconds: of a rank of the middle of the pipeline, by what they go to (keys of `WORDS`); they add up to the step.
        limit: what to make better first, in words. criterion: computation over communication of an expert (the
            paper's R). gains: sorted, largest first.
    """

    seconds: Mapping[str, float]
    limit: str
    criterion: float
    gains: tuple[Gain, ...]


def explain(layout: PricedLayout) -> Explanation:
    """Return why a plan is as fast as it is."""
    seconds, most_in = shares(layout)
    gains = sensitivity(layout)
    resource = RESOURCES[gains[0].what]
    seen = sorted((name for name in resource.shares if seconds[name] > 0), key=lambda name: -seconds[name])
    total = sum(seconds.values())
    of_step = ", ".join(f"{seconds[name] / total:.0%} {WORDS[name]}" for name in seen)
    of_step = f": {of_step} of the step{most_in.get(seen[0], '')}" if seen else ""
    limit = f"{resource.name}{of_step}; {gains[0].what} would save {gains[0].saved:.0%}"
    return Explanation(seconds, limit, criterion(layout), gains)


def most(layout: PricedLayout) -> str:
    """Return what takes most of a plan's step, in words; quicker to find than its limit, which needs more prices."""
    seconds, most_in = shares(layout)
    name = max(seconds, key=seconds.__getitem__)
    return f"{seconds[name] / sum(seconds.values()):.0%} {WORDS[name]} of the step{most_in.get(name, '')}"


def criterion(layout: PricedLayout) -> float:
    """Return R = 3 h_ffn B / (s F): computation over communication of a SwiGLU expert.

    It is the paper's (section 7: 1.5 h_ffn B / F in BF16). B: bytes/s of the link that experts use, F: FLOP/s, s: bytes
    of an element. Above 1, an expert computes longer than its tokens travel, whatever top_k, hidden size and numbers of
    experts and ranks are.
    """
    outside = layout.prices.axes["ffn"].outside > 0
    rate = layout.cluster.links[Stream.INTER if outside else Stream.INTRA].rate
    return 3 * layout.config.model.ffn_hidden * rate / (layout.plan.dtype.itemsize * layout.prices.peak)


def shares(layout: PricedLayout) -> tuple[dict[str, float], dict[str, str]]:
    """Return where the seconds of a step go on a rank of the middle, and words for the largest operators of a share."""
    place, price, stages = layout.mesh.pp // 2, layout.price, layout.stages
    seconds = dict.fromkeys(SHARES, 0.0)
    ops: dict[str, Counter[str]] = {name: Counter() for name in SHARES}

    def measure(phase: str, few: StageKind) -> list[float]:
        took = dict.fromkeys(SHARES, 0.0)
        for share, _, time in map(_spent, stages.spans(few, phase)):
            took[share] += time
        return list(took.values())

    for kind in layout.kinds_of(place):
        for phase in layout.phases:
            for share, time in zip(SHARES, along(kind, partial(measure, phase)), strict=True):
                seconds[share] += layout.plan.micros * time
            for share, name, time in map(_spent, stages.spans(kind.at_most(1), phase)):
                ops[share][name] += time  # type: ignore[assignment]  # counts of seconds
    waited = seconds["intra"] + seconds["inter"]
    left = max(1 - layout.woven(place) / waited, 0.0) if waited else 0.0  # what two micro-batches at once leave of it
    seconds |= {name: left * seconds[name] for name in ("intra", "inter")}
    idle = price.pipeline - sum(seconds.values())
    rest = {"bubble": idle, "synchronisation": price.synchronisation, "waits": price.waits}
    largest = {share: ", ".join(name for name, _ in times.most_common(3)) for share, times in ops.items() if times}
    return seconds | rest, {share: f", most in {names}" for share, names in largest.items()}


def _spent(each: tuple[Op, Span]) -> tuple[str, str, float]:
    """Return what an operator's seconds count as, its name, and the seconds that the rank computes or waits for it."""
    op, span = each
    computes = op.stream == Stream.COMPUTE
    share, seconds = (op.cost.work, span.end - span.start) if computes else (op.stream, span.exposed)
    return str(share), parse(op.name).tensor, seconds


def sensitivity(layout: PricedLayout) -> tuple[Gain, ...]:
    """Return how much faster the same layout is on better clusters, and with a larger batch; most first."""

    def seconds(what: str, resource: Resource) -> float:
        pricer = Pricer(resource.better(layout.cluster))
        if what != LARGER_BATCH:
            return pricer.layout(layout.config, layout.mesh.world).price.seconds
        twice = changed(layout.config, "train.global_batch", 2 * layout.config.train.global_batch)
        return pricer.layout(twice, layout.mesh.world).price.seconds / 2

    now = layout.price.seconds
    found = ((what, seconds(what, resource)) for what, resource in RESOURCES.items())
    return tuple(sorted((Gain(what, took, 1 - took / now) for what, took in found), key=lambda gain: gain.seconds))
