"""Which layouts are verified: all that fit N ranks, as a covering.

`possible` tries every ParallelConfig of N ranks and keeps what `mesh_of`, `stage_parts` and `schedule` accept: there is
no second opinion here on what fits. Two of them whose mesh and lists of operators are equal are one layout.

The full product would be a few hundred. Attention, FFN and dispatch decide where every tensor of a layer lies, and pp,
dp, node, ep, etp over how many ranks: all combinations of these are run. Vocabulary and schedule touch a layer only at
its ends: embedding, head and the order of whole micro-batches. `covering` therefore deals them out such that each
vocabulary and each schedule meets each strategy (attention, ffn, dispatch) wherever one fits the other, and each
schedule meets each vocabulary; few extra layouts are needed for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

import torch

from megascale_moe.comm.axis import axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, ModelConfig, OverlapConfig, ParallelConfig, TrainConfig
from megascale_moe.pipeline.schedule import schedule
from megascale_moe.strategies import registry
from megascale_moe.strategies.experts_all_gather import ALL_GATHER
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import part_ops
from megascale_moe.strategies.registry import dispatch_of, names
from megascale_moe.strategies.slices import Slices
from megascale_moe.strategies.stages import Part, stage_parts
from megascale_moe.tools.verify.scale import scaled_down, with_layers

ROWS_PER_RANK = 2
SCHEDULES = (("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2))


@dataclass(frozen=True)
class Case:
    """A layout to verify: of which model, and how the global batch is cut.

    Attributes:
        rows: sequences per micro-batch. micros: micro-batches per data-parallel rank.
        overlap: the passes that the list goes through. train: the optimizer, and what it is set to.
    """

    parallel: ParallelConfig
    mesh: Mesh
    model: ModelConfig
    rows: int
    micros: int
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def strategy(self) -> tuple[str, str, str]:
        """The strategies that decide where the tensors of a layer lie."""
        p = self.parallel
        return p.attention, p.ffn, p.dispatch

    @property
    def share(self) -> int:
        """Sequences of one data-parallel rank."""
        return self.rows * self.micros

    @property
    def slices(self) -> Slices:
        """Which tokens of every sequence of a micro-batch the ranks of a node hold."""
        attention = registry.named(registry.ATTENTION, self.parallel.attention, "parallel.attention")
        return attention.slices(self.rows, self.model.sequence_length, self.mesh.node)

    @property
    def words(self) -> dict[str, str | int]:
        """The layout as keys of the section [parallel]."""
        p, m = self.parallel, self.mesh
        return {
            "pp": m.pp, "dp": m.dp, "node": m.node, "attention": p.attention, "ffn": p.ffn, "ep": m.ep, "etp": m.etp,
            "dispatch": p.dispatch, "vocabulary": p.vocabulary, "schedule": p.schedule,
            "virtual_stages": p.virtual_stages,
        }  # fmt: skip


def with_passes(case: Case, overlap: OverlapConfig) -> Case:
    """The case with the config's own passes; where they follow from measured times, the most that they could do."""
    split = str(max(case.mesh.node, case.mesh.ffn)) if overlap.split == "auto" else overlap.split
    remat = "full" if overlap.remat == "budget" else overlap.remat
    together = 1 if case.parallel.schedule == "zero_bubble" else overlap.micro_batches
    passes = OverlapConfig(order=overlap.order, split=split, remat=remat, micro_batches=together)
    return replace(case, overlap=passes)


