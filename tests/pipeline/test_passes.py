"""Orders, rematerialization and splitting leave every gradient as it was: passes x strategies against plain modules.

Covered by pairs (tests/pairs.py): every two values of model, layout (mesh, experts with their dispatch, attention,
vocabulary), schedule of a pipeline, pieces, order, rematerialization and micro-batches at once meet in some case, if
they fit each other: here, or both being of the model and the layout, in tests/strategies/test_layouts.py. All are
compared in float32; test_wire.py has a table for narrow formats, whose bounds are wide.

Beyond the orders that the package makes, any that keeps the dependencies must do: some are drawn by chance.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import FrameType
from typing import Any

import pytest
import torch

from megascale_moe.comm.axis import axes_of
from megascale_moe.config import ModelConfig, OverlapConfig, ParallelConfig
from megascale_moe.engine.cost import Rates
from megascale_moe.engine.op import Op, Phase, Stream, check
from megascale_moe.engine.order import best_order, dependencies, makespan, paper_order, scheduled_order, simulate
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.testing import run_ranks
from tests.pairs import Case, name_of, pairs
from tests.pipeline.plans import FACTORS, MICROS, ROWS, RULES, overlap_of, run_drawn, run_plan
from tests.strategies.layouts import compare, fitted, parallel_of, wanted_of
from tests.strategies.test_layouts import CASES as ALONE
from tests.strategies.test_layouts import SMALL, TOLERANCE, VARIANTS

SHARED = replace(SMALL, shared_experts=1)
CASES = pairs(FACTORS, *RULES, beside=ALONE)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_passes_leave_gradients_as_they_were(case: Case) -> None:
    parallel = parallel_of(case)
    config = fitted(VARIANTS[case["variant"]], parallel)
    mesh = mesh_of(parallel, config, 4)
    results = run_ranks(4, run_plan, config, parallel, overlap_of(case), mesh)
    loss, gradient, name = compare(results, wanted_of(config, ROWS * MICROS * mesh.dp))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name


def test_splitting_cuts_all_that_a_case_says() -> None:
    """As many pieces in the list as in the name of the case, of attention and of the experts."""
    met = set()
    for case in CASES:
        parallel = parallel_of(case)
        config = fitted(VARIANTS[case["variant"]], parallel)
        axes = axes_of(mesh_of(parallel, config, 4), 3)  # the last rank has the last layer
        plan = StepPlan(config, parallel, axes, torch.float32, ROWS, MICROS, overlap=OverlapConfig(split=case["split"]))
        last = [op.name.split(".")[2] for op in plan.ops if op.name.startswith(f"layers.{config.layers - 1}.")]
        sent, products = ({name for name in last if name.startswith(f"{word}@")} for word in ("gather_heads", "fc13"))
        if sent:  # all but the own piece
            assert len(sent) + 1 == min(int(case["split"]), axes["node"].size), name_of(case)
            met.add((case["attention"], case["split"]))
        if products:
            axis = "ep" if case["experts"] == "ep+tp-all_to_all" else "ffn"
            assert len(products) == min(int(case["split"]), axes[axis].size), name_of(case)
            met.add((case["experts"], case["split"]))
    of_two = {("ep+tp-all_to_all", "3"), ("ep+tp-all_to_all", "4")}  # two ranks for each half of the experts
    assert met == set(product(["sp", *FACTORS["experts"]], FACTORS["split"][1:])) - of_two


# Layouts with every kind of communication, on lists that passes have made long.
DRAWN: dict[str, tuple[ParallelConfig, OverlapConfig]] = {
    "sp + ep by all-to-all, cut": (
        ParallelConfig(dp=1, node=4, dispatch="all_to_all"), OverlapConfig(remat="paper", split="2"),
    ),
    "sp + ep by all-gather, over nodes": (
        ParallelConfig(dp=2, node=2, ep=4, dispatch="all_gather"), OverlapConfig(remat="full", split="2"),
    ),
    "tp + tp, vocabulary": (
        ParallelConfig(dp=1, node=4, attention="tp", ffn="tp", vocabulary="sharded"), OverlapConfig(remat="full"),
    ),
    "ep x etp": (
        ParallelConfig(dp=1, node=4, ffn="ep+tp", ep=2, etp=2, dispatch="all_to_all"), OverlapConfig(split="2"),
    ),
    "pipeline, two micro-batches at once": (
        ParallelConfig(pp=2, dp=1, node=2, attention="tp", dispatch="all_to_all"),
        OverlapConfig(order="scheduled", micro_batches=2),
    ),
    "pipeline, weight gradients apart": (
        ParallelConfig(pp=2, dp=2, node=1, ep=2, schedule="zero_bubble"), OverlapConfig(remat="paper"),
    ),
}  # fmt: skip
DRAWS = 2


@pytest.mark.parametrize("name", DRAWN)
def test_any_order_has_the_bits_of_the_plain_one(name: str) -> None:
    """What may change places is said by names and by gradients, to one of which all additions keep their order."""
    parallel, overlap = DRAWN[name]
    config = fitted(SHARED, parallel)
    mesh = mesh_of(parallel, config, 4)
    results = run_ranks(4, run_drawn, config, parallel, overlap, mesh, DRAWS)
    for rank, ((names, plain), *others) in enumerate(results):
        first = rank // mesh.stage * mesh.stage  # of its stage
        for draw, (order, found) in enumerate(others, start=1):
            assert order != names
            assert Counter(order) == Counter(names)
            assert order == results[first][draw][0], f"rank {rank} drew another order than rank {first}"
            assert (found.loss, found.auxiliary) == (plain.loss, plain.auxiliary), f"draw {draw} on rank {rank}"
            different = [name for name, value in found.gradients.items() if not value.equal(plain.gradients[name])]
            assert different == [], f"draw {draw} on rank {rank}"


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
    return replace(op, cost=op.cost._replace(flops=time))


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
