"""Orders, rematerialization and splitting leave every gradient as it was: passes x strategies against plain modules."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale_moe.comm.axis import axes_of, connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, OverlapConfig, ParallelConfig, WireConfig
from megascale_moe.engine.cost import Rates
from megascale_moe.engine.executor import resolve
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Op, Phase, Stream, check
from megascale_moe.engine.order import best_order, dependencies, makespan, paper_order, scheduled_order, simulate
from megascale_moe.engine.trace import Trace
from megascale_moe.model.transformer import build
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.pipeline.step import of_micro
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.model import local_inputs
from megascale_moe.strategies.weights import placements
from megascale_moe.testing import run_ranks
from tests.strategies.layouts import SCALE, Result, compare, random_rows, wanted_of
from tests.strategies.test_layouts import SMALL, TOLERANCE, VARIANTS

MICROS = 2


def run_plan(
    config: ModelConfig, parallel: ParallelConfig, overlap: OverlapConfig, mesh: Mesh, wire: WireConfig = WireConfig()  # noqa: B008
) -> Result:
    """One rank's step of two micro-batches per data-parallel rank; gradients summed over replicas."""
    axes = connect(mesh) if mesh.world > 1 else single()
    batch = random_rows(config, rows=2 * MICROS * mesh.dp)
    plan = StepPlan(config, parallel, axes, torch.float32, 2, MICROS, overlap=overlap, wire=wire)
    model = build(config)
    placed = placements(config, plan.layout, plan.part)
    named = dict(model.named_parameters())
    weights = {name: place.take(named[name].detach()) for name, place in placed.items()}
    sinks = {name: Gradient(torch.empty_like(value)) for name, value in weights.items()}
    weights |= dict(model.named_buffers())
    values: dict[str, Any] = {"loss_scale": SCALE, "auxiliary_scale": torch.tensor(SCALE)}
    rank = dist.get_rank() if mesh.world > 1 else 0
    first = rank % mesh.stage // mesh.node * 2 * MICROS
    for micro in range(MICROS):
        tokens, targets, segments = batch.part(slice(first + 2 * micro, first + 2 * micro + 2))
        inputs = local_inputs(tokens, targets, plan.layout, segments, config)
        values |= {of_micro(name, micro): value for name, value in inputs.items()}
    trace = Trace()
    out = plan.program().run(values, weights, sinks, trace)
    result = Result(0.0, 0.0, {}, placements=placed, wire=trace.wire_bytes())
    for micro in range(MICROS):
        for name in plan.results:
            value = resolve(out, of_micro(name, micro))
            if name == "loss":
                result.loss += float(value)
            elif name.endswith("auxiliary"):
                result.auxiliary += float(value)
    for name, sink in sinks.items():
        result.gradients[name] = sink.value()
        for axis in placed[name].replicas:
            if axis and axes[axis].size > 1:
                dist.all_reduce(result.gradients[name], group=axes[axis].group)
    return result


PARALLEL = {
    "sp+ep all-to-all": ParallelConfig(dp=1, node=4, dispatch="all_to_all"),
    "sp+ep all-gather": ParallelConfig(dp=1, node=4, dispatch="all_gather"),
    "ep over two nodes": ParallelConfig(dp=2, node=2, ep=4, dispatch="all_to_all"),
    "tp+ep": ParallelConfig(dp=2, node=2, attention="tp", dispatch="all_to_all"),
    "sp+tp": ParallelConfig(dp=1, node=4, ffn="tp"),
    "tp+tp": ParallelConfig(dp=2, node=2, attention="tp", ffn="tp", vocabulary="sharded"),
    "ep x etp": ParallelConfig(dp=1, node=4, ffn="ep+tp", ep=2, etp=2, dispatch="all_to_all"),
    "pipeline": ParallelConfig(pp=2, dp=1, node=2, dispatch="all_gather"),
}
SHARED = replace(SMALL, shared_experts=1)
OVERLAPS = {
    f"{order} {remat} {split} {micros}": OverlapConfig(
        order=order, remat=remat, split=split, activation_bytes=30_000 if remat == "budget" else 0, micro_batches=micros
    )  # type: ignore[arg-type]
    for order, remat, split, micros in (
        ("paper", "none", "none", 1), ("scheduled", "none", "none", 1), ("serial", "paper", "none", 1),
        ("serial", "full", "none", 1), ("serial", "none", "4", 1), ("paper", "paper", "4", 1),
        ("scheduled", "paper", "4", 1), ("scheduled", "full", "2", 1), ("scheduled", "budget", "none", 1),
        ("paper", "full", "3", 1), ("scheduled", "none", "none", 2), ("scheduled", "paper", "4", 2),
    )
}  # fmt: skip


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("parallel", PARALLEL)
def test_passes_leave_gradients_as_they_were(parallel: str, overlap: str) -> None:
    layout, config = PARALLEL[parallel], SHARED
    mesh = mesh_of(layout, config, 4)
    results = run_ranks(4, run_plan, config, layout, OVERLAPS[overlap], mesh)
    wanted = wanted_of(config, 2 * MICROS * mesh.dp)
    loss, gradient, name = compare(results, wanted)
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name


