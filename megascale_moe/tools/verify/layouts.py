"""Which layouts are verified: all that fit N ranks, as a covering.

`possible` tries every ParallelConfig of N ranks and keeps what `mesh_of`, `stage_parts` and `schedule` accept: there is
no second opinion here on what fits. Two of them whose mesh and lists of operators are equal are one layout.

The full product would be a few hundred. Attention, FFN and dispatch decide where every tensor of a layer lies, and pp,
dp, node, ep, etp over how many ranks: all combinations of these are run. Vocabulary and schedule touch a layer only at
its ends: embedding, head and the order of whole micro-batches. `covering` therefore deals them out such that each
vocabulary and each schedule meets each strategy (attention, ffn, dispatch) wherever one fits the other, and each
schedule meets each vocabulary; few extra layouts are needed for that. Sequences that several nodes share are one more
such thing: what it adds stands in front of attention and behind the router, whatever the sizes. So cp meets each
strategy, vocabulary and schedule, and each attention, in nodes of one rank and of several, with experts on fewer ranks
than a sequence, on as many and on more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from megascale_moe.comm.axis import axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, ModelConfig, OverlapConfig, ParallelConfig, TrainConfig
from megascale_moe.pipeline.schedule import schedule
from megascale_moe.strategies import registry
from megascale_moe.strategies.experts_all_gather import ALL_GATHER
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import part_ops
from megascale_moe.strategies.stages import Part, stage_parts
from megascale_moe.tools.verify.scale import scaled_down, with_layers

ROWS_PER_RANK = 2
SCHEDULES = (("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2))
KEYS = (
    "pp", "dp", "cp", "node", "attention", "ffn", "ep", "etp", "dispatch", "vocabulary", "schedule", "virtual_stages",
)  # fmt: skip
"""The keys of the section [parallel] that tell layouts apart."""


@dataclass(frozen=True)
class Case:
    """A layout to verify: of which model, and how the global batch is cut.

    Attributes:
        parallel: with all sizes worked out. rows: sequences per micro-batch. micros: micro-batches per data-parallel
            rank. overlap: the passes that the list goes through. train: the optimizer, and what it is set to.
    """

    parallel: ParallelConfig
    mesh: Mesh
    model: ModelConfig
    rows: int
    micros: int
    overlap: OverlapConfig
    train: TrainConfig

    @property
    def strategy(self) -> tuple[str, str, str]:
        """The strategies that decide where the tensors of a layer lie."""
        p = self.parallel
        return p.attention, p.ffn, p.dispatch

    @property
    def words(self) -> dict[str, str | int]:
        """The layout as keys of the section [parallel]."""
        return {key: getattr(self.parallel, key) for key in KEYS}

    @property
    def text(self) -> str:
        """The layout in a line."""
        return " ".join(f"{key}={value}" for key, value in self.words.items())

    def rows_of(self, rank: int, micro: int) -> slice:
        """Return the rows of the global batch that are a rank's micro-batch."""
        first = (self.mesh.replica(rank) * self.micros + micro) * self.rows
        return slice(first, first + self.rows)

    def tokens_of(self, rank: int, micro: int) -> Tensor:
        """Return which tokens of the global batch a rank holds of its micro-batch, in its order; int64 [tokens]."""
        rows, length = self.rows_of(rank, micro), self.model.sequence_length
        axes, attention = axes_of(self.mesh, 0), self.parallel.attention
        slices = registry.slices_of(Layout(self.rows, length, axes, attention=attention))
        return slices.take(torch.arange(rows.start * length, rows.stop * length), rank % self.mesh.sequence)


