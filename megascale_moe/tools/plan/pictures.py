"""A plan as pictures: its step as a Chrome trace, and memory against speed of all plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megascale_moe.engine.order import makespan
from megascale_moe.engine.trace import Event, Trace, write_chrome
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.search import Plan, capacity
from megascale_moe.planner.stages import StageKind
from megascale_moe.planner.step import PricedLayout

LAYERS = 2
"""Layers of a stage that are drawn operator by operator."""


def write_trace(layout: PricedLayout, path: Path) -> None:
    """For chrome://tracing or Perfetto: a process per pipeline rank with its actions, and a forward and a backward of
    some layers of the middle with their operators."""
    rows = [row for place, spans in enumerate(layout.timeline.spans) for row in _actions(place, spans)]
    write_chrome(path, [*rows, *_operators(layout)])


def _process(number: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}}


def _actions(place: int, spans: Sequence[Any]) -> list[dict[str, object]]:
    return [_process(place, f"pipeline rank {place}"), *(
        {"ph": "X", "pid": place, "tid": 0, "name": str(action), "ts": start * 1e6, "dur": (end - start) * 1e6}
        for action, start, end in spans
    )]  # fmt: skip


def _operators(layout: PricedLayout) -> list[dict[str, object]]:
    place, pid = layout.mesh.pp // 2, layout.mesh.pp
    kind = StageKind.of(layout.plan.parts[place], layout.config.model).at_most(LAYERS)
    at, events = 0.0, list[Event]()
    for phase in layout.phases:
        spans = layout.stages.spans(kind, phase)
        events += [
            Event(op.name, op.phase, op.stream, at + s.start, at + s.end, round(op.cost.wire_bytes),
                  at + s.end - s.exposed if s.exposed else None)
            for op, s in spans
        ]
        at += makespan([span for _, span in spans])
    return [
        _process(pid, f"{kind.depth} layers of pipeline rank {place}"), *Trace(events).chrome(pid)
    ]  # fmt: skip


def write_pareto(plans: Sequence[Plan], cluster: Cluster, path: Path) -> bool:
    """Memory of the fullest rank against tokens per second; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    points = [(plan.bytes.peak / 1e9, plan.price.tokens_per_second / 1e3) for plan in plans]
    best = _front(points)
    axes.scatter(*zip(*points, strict=True), s=28, color="#8a8f98", label="plans")
    axes.plot(*zip(*best, strict=True), color="#1f6feb", marker="o", label="none is both smaller and faster")
    for number, (x, y) in enumerate(points, 1):
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.axvline(capacity(cluster) / 1e9, color="#d1242f", linestyle="--", linewidth=1, label="what a rank can hold")
    axes.set(xlabel="GB of the fullest rank", ylabel="thousand tokens per second",
             title=f"{plans[0].gpus:,} GPUs, {cluster.name}")  # fmt: skip
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return True


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those to which none is both smaller and faster, by memory."""
    found: list[tuple[float, float]] = []
    for memory, speed in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or speed > found[-1][1]:
            found.append((memory, speed))
    return found