# --- orders ----------------------------------------------------------------------------------------------------------


def plan_of(overlap: OverlapConfig = OverlapConfig(), config: ModelConfig = SHARED, **layout: Any) -> StepPlan:  # noqa: B008
    """Of rank 1 of a node of four, without ranks."""
    parallel = ParallelConfig(dp=1, node=4, **layout)
    axes = axes_of(mesh_of(parallel, config, 4), 1)
    return StepPlan(config, parallel, axes, torch.float32, 2, overlap=overlap)


def lists_of(plan: StepPlan) -> list[list[Op]]:
    (stage,) = plan.stages.values()
    return [list(stage.forward), list(stage.backward)]


def op(name: str, reads: str, writes: str, stream: Stream = Stream.COMPUTE, **more: Any) -> Op:
    return Op(name=name, reads=tuple(reads.split()), writes=tuple(writes.split()), run=print, stream=stream, **more)


def seconds(op: Op) -> float:
    return float(op.cost.flops)


def took(op: Op, time: float) -> Op:
    return replace(op, cost=replace(op.cost, flops=time))


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("split", ["1", "2", "4"])
def test_orders_are_permutations_that_keep_dependencies(dispatch: str, split: str) -> None:
    for ops in lists_of(plan_of(OverlapConfig(split=split), dispatch=dispatch)):
        known = {name for op in ops for name in op.reads} - {name for op in ops for name in op.writes}
        for order in (paper_order(ops), scheduled_order(ops, Rates().seconds)):
            assert Counter(map(id, order)) == Counter(map(id, ops))
            check(order, known)
            for weight in {name for op in ops for name in op.gradients}:  # sums keep their order, so their bits
                assert [id(op) for op in order if weight in op.gradients] == [
                    id(op) for op in ops if weight in op.gradients
                ]


def test_simulation_follows_the_executor() -> None:
    """A communication runs from where it stands; its reader waits for the rest."""
    ops = [
        took(op("send", "x", "y", Stream.INTRA), 5), took(op("other", "x", "z"), 2), took(op("reader", "y z", "w"), 1),
    ]  # fmt: skip
    spans = simulate(ops, seconds)
    assert [(span.start, span.end, span.exposed) for span in spans] == [(0, 5, 3), (0, 2, 0), (5, 6, 0)]
    assert makespan(spans) == 6


def test_a_link_does_one_thing_at_a_time() -> None:
    ops = [took(op("a", "x", "y", Stream.INTRA), 5), took(op("b", "x", "z", Stream.INTRA), 5),
           took(op("c", "x", "w", Stream.INTER), 5)]  # fmt: skip
    assert [span.start for span in simulate(ops, seconds)] == [0, 5, 0]


def test_paper_order_puts_weight_gradients_behind_the_next_communication() -> None:
    names = [
        op.name.removeprefix("layers.1.") + (" W" if op.phase == Phase.W else "")
        for op in paper_order(lists_of(plan_of(dispatch="all_gather"))[1])
        if op.name.startswith("layers.1.")
    ]
    assert names[names.index("dispatch_all_gather") + 1] == "fc13 W"  # whose input gradient had to come first
    assert names.index("gather_routing") < names.index("fc2 W") < names.index("fc13")
    assert names[names.index("scatter_heads") + 1] == "out W"


