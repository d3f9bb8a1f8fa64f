"""All strategies, by name: the one place that a new one is added to.

The user's words in `[parallel]` are looked up here and nowhere else; whoever needs all strategies of a kind (the
planner's search, `verify`, help) reads the tuples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from megascale_moe.config import ConfigError, ModelConfig
from megascale_moe.strategies.attention_cp import CONTEXT_PARALLEL
from megascale_moe.strategies.attention_sp import SEQUENCE_PARALLEL
from megascale_moe.strategies.attention_tp import TENSOR_PARALLEL
from megascale_moe.strategies.experts_all_gather import ALL_GATHER
from megascale_moe.strategies.experts_all_to_all import ALL_TO_ALL
from megascale_moe.strategies.ffn_layouts import EXPERT_PARALLEL, EXPERT_TENSOR_PARALLEL, TENSOR_PARALLEL_FFN
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.slices import Slices
from megascale_moe.strategies.strategy import (
    AttentionStrategy,
    DispatchForm,
    FFNStrategy,
    Strategies,
    Strategy,
    VocabularyStrategy,
)
from megascale_moe.strategies.vocabulary import REPLICATED, SHARDED

ATTENTION: tuple[AttentionStrategy, ...] = (SEQUENCE_PARALLEL, TENSOR_PARALLEL, CONTEXT_PARALLEL)
FFN: tuple[FFNStrategy, ...] = (EXPERT_PARALLEL, TENSOR_PARALLEL_FFN, EXPERT_TENSOR_PARALLEL)
DISPATCH: tuple[DispatchForm, ...] = (ALL_TO_ALL, ALL_GATHER)
VOCABULARY: tuple[VocabularyStrategy, ...] = (REPLICATED, SHARDED)

AUTO = "auto"
"""The dispatch form that is worked out: the cheapest."""

# Time per byte of an all-to-all relative to all-gather and reduce-scatter. NCCL: the paper's dispatch times on 8 GPUs
# (all-to-all 1030 us at k = 8 against a mean of 778 us, at equal volume). gloo: both are the same point-to-point
# exchange here, benchmarks/dispatch measures the ratio.
RELATIVE_COST = {"nccl": 1030 / 777.5, "gloo": 1.0}

Kind = TypeVar("Kind", bound=Strategy)


def register(strategy: Strategy) -> None:
    """Add a strategy of a program outside of the package, for the rest of the process and those that it forks."""
    for name, kind in _KINDS.items():
        if isinstance(strategy, kind):
            globals()[name] = (*globals()[name], strategy)
            return
    raise TypeError(f"{type(strategy).__name__} is none of {', '.join(kind.__name__ for kind in _KINDS.values())}")


_KINDS: dict[str, type[Strategy]] = {
    "ATTENTION": AttentionStrategy, "FFN": FFNStrategy, "DISPATCH": DispatchForm, "VOCABULARY": VocabularyStrategy,
}  # fmt: skip


def choices() -> Mapping[str, Sequence[Any]]:
    """Return the names that config keys may have, by "section.key"."""
    return {
        "parallel.attention": names(ATTENTION), "parallel.ffn": names(FFN), "parallel.vocabulary": names(VOCABULARY),
        "parallel.dispatch": (AUTO, *names(DISPATCH)),
    }  # fmt: skip


def names(strategies: Sequence[Strategy]) -> tuple[str, ...]:
    """Return the user's words for strategies of a kind."""
    return tuple(strategy.name for strategy in strategies)


def named(strategies: Sequence[Kind], name: str, key: str) -> Kind:
    """Return the strategy that a key of the config names.

    Raises:
        ConfigError: there is none of this name.
    """
    for strategy in strategies:
        if strategy.name == name:
            return strategy
    raise ConfigError(f"{key} = {name!r}: must be one of {', '.join(map(repr, names(strategies)))}")


def strategies_of(layout: Layout, model: ModelConfig) -> Strategies:
    """Return the strategy of each module of a layout.

    Raises:
        ConfigError: a name that no strategy has.
    """
    return Strategies(
        named(ATTENTION, layout.attention, "parallel.attention"), named(FFN, layout.ffn, "parallel.ffn"),
        dispatch_of(layout, model), named(VOCABULARY, layout.vocabulary, "parallel.vocabulary"),
    )  # fmt: skip


def slices_of(layout: Layout) -> Slices:
    """Return which tokens of every sequence the ranks of a layout hold between modules."""
    return named(ATTENTION, layout.attention, "parallel.attention").slices(layout)


def dispatch_of(layout: Layout, model: ModelConfig) -> DispatchForm:
    """Return the dispatch form of a layout: as configured, or the cheapest; without peers to choose from, gathering."""
    if layout.ep.size == 1:
        return ALL_GATHER
    if layout.dispatch != AUTO:
        return named(DISPATCH, layout.dispatch, "parallel.dispatch")
    relative = RELATIVE_COST["nccl" if layout.group.native else "gloo"]
    return cheapest_dispatch(model.top_k, layout.ep.size, relative, layout.etp.size)


def cheapest_dispatch(top_k: int, ep: int, relative_cost: float, etp: int = 1) -> DispatchForm:
    """Return the form that moves least (paper, section 3.2), weighed by time per byte; of equals the first.

    Args:
        relative_cost: time per byte of an all-to-all over that of all-gather and reduce-scatter.
    """
    return min(DISPATCH, key=lambda form: form.rows(top_k, ep, etp, relative_cost))
