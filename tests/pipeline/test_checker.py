"""The checker catches every kind of broken schedule and points at it; times of small cases by hand."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter

import pytest

from megascale_moe.pipeline.checker import ScheduleError, check, peak_in_flight, timeline
from megascale_moe.pipeline.schedule import Action, Schedule, schedule


def action(text: str) -> Action:
    """The action that is written so, such as "2BW0"."""
    stage, phase, micro = re.split("([A-Z]+)", text)
    return Action(int(stage), phase, int(micro))


def lists(*rows: str) -> Schedule:
    """One string of actions per rank."""
    return [list(map(action, row.split())) for row in rows]


def refusal(actions: Schedule, virtual: int, micros: int, limit: int | None = None) -> list[str]:
    """Lines of the refusal: reason, one per rank, legend."""
    with pytest.raises(ScheduleError) as caught:
        check(actions, len(actions), virtual, micros, limit)
    return str(caught.value).splitlines()


LEGEND = "executed, !wrong!, (not executed)"


def test_a_forward_too_many_deadlocks() -> None:
    broken = lists("0F0 0F1 0BW0 0F2 0BW1 0BW2", "1F0 1BW0 1F1 1F2 1BW1 1BW2")
    check(broken, 2, 1, 3)  # one more in flight, nothing wrong with it
    broken[1][1:4] = [action(text) for text in ("1F1", "1F2", "1BW0")]
    assert refusal(broken, 1, 3) == [
        "rank 1 at 1F2 waits for 0F2, which rank 0 only runs after 0BW0; "
        "that waits for 1BW0, which rank 1 only runs after 1F2",
        "rank 0   0F0    0F1   (0BW0) (0F2)  (0BW1) (0BW2)",
        "rank 1   1F0    1F1   !1F2!  (1BW0) (1BW1) (1BW2)",
        LEGEND,
    ]


def test_a_later_stage_before_its_predecessor_deadlocks() -> None:
    broken = lists("2F0 0F0 2BW0 0BW0", "1F0 3F0 3BW0 1BW0")
    assert refusal(broken, 2, 1) == [
        "rank 0 at 2F0 waits for 1F0; that waits for 0F0, which rank 0 only runs after 2F0",
        "rank 0  !2F0!  (0F0)  (2BW0) (0BW0)",
        "rank 1  (1F0)  (3F0)  (3BW0) (1BW0)",
        LEGEND,
    ]


def test_a_backward_before_that_of_the_next_stage_deadlocks() -> None:
    # Both stages are on one rank: it waits for itself.
    assert refusal(lists("0F0 1F0 0BW0 1BW0"), 2, 1) == [
        "rank 0 at 0BW0 waits for 1BW0, which rank 0 only runs after 0BW0",
        "rank 0   0F0    1F0   !0BW0! (1BW0)",
        LEGEND,
    ]


def test_weight_gradient_before_input_gradient() -> None:
    assert refusal(lists("0F0 0B0 0W0", "1F0 1W0 1B0"), 1, 1) == [
        "rank 1 runs 1W0 before 1B0, whose gradients it reads",
        "rank 0   0F0  (0B0) (0W0)",
        "rank 1   1F0  !1W0! (1B0)",
        LEGEND,
    ]


def test_backward_before_forward_is_named_though_it_also_waits_forever() -> None:
    assert refusal(lists("0BW0 0F0", "1F0 1BW0"), 1, 1) == [
        "rank 0 runs 0BW0 before 0F0, whose activations it reads",
        "rank 0  !0BW0! (0F0)",
        "rank 1  (1F0)  (1BW0)",
        LEGEND,
    ]


def test_an_action_twice() -> None:
    assert refusal(lists("0F0 0B0 0B0 0W0"), 1, 1) == [
        "rank 0 runs 0B0 a second time",
        "rank 0  (0F0) (0B0) !0B0! (0W0)",
        LEGEND,
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0F0 0BW0 0B0", "rank 0 runs 0B0 after 0BW0, which freed the activations of this micro-batch"),
        ("0F0 0BW0 0W0", "rank 0 runs 0W0 after 0BW0, which freed the activations of this micro-batch"),
        ("0F0 0B0 0BW0", "rank 0 runs 0BW0 after 0B0, which computed the input gradient already"),
        ("0F0 0B0 0W0 0BW0", "rank 0 runs 0BW0 after 0W0, which freed the activations of this micro-batch"),
    ],
)
def test_whole_and_half_backward_of_one_micro_batch(row: str, reason: str) -> None:
    assert refusal(lists(row), 1, 1)[0] == reason


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ("0F0 0BW0 0F1", "0BW1"),
        ("0F0 0BW0 0BW1", "0F1"),
        ("0F0 0B0 0W0 0F1 0B1", "0W1"),
        ("0F0 0B0 0W0 0F1 0W1", "0B1"),
        ("0F0 0BW0 0F1 0B1", "0W1"),
        ("0F0 0BW0", "0F1"),
    ],
)
def test_a_missing_action(row: str, missing: str) -> None:
    reason, picture, legend = refusal(lists(row), 1, 2)
    assert reason == f"rank 0 never runs {missing}"
    assert picture.endswith(f"!{missing}!")
    assert legend == LEGEND


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("1F0", "rank 0 runs 1F0, but stage 1 lives on rank 1"),
        ("2F0", "rank 0 runs 2F0, which is no action of stages 0 to 1 and micro-batches 0 to 1"),
        ("0F2", "rank 0 runs 0F2, which is no action of stages 0 to 1 and micro-batches 0 to 1"),
    ],
)
def test_an_action_in_the_wrong_place(wrong: str, reason: str) -> None:
    broken = schedule("1f1b", 2, 2)
    broken[0].insert(1, action(wrong))
    found = refusal(broken, 1, 2)
    assert found[0] == reason
    assert found[1] == f"rank 0  (0F0)  !{wrong}!  (0F1)  (0BW0) (0BW1)"


def test_an_unknown_phase() -> None:
    assert refusal([[Action(0, "R", 0)]], 1, 1)[0].startswith("rank 0 runs 0R0, which is no action of")


def test_wrong_number_of_ranks() -> None:
    with pytest.raises(ScheduleError, match=r"^2 lists of actions for parallel\.pp = 3: one per rank is needed$"):
        check(schedule("1f1b", 2, 2), 3, 1, 2)


def test_more_activations_than_the_limit() -> None:
    broken = lists("0F0 0F1 0F2 0BW0 0BW1 0BW2", "1F0 1BW0 1F1 1BW1 1F2 1BW2")
    check(broken, 2, 1, 3, limit=3)
    assert refusal(broken, 1, 3, limit=2) == [
        "rank 0 runs 0F2 with the activations of 2 micro-batches alive: the limit is 2",
        "rank 0   0F0    0F1   !0F2!  (0BW0) (0BW1) (0BW2)",
        "rank 1   1F0   (1BW0) (1F1)  (1BW1) (1F2)  (1BW2)",
        LEGEND,
    ]
    assert peak_in_flight(broken) == [3, 1]


def test_names_of_ranks_are_padded() -> None:
    broken = schedule("1f1b", 11, 1)
    broken[0].append(action("0F0"))
    rows = refusal(broken, 1, 1)
    assert rows[1] == "rank 0   (0F0)   (0BW0)  !0F0!"
    assert rows[11] == "rank 10  (10F0)  (10BW0)"


# ---------------------------------------------------------------------------------------------- an independent judge


def dependencies(actions: Schedule) -> dict[Action, set[Action]]:
    """The graph of all that comes before what: list order, messages, F before B before W of one micro-batch."""
    everything = {action for row in actions for action in row}
    graph: dict[Action, set[Action]] = {action: set() for action in everything}
    for row in actions:
        for before, after in itertools.pairwise(row):
            graph[after].add(before)
    for action in everything:
        stage, micro = action.stage, action.micro
        before_it = {
            "F": [(stage - 1, "F")],
            "B": [(stage, "F"), (stage + 1, "B"), (stage + 1, "BW")],
            "BW": [(stage, "F"), (stage + 1, "B"), (stage + 1, "BW")],
            "W": [(stage, "B")],
        }[action.phase]
        graph[action] |= {Action(s, phase, micro) for s, phase in before_it} & everything
    return graph


def critical_path(actions: Schedule, cost: Callable[[Action], float]) -> float:
    """Length of the longest chain; CycleError if there is none."""
    graph = dependencies(actions)
    ends: dict[Action, float] = {}
    for action in TopologicalSorter(graph).static_order():
        ends[action] = cost(action) + max((ends[before] for before in graph[action]), default=0.0)
    return max(ends.values())


CASES = (("1f1b", 3, 4, 1), ("interleaved", 2, 4, 2), ("zero_bubble", 3, 4, 1), ("interleaved", 1, 2, 3))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_checker_agrees_with_a_search_for_cycles(case: tuple[str, int, int, int]) -> None:
    generator = random.Random(0)
    verdicts = []
    for _ in range(150):
        actions = schedule(*case)
        for _ in range(generator.randint(1, 3)):
            row = generator.choice(actions)
            i = generator.randrange(len(row))
            row.insert(min(len(row), max(0, i + generator.randint(-3, 3))), row.pop(i))
        costs = {action: generator.random() for row in actions for action in row}
        try:
            length = critical_path(actions, costs.__getitem__)
        except CycleError:
            with pytest.raises(ScheduleError):
                check(actions, case[1], case[3], case[2])
            verdicts.append(False)
        else:
            check(actions, case[1], case[3], case[2])
            # Both take maxima and sums of the same doubles in the same order: no rounding differs.
            assert timeline(actions, case[1], costs.__getitem__).makespan == length
            verdicts.append(True)
    assert 10 < sum(verdicts) < 140  # both verdicts occur often


# ---------------------------------------------------------------------------------------------- times


def test_timeline_by_hand() -> None:
    times = timeline(schedule("1f1b", 2, 1), 2, lambda action: 1.0 if action.phase == "F" else 2.0, transfer=0.5)
    assert [[(str(a), start, end) for a, start, end in row] for row in times.spans] == [
        [("0F0", 0.0, 1.0), ("0BW0", 5.0, 7.0)],
        [("1F0", 1.5, 2.5), ("1BW0", 2.5, 4.5)],
    ]
    assert times.makespan == 7.0
    assert times.busy == [3.0, 3.0]
    assert times.bubble == pytest.approx(1 - 6 / 14, rel=1e-15)


def test_messages_inside_a_rank_take_no_time() -> None:
    assert timeline(schedule("interleaved", 1, 2, 2), 1, lambda _: 1.0, transfer=100.0).makespan == 8.0


def test_a_timeline_of_a_deadlock_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"^rank 0 at 0BW0 waits for 1B0, which rank 1 never runs\n"):
        timeline(lists("0F0 0BW0", "1F0"), 2, lambda _: 1.0)


def test_nothing_to_do() -> None:
    times = timeline([[], []], 2, lambda _: 1.0)
    assert (times.makespan, times.bubble) == (0.0, 0.0)
