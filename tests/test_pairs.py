"""Tables of pairs against a search of all cases: nothing legal is left out, nothing illegal is in; they are short."""

from __future__ import annotations

import random
from itertools import product

import pytest

from tests.pairs import Case, Pair, name_of, pairs, pairs_of

FACTORS = {"order": ("serial", "paper", "scheduled"), "split": ("none", "2", "4"), "remat": ("none", "full"),
           "micros": ("1", "2"), "wire": ("fp32", "bf16", "fp8")}  # fmt: skip


def every(factors: dict[str, tuple[str, ...]], legal: set[tuple[str, ...]] | None = None) -> list[Case]:
    """The product, or what of it is legal."""
    return [
        dict(zip(factors, values, strict=True)) for values in product(*factors.values())
        if legal is None or values in legal
    ]  # fmt: skip


def meetings(cases: list[Case]) -> set[Pair]:
    return {pair for case in cases for pair in pairs_of(case)}


def test_all_pairs_occur_in_little_more_cases_than_the_longest_factors_need() -> None:
    cases = pairs(FACTORS)
    assert meetings(cases) == meetings(every(FACTORS))
    assert all(tuple(case) == tuple(FACTORS) for case in cases)
    assert 9 <= len(cases) <= 12 < 108 == len(every(FACTORS))


def test_a_table_is_the_same_every_time() -> None:
    assert pairs(FACTORS) == pairs(FACTORS)
    assert len({name_of(case) for case in pairs(FACTORS)}) == len(pairs(FACTORS))


def test_a_case_is_named_by_its_factors() -> None:
    assert name_of({"order": "paper", "split": "4"}) == "order=paper,split=4"


def test_a_rule_is_kept_and_costs_only_the_pairs_that_it_forbids() -> None:
    cases = pairs(FACTORS, lambda micros, order: micros == "1" or order == "scheduled")
    forbidden = {frozenset({("micros", "2"), ("order", order)}) for order in ("serial", "paper")}
    assert meetings(cases) == meetings(every(FACTORS)) - forbidden


def test_what_another_table_has_is_left_to_it() -> None:
    """Two tables then have all pairs, and the second none for the sake of what is in the first alone."""
    whole = pairs(FACTORS)
    first = pairs({name: FACTORS[name] for name in ("order", "split", "wire")})
    second = pairs(FACTORS, beside=first)
    assert meetings(first) | meetings(second) == meetings(whole)
    assert len(second) < len(whole)
    assert pairs(FACTORS, beside=whole) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_pair_that_some_legal_case_has_is_covered(seed: int) -> None:
    """With any set of legal cases, which a rule knows only when a case is finished; most pairs then fit few others."""
    chooser = random.Random(seed)
    chosen = chooser.sample(every(FACTORS), k=chooser.choice([0, 1, 5, 20, 60]))
    legal = {tuple(case.values()) for case in chosen}

    def allowed(order: str, split: str, remat: str, micros: str, wire: str) -> bool:
        return (order, split, remat, micros, wire) in legal

    cases = pairs(FACTORS, allowed)
    assert {tuple(case.values()) for case in cases} <= legal
    assert meetings(cases) == meetings(every(FACTORS, legal))


def test_a_value_that_completes_no_pair_is_the_one_used_least() -> None:
    """Rests of a table were all alike before: the first values of all factors, a dozen times."""
    factors = {"long": tuple("abcdefgh"), "other": tuple("ijklmnop"), "short": ("x", "y", "z")}
    uses = [case["short"] for case in pairs(factors)]
    assert max(map(uses.count, "xyz")) - min(map(uses.count, "xyz")) <= 2
