"""Schedules: legal, as fast as their formulas, as small as they promise, micro-batches in order, refusals in words."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from megascale_moe.config import ConfigError
from megascale_moe.pipeline.checker import Transfer, awaited, bubble, check, peak_in_flight, sent, timeline
from megascale_moe.pipeline.schedule import Action, forward_only, in_pairs, schedule

RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 15)
Case = tuple[str, int, int, int]  # name, pp, micros, virtual stages


def cases() -> list[Case]:
    """Fewer, as many and more micro-batches than ranks; two or three stages per rank where they interleave."""
    found: list[Case] = []
    for pp in RANKS:
        found += [(name, pp, m, 1) for name in ("1f1b", "zero_bubble") for m in sorted({1, 2, pp - 1, pp, pp + 1, 33})
                  if m]  # fmt: skip
        found += [("interleaved", pp, times * pp, virtual) for times in (1, 3) for virtual in (2, 3)]
    return [*found, ("interleaved", 1, 5, 1), ("interleaved", 4, 8, 4)]


def costs(f: float, b: float, w: float) -> Callable[[Action], float]:
    """Duration of an action by its phase."""
    table = {"F": f, "B": b, "W": w, "BW": b + w}
    return lambda action: table[action.phase]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_schedules_are_legal_and_keep_their_memory(case: Case) -> None:
    name, pp, micros, virtual = case
    # In (stage, micro-batch): what each schedule promises at most, on its fullest rank.
    limit = {"1f1b": pp, "zero_bubble": pp, "interleaved": virtual * pp + pp - 1}[name]
    check(schedule(*case), pp, virtual, micros, limit=limit)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_micro_batches_rise_in_every_stage_and_phase(case: Case) -> None:
    # Gradients are then summed in the order they have without a pipeline.
    for actions in schedule(*case):
        for stage, phase in itertools.product({a.stage for a in actions}, ("F", "B", "W", "BW")):
            micros = [a.micro for a in actions if (a.stage, a.phase) == (stage, phase)]
            assert micros == sorted(micros)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_simulated_bubble_is_the_formula(case: Case) -> None:
    name, pp, micros, virtual = case
    lists = schedule(*case)
    for f, b, w in ((1, 1, 1), (3, 4, 2), (5, 2, 2)):  # w <= f, b: what the formula of zero_bubble asks for
        simulated = timeline(lists, pp, costs(f / virtual, b / virtual, w / virtual))
        # Sums of a few hundred doubles: 1e-16 each.
        assert simulated.bubble == pytest.approx(bubble(name, pp, micros, virtual, f, b, w), abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("pp", [2, 3, 4, 8, 15])
def test_zero_bubble_has_the_makespan_of_the_paper(pp: int) -> None:
    # 3 m + p - 1 with unit times, against 3 m + 3 (p - 1) of 1F1B.
    for micros in (pp, pp + 1, 2 * pp, 2 * pp + 1, 4 * pp + 3):
        assert timeline(schedule("zero_bubble", pp, micros), pp, lambda _: 1.0).makespan == 3 * micros + pp - 1


def test_the_zero_bubble_formula_is_a_bound_for_any_costs() -> None:
    generator = random.Random(0)
    for _ in range(200):
        pp, micros = generator.randint(1, 6), generator.randint(1, 14)
        f, b, w = (generator.randint(1, 6) for _ in range(3))
        simulated = timeline(schedule("zero_bubble", pp, micros), pp, costs(f, b, w))
        assert simulated.bubble >= bubble("zero_bubble", pp, micros, 1, f, b, w) - 1e-12


@pytest.mark.parametrize("pp", RANKS)
@pytest.mark.parametrize("micros", [1, 3, 8, 20])
def test_activations_alive(pp: int, micros: int) -> None:
    assert peak_in_flight(schedule("1f1b", pp, micros)) == [min(micros, pp - rank) for rank in range(pp)]
    assert peak_in_flight(schedule("zero_bubble", pp, micros)) == [min(micros, pp)] * pp


def test_one_rank() -> None:
    assert [str(a) for a in schedule("1f1b", 1, 2)[0]] == ["0F0", "0BW0", "0F1", "0BW1"]
    assert [str(a) for a in schedule("zero_bubble", 1, 2)[0]] == ["0F0", "0B0", "0W0", "0F1", "0B1", "0W1"]
    assert schedule("interleaved", 1, 2) == schedule("1f1b", 1, 2)


def test_interleaved_order_by_hand() -> None:
    # Narayanan et al. 2021, figure 4, with two ranks of two stages.
    lists = schedule("interleaved", 2, 4, 2)
    expected = [
        "0F0 0F1 2F0 2F1 0F2 2BW0 0F3 2BW1 2F2 0BW0 2F3 0BW1 2BW2 2BW3 0BW2 0BW3",
        "1F0 1F1 3F0 3BW0 3F1 3BW1 1F2 1BW0 1F3 1BW1 3F2 3BW2 3F3 3BW3 1BW2 1BW3",
    ]
    assert [" ".join(map(str, actions)) for actions in lists] == expected


def test_forward_only() -> None:
    assert [[str(a) for a in actions] for actions in forward_only(2, 2)] == [["0F0", "2F0"], ["1F0", "3F0"]]
    assert timeline(forward_only(3, 2), 3, lambda _: 1.0).makespan == 6


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("gpipe", 2, 4, 1), "parallel.schedule = 'gpipe': must be one of 1f1b, interleaved, zero_bubble"),
        (("1f1b", 0, 4, 1), "parallel.pp = 0: must be at least 1"),
        (("1f1b", 2, 0, 1), "number of micro-batches = 0: must be at least 1"),
        (("interleaved", 2, 4, 0), "parallel.virtual_stages = 0: must be at least 1"),
        (
            ("zero_bubble", 2, 4, 3),
            "parallel.virtual_stages = 3: parallel.schedule = 'zero_bubble' has one stage per rank; "
            "use 1, or parallel.schedule = 'interleaved'",
        ),
        (
            ("interleaved", 2, 4, 1),
            "parallel.virtual_stages = 1: parallel.schedule = 'interleaved' needs at least 2 stages per rank; "
            "use 2, or parallel.schedule = '1f1b'",
        ),
        (
            ("interleaved", 4, 6, 2),
            "number of micro-batches = 6: parallel.schedule = 'interleaved' needs a multiple of parallel.pp = 4; "
            "use 4 or 8 (train.global_batch and train.micro_batch set it)",
        ),
        (
            ("interleaved", 4, 3, 2),
            "number of micro-batches = 3: parallel.schedule = 'interleaved' needs a multiple of parallel.pp = 4; "
            "use 4 (train.global_batch and train.micro_batch set it)",
        ),
    ],
)
def test_refusals(case: Case, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        schedule(*case)
    assert str(caught.value) == message


# --- two micro-batches at once ---------------------------------------------------------------------------------------

PAIRED = [case for case in cases() if case[0] != "zero_bubble"]


@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_pairs_are_legal_and_keep_their_memory(case: Case) -> None:
    name, pp, micros, virtual = case
    lists = schedule(*case, pairs=True)
    limit = {"1f1b": 2 * pp, "interleaved": virtual * pp + pp}[name]
    check(lists, pp, virtual, micros, limit=limit)
    for rank, actions in enumerate(lists):
        groups = in_pairs(actions)
        assert [action for group in groups for action in group] == actions
        for forward, backward in (group for group in groups if len(group) > 1):
            assert (forward.phase, backward.phase) == ("F", "BW")
            assert forward.micro != backward.micro
        if name == "1f1b":
            assert sum(len(group) > 1 for group in groups) == max(micros - 2 * (pp - rank) + 1, 0)


@pytest.mark.parametrize("pp", RANKS)
def test_pairs_follow_each_other_without_a_gap(pp: int) -> None:
    """Were a pair one action that receives before and sends behind, no rank would wait once all are busy."""
    micros, f, b = 4 * pp, 1.0, 2.0
    lists = [in_pairs(actions) for actions in schedule("1f1b", pp, micros, pairs=True)]
    ends: dict[Transfer | None, float] = {None: 0.0}
    clock, place = [0.0] * pp, [0] * pp
    for _ in range(sum(map(len, lists))):
        ready = [
            rank
            for rank, groups in enumerate(lists)
            if place[rank] < len(groups) and all(awaited(action, pp - 1) in ends for action in groups[place[rank]])
        ]
        rank = ready[0]
        group = lists[rank][place[rank]]
        clock[rank] = max(clock[rank], *(ends[awaited(action, pp - 1)] for action in group))
        clock[rank] += sum(f if action.phase == "F" else b for action in group)
        ends |= {sent(action, pp - 1): clock[rank] for action in group} | {None: 0.0}
        place[rank] += 1
    warm_up = (2 * pp - 1) * f + (pp - 1) * (f + b)  # forwards of rank 0, then the first gradient on its way to it
    assert max(clock) <= micros * (f + b) + warm_up
