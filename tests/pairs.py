"""Tables of test cases in which every two values of different factors meet, instead of the product of all factors.

What breaks a combination is nearly always two things at once: this order with that split, this way to attend with that
dispatch. A table in which all pairs occur has little more cases than its two longest factors multiplied, whatever the
number of factors. `pairs` is deterministic, so that all processes that collect tests see the same table.

It is written here because constraints matter: many values fit together only with certain values of other factors.
Whether some case has a pair is therefore decided by a complete search. allpairspy, which knows constraints, stops at
the first case that adds nothing: it left out 52 of the 643 pairs of a table of ours.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Case = dict[str, str]  # factor -> value
Pair = frozenset[tuple[str, str]]  # two (factor, value)
Rule = Callable[..., bool]  # what is legal among the values of the factors that its parameters are named after
TRIED = 32  # pairs that are tried as the beginning of the next case; more make tables hardly shorter


def pairs(factors: Mapping[str, Sequence[str]], *rules: Rule, beside: Sequence[Case] = ()) -> list[Case]:
    """Cases in which every pair of values occurs that occurs in any case which all rules allow.

    Args:
        beside: cases of another table, with whose pairs this one need not deal.
    """
    table = _Table(factors, rules)
    for case in beside:
        table.take(case)
    cases: list[Case] = []
    while table.missing:
        found = []
        for pair in list(table.missing)[:TRIED]:
            case = table.case_with(pair)
            if case is None:
                del table.missing[pair]  # nothing legal has it
            else:
                found.append(case)
        if found:
            cases.append(max(found, key=lambda case: sum(pair in table.missing for pair in pairs_of(case))))
            table.take(cases[-1])
    return _without_idle(cases, beside)


def pairs_of(case: Case) -> list[Pair]:
    """All that meets in a case."""
    return [frozenset(two) for two in combinations(case.items(), 2)]


def name_of(case: Case) -> str:
    """The id of a case's test."""
    return ",".join(f"{factor}={value}" for factor, value in case.items())


def _without_idle(cases: Sequence[Case], beside: Sequence[Case]) -> list[Case]:
    """The cases without those all of whose pairs others have as well, most of them earlier ones."""
    times = Counter(pair for case in [*cases, *beside] for pair in pairs_of(case))
    kept = []
    for case in cases:
        if all(times[pair] > 1 for pair in pairs_of(case)):
            times.subtract(pairs_of(case))
        else:
            kept.append(case)
    return kept


class _Table:
    """A table that is being made: pairs that are missing in it, and how often it has each value."""

    def __init__(self, factors: Mapping[str, Sequence[str]], rules: Sequence[Rule]) -> None:
        self.factors = factors
        self.rules = [(tuple(inspect.signature(rule).parameters), rule) for rule in rules]
        self.used: Counter[tuple[str, str]] = Counter()
        self.missing: dict[Pair, None] = {}  # a set that keeps its order
        for (one, values), (other, others) in combinations(factors.items(), 2):
            self.missing |= dict.fromkeys(frozenset({(one, a), (other, b)}) for a, b in product(values, others))

    def take(self, case: Case) -> None:
        """Note what a case has."""
        self.used.update(case.items())
        for pair in pairs_of(case):
            self.missing.pop(pair, None)

    def case_with(self, pair: Pair) -> Case | None:
        """A legal case, or None if there is none."""
        begun = dict(pair)
        if not all(self._allows(begun, name) for name in begun):
            return None
        return self._completed(begun, [name for name in self.factors if name not in begun])

    def _completed(self, begun: Case, left: Sequence[str]) -> Case | None:
        """A legal case with what is begun. Each further value completes as many missing pairs as it can; of those that
        complete equally many it is the one that was used least, so that no value fills up all the rest of a table.
        """
        if not left:
            return {name: begun[name] for name in self.factors}

        def rank(value: str) -> tuple[int, int]:
            new = (left[0], value)
            return -sum(frozenset({new, other}) in self.missing for other in begun.items()), self.used[new]

        for value in sorted(self.factors[left[0]], key=rank):
            longer = {**begun, left[0]: value}
            case = self._completed(longer, left[1:]) if self._allows(longer, left[0]) else None
            if case is not None:
                return case
        return None

    def _allows(self, case: Case, latest: str) -> bool:
        """Whether all rules that ask for a value, and for none that is not yet there, allow what there is."""
        asked = ((names, rule) for names, rule in self.rules if latest in names and case.keys() >= set(names))
        return all(rule(*(case[name] for name in names)) for names, rule in asked)
