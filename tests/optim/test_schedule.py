"""Learning rates at hand-computed steps."""

from __future__ import annotations

import math

import pytest

from megascale_moe.config import TrainConfig
from megascale_moe.optim.schedule import learning_rate

BASE = {"steps": 100, "warmup": 20, "learning_rate": 1.0, "min_learning_rate": 0.1}


def config(schedule: str, **changes: float) -> TrainConfig:
    return TrainConfig(lr_schedule=schedule, **(BASE | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_full_rate(schedule: str) -> None:
    rates = [learning_rate(config(schedule), step) for step in (1, 5, 10, 20, 21)]
    assert rates == pytest.approx([0.05, 0.25, 0.5, 1.0, 1.0], rel=1e-15)  # the same divisions


def test_without_warm_up_the_first_update_has_the_full_rate() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        assert learning_rate(config(schedule, warmup=0), 1) == 1.0


def test_constant() -> None:
    assert {learning_rate(config("constant"), step) for step in (21, 60, 100, 1000)} == {1.0}


def test_cosine_passes_the_middle_and_ends_one_step_before_the_least() -> None:
    """Update 61 has 40 of the 80 updates after warm-up behind it; the last, 79: it still counts."""
    c = config("cosine")
    assert learning_rate(c, 61) == pytest.approx(0.55, rel=1e-12)  # cos(pi / 2) is 6e-17
    assert learning_rate(c, 41) == pytest.approx(0.1 + 0.9 * (0.5 + math.sqrt(0.125)), rel=1e-12)
    assert learning_rate(c, 100) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 79 / 80)), rel=1e-12)
    assert learning_rate(c, 101) == learning_rate(c, 500) == 0.1


def test_warm_up_stable_decay() -> None:
    c = config("wsd", decay=10)
    assert {learning_rate(c, step) for step in range(20, 92)} == {1.0}
    assert learning_rate(c, 96) == pytest.approx(0.55, rel=1e-12)  # half of the decay is over
    assert learning_rate(c, 100) == pytest.approx(0.19, rel=1e-12)
    assert learning_rate(c, 101) == 0.1
    assert learning_rate(config("wsd"), 91) == pytest.approx(0.55, rel=1e-12)  # decay 0: the last fifth, here 20


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("steps", "warmup", "decay"), [(1, 0, 0), (1, 20, 0), (3, 3, 5), (50, 7, 80)])
def test_every_step_of_odd_runs_has_a_rate_that_learns(schedule: str, steps: int, warmup: int, decay: int) -> None:
    c = config(schedule, steps=steps, warmup=warmup, decay=decay, min_learning_rate=0.0)
    rates = [learning_rate(c, step) for step in range(1, steps + 1)]
    assert all(0 < rate <= 1 for rate in rates)
