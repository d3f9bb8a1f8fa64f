"""Why a plan is as fast as it is: where the seconds of its step go, what limits it, what other hardware would buy.

The limit is found by asking, not by looking: each resource of the cluster is made twice as good and the same layout is
priced again. What saves most is the limit, whatever a breakdown looks like; a link that is busy all the time but hidden
limits nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
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

WORDS = {
    "product": "products", "grouped": "products of experts", "attention": "attention",
    "rows": "operators bound by memory", "intra": "waiting for links inside a node",
    "inter": "waiting for links between nodes", "bubble": "pipeline bubble",
    "synchronisation": "gradients and update", "waits": "host and slowest rank",
}  # fmt: skip


class Shares(NamedTuple):
    """Seconds of a list by what the rank does in them: kinds of work, and waiting by link."""

    product: float = 0.0
    grouped: float = 0.0
    attention: float = 0.0
    rows: float = 0.0
    intra: float = 0.0
    inter: float = 0.0


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
        largest: the operators with most seconds of each share. limit: what to make better first, in words.
        criterion: computation over communication of an expert (the paper's R). gains: sorted, largest first.
    """

    seconds: Mapping[str, float]
    largest: Mapping[str, str]
    limit: str
    criterion: float
    gains: tuple[Gain, ...]


def explain(layout: PricedLayout) -> Explanation:
    """Look into a plan."""
    seconds, largest = shares(layout)
    gains = sensitivity(layout)
    return Explanation(seconds, largest, _limit(seconds, largest, gains), criterion(layout), gains)


def most(layout: PricedLayout) -> str:
    """Return what takes most of a plan's step, in words; quicker to find than its limit, which needs more prices."""
    seconds, largest = shares(layout)
    name = max(seconds, key=seconds.__getitem__)
    ops = f", most in {largest[name]}" if name in largest else ""
    return f"{seconds[name] / sum(seconds.values()):.0%} {WORDS[name]} of the step{ops}"


def criterion(layout: PricedLayout) -> float:
    """R = 3 h_ffn B / (s F): computation over communication of a SwiGLU expert (the paper's section 7: 1.5 h_ffn B / F
    in BF16). B: bytes/s of the link that experts use, F: FLOP/s, s: bytes of an element. Above 1, an expert computes
    longer than its tokens travel, whatever top_k, hidden size and numbers of experts and ranks are."""
    assert layout.cluster is not None
    assert layout.prices is not None
    outside = layout.prices.axes["ffn"].outside > 0
    rate = layout.cluster.links[Stream.INTER if outside else Stream.INTRA].rate
    return 3 * layout.config.model.ffn_hidden * rate / (layout.plan.dtype.itemsize * layout.prices.peak)


def shares(layout: PricedLayout) -> tuple[dict[str, float], dict[str, str]]:
    """Where the seconds of a step go on a rank of the middle, and the largest operators of each share."""
    place = layout.mesh.pp // 2
    kinds = [StageKind.of(part, layout.config.model) for part in layout.plan.parts[place :: layout.mesh.pp]]
    micros = layout.plan.micros
    total = [0.0] * len(Shares._fields)
    ops: dict[str, dict[str, float]] = {name: defaultdict(float) for name in Shares._fields}
    for kind in kinds:
        one = kind.at_most(1)
        for phase in layout.phases:
            found = along(kind, partial(_shares, layout, phase))
            total = [a + micros * b for a, b in zip(total, found, strict=True)]
            for op, span in layout.stages.spans(one, phase):
                ops[_share(op)][parse(op.name).tensor] += _seconds(op, span)
    price = layout.price
    seconds = dict(zip(Shares._fields, total, strict=True))
    waited = seconds["intra"] + seconds["inter"]
    left = max(1 - layout.woven(place) / waited, 0.0) if waited else 0.0  # what two micro-batches at once leave of it
    seconds |= {name: left * seconds[name] for name in ("intra", "inter")}
    idle = price.pipeline - sum(seconds.values())
    rest = {"bubble": idle, "synchronisation": price.synchronisation, "waits": price.waits}
    largest = {
        name: ", ".join(sorted(times, key=times.__getitem__, reverse=True)[:3]) for name, times in ops.items() if times
    }
    return seconds | rest, largest