def case_of(parallel: ParallelConfig, config: Config, ranks: int) -> Case:
    """Return the case of a layout with all sizes worked out, and a config's model, optimizer and passes.

    Raises:
        ConfigError: it does not fit the ranks or the model.
    """
    small = scaled_down(config.model, ranks)
    mesh = mesh_of(parallel, small, ranks)
    stages = mesh.pp * parallel.virtual_stages
    small = with_layers(small, config.model, 3 if stages == 2 else max(stages, 2))  # three, so that two stages differ
    stage_parts(parallel, small)
    micros = max(2, mesh.pp)
    schedule(parallel.schedule, mesh.pp, micros, parallel.virtual_stages)
    exact = replace(parallel, pp=mesh.pp, dp=mesh.dp, node=mesh.node, ep=mesh.ep, etp=mesh.etp)
    if mesh.ep == 1:  # no experts elsewhere: one form only, or nothing to dispatch
        only = ALL_GATHER.name if mesh.etp > 1 else registry.AUTO
        exact = replace(exact, dispatch=only)  # type: ignore[arg-type]
    asked = config.overlap  # what follows from measured times does the most that it could
    overlap = OverlapConfig(
        order=asked.order,
        split=str(max(mesh.node, mesh.ffn)) if asked.split == "auto" else asked.split,
        remat="full" if asked.remat == "budget" else asked.remat,
        micro_batches=1 if parallel.schedule == "zero_bubble" else asked.micro_batches,
    )
    return Case(exact, mesh, small, ROWS_PER_RANK * ranks // mesh.dp // micros, micros, overlap, config.train)


def own_case(config: Config, ranks: int) -> Case:
    """Return the user's own layout; `dispatch = "auto"` chooses what it chooses for the user's own sizes.

    Raises:
        ConfigError: it does not fit this many ranks.
    """
    parallel = replace(config.parallel, stage_layers=())
    mesh = mesh_of(parallel, config.model, ranks)
    layout = Layout.of(parallel, 1, config.model.sequence_length, axes_of(mesh, 0), torch.float32)
    dispatch = registry.dispatch_of(layout, config.model).name
    return case_of(replace(parallel, dispatch=dispatch), config, ranks)  # type: ignore[arg-type]


def possible(config: Config, ranks: int) -> Iterator[Case]:
    """Yield every layout that fits, the same list more than once among them."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    kinds = (registry.ATTENTION, registry.FFN, registry.DISPATCH, registry.VOCABULARY)
    strategies = list(product(*map(registry.names, kinds), SCHEDULES))
    choices = registry.choices()
    for pp, dp, cp, ep, etp in product(sizes, repeat=5):
        if ranks % (pp * dp * cp):
            continue
        for attention, ffn, dispatch, vocabulary, (name, virtual) in strategies:
            try:
                parallel = ParallelConfig(
                    pp=pp, dp=dp, cp=cp, node=ranks // (pp * dp * cp), attention=attention, ffn=ffn,  # type: ignore[arg-type]
                    ep=ep, etp=etp,
                    dispatch=dispatch, vocabulary=vocabulary, schedule=name, virtual_stages=virtual,  # type: ignore[arg-type]
                )  # fmt: skip
                case = case_of(parallel, config, ranks)  # refuses five of six, at a third of the cost of the check
                parallel.check(choices)
                yield case
            except ConfigError:
                continue


def listed(case: Case) -> Hashable:
    """Return a key that equal layouts share: mesh, order of the micro-batches and every operator."""
    p = case.parallel
    order = (p.schedule, p.virtual_stages) if case.mesh.pp > 1 else ()
    shallow = replace(case.model, layers=min(case.model.layers, 2))
    strategies = ParallelConfig(attention=p.attention, ffn=p.ffn, dispatch=p.dispatch, vocabulary=p.vocabulary)
    return case.mesh, order, _operators(case.mesh, strategies, shallow)


@lru_cache(maxsize=4096)
def _operators(mesh: Mesh, strategies: ParallelConfig, model: ModelConfig) -> tuple[Hashable, ...]:
    layout = Layout.of(strategies, 1, model.sequence_length, axes_of(mesh, 0), torch.float32)
    return tuple((op.name, op.reads, op.writes, op.cost) for op in part_ops(model, layout, Part.whole(model)))


def distinct(cases: Iterable[Case]) -> list[Case]:
    """Return the first of each layout."""
    first: dict[Hashable, Case] = {}
    for case in cases:
        first.setdefault(listed(case), case)
    return list(first.values())


def covering(cases: Sequence[Case], first: Case | None = None) -> list[Case]:
    """Return a choice of `cases` (see the module's text), `first` before all others."""
    chosen: list[Case] = []
    met: Counter[Hashable] = Counter()

    def choose(case: Case) -> None:
        chosen.append(case)
        met.update(_pairs(case))

    def rarity(case: Case) -> tuple[int, int]:
        """Return how many of a case's meetings are new, and how rare the others are."""
        pairs = _pairs(case)
        return sum(not met[pair] for pair in pairs), -sum(met[pair] for pair in pairs)

    bases: dict[Hashable, list[Case]] = {}
    for case in (case for case in cases if case.mesh.cp == 1):
        bases.setdefault((case.mesh, case.strategy), []).append(case)
    if first:
        choose(first)
        bases.pop((first.mesh, first.strategy), None)
    for alike in bases.values():
        choose(max(alike, key=rarity))
    while left := [case for case in cases if rarity(case)[0]]:
        choose(max(left, key=rarity))
        cases = left
    return chosen


def _pairs(case: Case) -> set[Hashable]:
    """Return the meetings of a vocabulary, a schedule or cp with a strategy, and of these with each other."""
    p, mesh = case.parallel, case.mesh
    vocabulary, name = p.vocabulary if mesh.node > 1 else "", p.schedule if mesh.pp > 1 else ""
    pairs: set[Hashable] = {(case.strategy, vocabulary)} if vocabulary else set()
    if name:
        pairs |= {(case.strategy, name), (name, vocabulary)}
    if mesh.cp > 1:
        experts = (mesh.ffn > mesh.sequence) - (mesh.ffn < mesh.sequence)  # on more ranks than a sequence, or fewer
        inside, sizes = (p.attention, mesh.node > 1, experts), (mesh.cp, mesh.dp > 1, mesh.etp > 1)
        pairs |= {("cp", meeting) for meeting in (case.strategy, vocabulary, name, inside, sizes)}
    return pairs


def all_cases(config: Config, ranks: int) -> tuple[list[Case], str]:
    """Return the layouts to verify, the user's own first, and why that is not among them, "" if it is."""
    own, reason = None, ""
    try:
        own = own_case(config, ranks)
    except ConfigError as error:
        reason = str(error)
    cases = distinct([*([own] if own else []), *possible(config, ranks)])
    return covering(cases, own), reason
