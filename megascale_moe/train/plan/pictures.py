"""A plan as pictures: its step as a Chrome trace, and memory against speed of all plans."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megascale_moe.engine.op import Stream
from megascale_moe.engine.order import simulate
from megascale_moe.pipeline.step import action_ops
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.search import Plan, capacity
from megascale_moe.planner.stages import Kind
from megascale_moe.planner.step import PricedLayout, Pricer

LAYERS = 2
"""Of a stage that are drawn operator by operator."""


def trace(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """For chrome://tracing or Perfetto: a process per pipeline rank with its actions, and a forward and a backward of
    some layers of the middle with their operators."""
    layout = Pricer(cluster).layout(plan.config, plan.gpus)
    rows = [row for place, spans in enumerate(layout.timeline.spans) for row in _actions(place, spans)]
    return {"traceEvents": [*rows, *_operators(layout)], "displayTimeUnit": "ms"}


def _actions(place: int, spans: Sequence[Any]) -> list[dict[str, Any]]:
    named = {"ph": "M", "name": "process_name", "pid": place, "args": {"name": f"pipeline rank {place}"}}
    return [named, *(
        {"ph": "X", "pid": place, "tid": 0, "name": str(action), "ts": start * 1e6, "dur": (end - start) * 1e6}
        for action, start, end in spans
    )]  # fmt: skip


def _operators(layout: PricedLayout) -> list[dict[str, Any]]:
    place, pid = layout.mesh.pp // 2, layout.mesh.pp
    kind = Kind.of(layout.plan.parts[place], layout.config.model)
    kind = kind._replace(experts=min(kind.experts, LAYERS), dense=min(kind.dense, LAYERS))
    lanes = {stream: lane for lane, stream in enumerate(Stream)}
    name = f"{kind.experts + kind.dense} layers of pipeline rank {place}"
    rows: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}]
    rows += [
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": lane, "args": {"name": str(stream)}}
        for stream, lane in lanes.items()
    ]
    at = 0.0
    for phase in ("F", "BW"):
        ops = action_ops(layout.stages.lists(kind), phase)
        spans = simulate(ops, layout.stages.seconds, layout.stages.contention)
        rows += [
            {"ph": "X", "pid": pid, "tid": lanes[op.stream], "name": f"{op.phase} {op.name}",
             "ts": (at + s.start) * 1e6, "dur": (s.end - s.start) * 1e6,
             "args": {"wire_bytes": op.cost.wire_bytes, "flops": op.cost.flops, "exposed_us": s.exposed * 1e6}}
            for op, s in zip(ops, spans, strict=True)
        ]  # fmt: skip
        at += max((span.end for span in spans), default=0.0)
    return rows


def write_trace(plan: Plan, cluster: Cluster, path: Path) -> None:
    """Write it."""
    path.write_text(json.dumps(trace(plan, cluster)), encoding="utf-8")


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
    axes.axvline(capacity(cluster) / 1e9, color="#d1242f", linestyle="--", linewidth=1, label="memory of a GPU")
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