def _shares(layout: PricedLayout, phase: str, kind: StageKind) -> Shares:
    found = dict.fromkeys(Shares._fields, 0.0)
    for op, span in layout.stages.spans(kind, phase):
        found[_share(op)] += _seconds(op, span)
    return Shares(**found)


def _share(op: Op) -> str:
    return str(op.cost.work) if op.stream == Stream.COMPUTE else str(op.stream)


def _seconds(op: Op, span: Span) -> float:
    return span.end - span.start if op.stream == Stream.COMPUTE else span.exposed


def sensitivity(layout: PricedLayout) -> tuple[Gain, ...]:
    """The same layout on better clusters, and with a larger batch."""
    assert layout.cluster is not None
    config, gpus, now = layout.config, layout.mesh.world, layout.price.seconds
    better = _better(layout.cluster)
    found = {what: Pricer(cluster).layout(config, gpus).price.seconds for what, cluster in better.items()}
    twice = changed(config, "train.global_batch", 2 * config.train.global_batch)
    found["a batch twice as large, per sequence"] = Pricer(layout.cluster).layout(twice, gpus).price.seconds / 2
    gains = (Gain(what, seconds, 1 - seconds / now) for what, seconds in found.items())
    return tuple(sorted(gains, key=lambda gain: gain.seconds))


def _better(cluster: Cluster) -> dict[str, Cluster]:
    links = cluster.links
    faster = {s: {**links, s: replace(link, rate=2 * link.rate)} for s, link in links.items()}
    at_once = {stream: replace(link, latency=0.0, peer=0.0) for stream, link in links.items()}
    return {
        "twice the FLOP/s": replace(cluster, peaks={name: 2 * peak for name, peak in cluster.peaks.items()}),
        "twice the memory bandwidth": replace(cluster, bandwidth=2 * cluster.bandwidth),
        "links inside a node twice as fast": replace(cluster, links=faster[Stream.INTRA]),
        "links between nodes twice as fast": replace(cluster, links=faster[Stream.INTER]),
        "no latency and no overhead": replace(cluster, links=at_once, overhead=0.0, host=0.0),
        "balanced experts and equal ranks": replace(cluster, imbalance=1.0, jitter=0.0),
    }


RESOURCES = {
    "twice the FLOP/s": ("computation", ("grouped", "product", "attention")),
    "twice the memory bandwidth": ("memory bandwidth", ("rows",)),
    "links inside a node twice as fast": ("the links inside a node", ("intra",)),
    "links between nodes twice as fast": ("the links between nodes", ("inter", "synchronisation")),
    "no latency and no overhead": ("latency and overhead", ()),
    "balanced experts and equal ranks": ("imbalance and jitter", ("waits",)),
    "a batch twice as large, per sequence": ("the pipeline's bubble", ("bubble",)),
}
"""For each gain the limit that it points to, and the shares of the step that show it."""


def _limit(seconds: Mapping[str, float], largest: Mapping[str, str], gains: tuple[Gain, ...]) -> str:
    """A sentence: what limits, what of a step that is, which operators are the largest in it."""
    gain, total = gains[0], sum(seconds.values())
    resource, names = RESOURCES[gain.what]
    seen = sorted((name for name in names if seconds.get(name, 0.0) > 0), key=lambda name: -seconds[name])
    part = ", ".join(f"{seconds[name] / total:.0%} {WORDS[name]}" for name in seen)
    ops = f", most in {largest[seen[0]]}" if seen and seen[0] in largest else ""
    of = f": {part} of the step{ops}" if part else ""
    return f"{resource}{of}; {gain.what} would save {gain.saved:.0%}"
