"""Predictions against training steps that were measured: the profile and the times of benchmarks/planner."""

from __future__ import annotations

import json

import pytest

from benchmarks.planner.layouts import HERE, summary, variants
from megascale_moe.planner.cluster import load
from megascale_moe.planner.step import price

FOUND = json.loads((HERE / "results-2x1.json").read_text(encoding="utf-8"))


def test_layouts_take_what_is_predicted() -> None:
    """The bounds are those that a planner must keep to be of use: which layout is best is said by a few percent."""
    profile = load(str(HERE / "profile-2x1.toml"))
    took = {row["variant"]: row["median"] for row in FOUND["rows"]}
    rows = []
    for variant in variants(FOUND["ranks"], FOUND["links"]["node"]):
        said = price(variant.config, profile, FOUND["ranks"]).seconds
        rows.append({"variant": variant.name, "predicted": said, "median": took[variant.name],
                     "error": said / took[variant.name] - 1})  # fmt: skip
    found = summary(rows)
    assert found["layouts"] >= 16
    assert found["mean_error"] <= 0.08
    assert found["worst_error"] <= 0.20
    assert found["rank_correlation"] >= 0.95
    assert found["pick_over_best"] <= 0.03


def test_the_profile_is_that_of_the_results() -> None:
    assert (HERE / "profile-2x1.toml").read_text(encoding="utf-8") == FOUND["profile"]


def test_a_summary_by_hand() -> None:
    """Spearman's correlation of 1 2 3 4 and 2 1 3 4: 1 - 6 * 2 / 60."""
    rows = [{"variant": str(median), "predicted": predicted, "median": median, "error": predicted / median - 1}
            for predicted, median in ((2.0, 1.0), (1.0, 2.0), (3.0, 3.0), (4.0, 4.0))]  # fmt: skip
    found = summary(rows)
    assert found["rank_correlation"] == pytest.approx(0.8)
    assert (found["mean_error"], found["worst_error"]) == (pytest.approx(0.375), 1.0)
    assert (found["pick"], found["pick_over_best"]) == ("2.0", 1.0)
    assert found["slowest_over_best"] == 4