def instructions(work: Callable[[list[Op]], object], ops: list[Op]) -> int:
    """How many bytecodes of Python `work` runs on a list."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work(ops)
    finally:
        sys.settrace(before)
    return count


def test_paper_order_of_a_chain_of_communications_is_linear() -> None:
    """One that needs the one before it was copied once for each of those: quadratic, and too deep for recursion."""

    def chain(length: int) -> list[Op]:
        return [op(str(place), f"x{place}", f"x{place + 1}", Stream.INTRA) for place in range(length)]

    assert instructions(paper_order, chain(200)) < 2.1 * instructions(paper_order, chain(100))
    long = chain(5000)
    assert paper_order(long) == long


def test_paper_order_of_twice_the_layers_is_twice_the_work() -> None:
    few, many = (lists_of(plan_of(config=replace(SHARED, layers=layers))) for layers in (8, 16))
    for ops, more in zip(few, many, strict=True):
        assert instructions(paper_order, more) < 2.1 * instructions(paper_order, ops)


def test_scheduler_fills_a_wait_with_what_nobody_waits_for() -> None:
    """The weight gradient has the shortest way to the end, and still runs while the message travels."""
    ops = [
        took(op("b", "d", "e"), 1), took(op("w", "d", "", phase=Phase.W), 4),
        took(op("send", "e", "f", Stream.INTRA), 4), took(op("next", "f", "g"), 1),
    ]  # fmt: skip
    order = scheduled_order(ops, seconds)
    assert [op.name for op in order] == ["b", "send", "w", "next"]
    assert makespan(simulate(order, seconds)) == 6 < makespan(simulate(ops, seconds)) == 10


def test_of_equal_orders_the_schedulers_is_taken() -> None:
    """Not the one whose sum rounds to a little less."""
    ops = [took(op("short", "", "a"), 0.1), took(op("middle", "", "b"), 0.3), took(op("long", "", "c"), 1.0)]
    order = best_order(ops, seconds)
    assert [each.name for each in order] == ["long", "middle", "short"]
    assert makespan(simulate(order, seconds)) > makespan(simulate(ops, seconds))


def test_weight_gradients_are_done_before_the_next_layer_computes() -> None:
    """They have the shortest way to the end: all of them came last, and with them what they read and their sums."""
    ops = lists_of(plan_of(dispatch="all_gather", config=replace(SHARED, layers=4)))[1]
    order = scheduled_order(ops, Rates().seconds)
    layers = [int(op.name.split(".")[1]) for op in order if op.phase == Phase.W and op.name.startswith("layers.")]
    assert layers == sorted(layers, reverse=True)
    for layer in (2, 1, 0):
        inputs = [op for op in order if op.phase == Phase.B and op.stream == Stream.COMPUTE]
        computes = next(place for place, op in enumerate(order) if op in inputs and f"layers.{layer}." in op.name)
        assert all(op.phase != Phase.W or f"layers.{layer + 1}." not in op.name for op in order[computes:])


@pytest.mark.parametrize("name", ["gqa", "capacity", "mla", "top-1-gated"])
def test_scheduled_order_is_never_slower_by_its_own_measure(name: str) -> None:
    rates = Rates(links={Stream.INTRA: 1e8, Stream.INTER: 1e8})
    for overlap in (OverlapConfig(), OverlapConfig(split="4", remat="paper")):
        plan = plan_of(overlap, VARIANTS[name])
        chosen = lists_of(replace(plan, overlap=replace(overlap, order="scheduled"), profile=Profile(rates)))
        for ops, order in zip(lists_of(plan), chosen, strict=True):
            best = makespan(simulate(order, rates.seconds))
            assert best <= makespan(simulate(paper_order(ops), rates.seconds))
            assert best <= makespan(simulate(ops, rates.seconds))


def test_gradients_of_one_weight_depend_on_each_other() -> None:
    ops = [op("a", "x", "", gradients=("w",)), op("b", "x", "", gradients=("v",)), op("c", "x", "", gradients=("w",))]
    assert dependencies(ops) == [set(), set(), {0}]