def case_of(parallel: ParallelConfig, model: ModelConfig, ranks: int) -> Case:
    """The case of a layout with all sizes worked out.

    Raises:
        ConfigError: it does not fit the ranks or the model.
    """
    small = _small(model, ranks)
    mesh = mesh_of(parallel, small, ranks)
    small = with_layers(small, model, _layers(mesh.pp * parallel.virtual_stages))
    stage_parts(parallel, small)
    share = ROWS_PER_RANK * ranks // mesh.dp
    micros = max(2, mesh.pp)
    schedule(parallel.schedule, mesh.pp, micros, parallel.virtual_stages)
    exact = replace(parallel, pp=mesh.pp, dp=mesh.dp, node=mesh.node, ep=mesh.ep, etp=mesh.etp)
    if mesh.ep == 1:  # no experts elsewhere: one form only, or nothing to dispatch
        only = ALL_GATHER.name if mesh.etp > 1 else registry.AUTO
        exact = replace(exact, dispatch=only)  # type: ignore[arg-type]
    return Case(exact, mesh, small, share // micros, micros)


@lru_cache(maxsize=16)
def _small(model: ModelConfig, ranks: int) -> ModelConfig:
    return scaled_down(model, ranks)


def _layers(stages: int) -> int:
    """One per stage; two stages get three, so that stages differ."""
    return 3 if stages == 2 else max(stages, 2)


def own_case(config: Config, ranks: int) -> Case:
    """The user's own layout; `dispatch = "auto"` chooses what it chooses for the user's own sizes.

    Raises:
        ConfigError: it does not fit this many ranks.
    """
    parallel = replace(config.parallel, stage_layers=())
    mesh = mesh_of(parallel, config.model, ranks)
    layout = Layout.of(parallel, 1, config.model.sequence_length, axes_of(mesh, 0), torch.float32)
    if parallel.dispatch == registry.AUTO and mesh.ffn > 1:
        parallel = replace(parallel, dispatch=dispatch_of(layout, config.model).name)  # type: ignore[arg-type]
    return case_of(parallel, config.model, ranks)


def possible(model: ModelConfig, ranks: int) -> Iterator[Case]:
    """Every layout that fits, the same list more than once among them."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    shapes = [(pp, dp, ranks // (pp * dp)) for pp, dp in product(sizes, sizes) if ranks % (pp * dp) == 0]
    strategies = list(product(*map(names, (registry.ATTENTION, registry.FFN, registry.DISPATCH))))
    orders = [(vocabulary, *named) for vocabulary, named in product(names(registry.VOCABULARY), SCHEDULES)]
    choices = registry.choices()
    for (pp, dp, node), ep, etp in product(shapes, sizes, sizes):
        for (attention, ffn, dispatch), (vocabulary, name, virtual) in product(strategies, orders):
            try:
                parallel = ParallelConfig(
                    pp=pp, dp=dp, node=node, attention=attention, ffn=ffn, ep=ep, etp=etp,  # type: ignore[arg-type]
                    dispatch=dispatch, vocabulary=vocabulary, schedule=name, virtual_stages=virtual,  # type: ignore[arg-type]
                )  # fmt: skip
                parallel.check(choices)
                yield case_of(parallel, model, ranks)
            except ConfigError:
                continue


def listed(case: Case) -> Hashable:
    """Return a key that equal layouts share: mesh, order of the micro-batches and every operator."""
    p = case.parallel
    order = (p.schedule, p.virtual_stages) if case.mesh.pp > 1 else ()
    shallow = replace(case.model, layers=min(case.model.layers, 2))
    return case.mesh, order, _operators(case.mesh, *case.strategy, p.vocabulary, shallow)


@lru_cache(maxsize=4096)
def _operators(
    mesh: Mesh, attention: str, ffn: str, dispatch: str, vocabulary: str, model: ModelConfig
) -> tuple[Hashable, ...]:
    layout = Layout(
        1, model.sequence_length, axes_of(mesh, 0), dispatch=dispatch, attention=attention, ffn=ffn,
        vocabulary=vocabulary,
    )  # fmt: skip
    ops = part_ops(model, layout, Part.whole(model))
    return tuple((op.name, op.reads, op.writes, op.cost) for op in ops)


def distinct(cases: Sequence[Case]) -> list[Case]:
    """The first of each layout."""
    return list({listed(case): case for case in reversed(cases)}.values())[::-1]


def covering(cases: Sequence[Case], first: Case | None = None) -> list[Case]:
    """A choice of `cases` (see the module's text), `first` before all others."""
    bases: dict[Hashable, list[Case]] = {}
    for case in cases:
        bases.setdefault((case.mesh, case.strategy), []).append(case)
    chosen = [first] if first else []
    met = Counter(pair for case in chosen for pair in _pairs(case))

    def rarity(case: Case) -> tuple[int, int]:
        """How many of a case's meetings are new, and how rare the others are."""
        pairs = _pairs(case)
        return sum(not met[pair] for pair in pairs), -sum(met[pair] for pair in pairs)

    done = {(case.mesh, case.strategy) for case in chosen}
    for base, choices in bases.items():
        if base not in done:
            chosen.append(max(choices, key=rarity))
            met.update(_pairs(chosen[-1]))
    for case in cases:
        if rarity(case)[0]:
            chosen.append(case)
            met.update(_pairs(case))
    return chosen


def _pairs(case: Case) -> set[Hashable]:
    """The meetings of a vocabulary or a schedule with a strategy, and of both with each other."""
    p = case.parallel
    vocabulary = {(case.strategy, p.vocabulary)} if case.mesh.node > 1 else set()
    if case.mesh.pp == 1:
        return set(vocabulary)
    return {*vocabulary, (case.strategy, p.schedule), (p.schedule, p.vocabulary if case.mesh.node > 1 else "")}


def all_cases(config: Config, ranks: int) -> tuple[list[Case], bool, str]:
    """The layouts to verify, whether the user's own is their first, and why not."""
    own, reason = None, ""
    try:
        own = own_case(config, ranks)
    except ConfigError as error:
        reason = str(error)
    cases = list(possible(config.model, ranks))
    found = distinct([own, *cases] if own else cases)
    return covering(found, own), own is not None, reason
