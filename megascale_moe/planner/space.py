"""The layouts that a config can say for a model on so many GPUs, and the options that each of them has.

A layout decides who holds what: pipeline, node, strategies of attention and experts, dispatch, micro-batch, schedule.
Options change how it runs: order, recomputation, splits, two micro-batches at once, formats of gradients. Keys that
a user wants to keep stay as the config has them. Formats of activations and weights always do: with "auto" they are
chosen by price where the user has allowed it, but no search turns a run into another one's numerics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, ParallelConfig, require
from megascale_moe.strategies import registry
from megascale_moe.strategies.fit import mesh_of

TOKENS = 2**15
"""Most tokens of a micro-batch, unless one sequence has more: beyond it activations grow and products get no faster.
Sequences are shared by nodes that have no fewer each, or as the config says: with fewer a node would do better with
sequences of its own.
"""
VIRTUAL_STAGES = (2, 3, 4, 5, 6, 8, 10, 12)
LAYOUT = (
    "parallel.pp", "parallel.dp", "parallel.cp", "parallel.node", "parallel.attention", "parallel.ffn", "parallel.ep",
    "parallel.etp", "parallel.dispatch", "parallel.schedule", "parallel.virtual_stages", "train.micro_batch",
)  # fmt: skip
OPTIONS: dict[str, tuple[Any, ...]] = {
    "overlap.order": ("scheduled",),  # which is the fastest of all three, whatever makes it
    "overlap.remat": ("none", "paper", "full"),
    "overlap.split": ("none", "2", "4"),
    "overlap.micro_batches": (1, 2),
    "wire.gradients": ("fp32", "bf16"),
}
"""The values that a search tries, by key."""
KEYS = (*LAYOUT, *OPTIONS)
"""The keys that a search may change."""


def value(config: Config, key: str) -> Any:
    """Return the value of a key such as "parallel.pp"."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def changed(config: Config, key: str, to: Any) -> Config:
    """Return a config with another value for a key."""
    section, name = key.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: to})})


class CandidateLayout(NamedTuple):
    """A layout: `parallel` without its schedule, which is named beside it, and sequences of a micro-batch."""

    parallel: ParallelConfig
    mesh: Mesh
    rows: int
    schedule: str
    virtual_stages: int

    @property
    def placement(self) -> tuple[Any, ...]:
        """Return where weights lie: a table has one row for each, the fastest of its layouts."""
        p = self.parallel
        return p.pp, p.dp, p.cp, p.node, p.attention, p.ffn, p.ep, p.etp

    @property
    def inside(self) -> tuple[Any, ...]:
        """Return the key on which the lists of a layer depend; layouts with equal keys differ elsewhere."""
        p, mesh = self.parallel, self.mesh
        return mesh.cp, mesh.node, mesh.ep, mesh.etp, p.attention, p.ffn, p.dispatch, self.rows

    def of(self, config: Config) -> Config:
        """Return a config with this layout."""
        parallel = replace(
            self.parallel, schedule=self.schedule, virtual_stages=self.virtual_stages,  # type: ignore[arg-type]
        )  # fmt: skip
        return replace(config, parallel=parallel, train=replace(config.train, micro_batch=self.rows))


@dataclass(frozen=True)
class Space:
    """The space of a search.

    Attributes:
        config: model and batch, and the values of keys that are kept. node: GPUs that share a fast link.
    """

    config: Config
    gpus: int
    node: int
    kept: frozenset[str] = frozenset()

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be searched."""
        require(self.gpus > 0, f"--gpus {self.gpus}: must be at least 1")
        for key in sorted(self.kept):
            require(key in KEYS, f"--keep {key}: is not searched; searched are {', '.join(KEYS)}")
        require(
            self.config.overlap.remat != "budget" or "overlap.remat" not in self.kept,
            "--keep overlap.remat: 'budget' follows from measured sizes; keep 'none', 'paper' or 'full'",
        )

    def options(self, key: str, tried: Sequence[Any] | None = None) -> Sequence[Any]:
        """Return the values of a key that are tried, `OPTIONS` if not given: the config's own if the key is kept."""
        if key in self.kept:
            return [value(self.config, key)]
        return OPTIONS[key] if tried is None else tried

    def layouts(self) -> Iterator[CandidateLayout]:
        """Return all layouts that fit the ranks and the model."""
        names = registry.names(registry.ATTENTION)
        for pp in self.options("parallel.pp", [n for n in _divisors(self.gpus) if n <= self.config.model.layers]):
            if self.gpus % pp:
                continue
            stage = self.gpus // pp
            for node in self.options("parallel.node", [n for n in _divisors(self.node) if stage % n == 0]):
                for cp in self.options("parallel.cp", self._cp(stage // node)):
                    # On one rank all are the same.
                    attentions = self.options("parallel.attention", names[:1] if cp * node == 1 else names)
                    for attention, ffn in product(attentions, self._ffn(node, stage)):
                        yield from self._placed(pp, attention, {"cp": cp, "node": node, **ffn})

    def _cp(self, nodes: int) -> list[int]:
        """Return how many of a stage's nodes may share a sequence."""
        most = min(self.config.model.sequence_length // TOKENS, nodes)
        powers = {2**n for n in range(most.bit_length())} or {1}
        return sorted(n for n in {*powers, self.config.parallel.cp} if nodes % n == 0)

    def _ffn(self, node: int, stage: int) -> Iterator[dict[str, Any]]:
        """Return the strategies of the experts with their sizes."""
        model, names = self.config.model, self.options("parallel.ffn", registry.names(registry.FFN))
        dense = all(spec.dense for spec in model.layer_kinds)
        for name in names:
            ffn = registry.named(registry.FFN, name, "parallel.ffn")
            if not ffn.pays(node) and len(names) > 1:
                continue
            for etp in self.options("parallel.etp", ffn.etp_choices(self.node)):
                sizes = ffn.ep_choices(node, stage, etp)
                fitting = [size for size in sizes if size == 0 or model.experts % size == 0]
                for ep in self.options("parallel.ep", [node] if dense and 0 not in sizes else fitting):
                    forms = registry.names(registry.DISPATCH) if ep > 1 else [registry.AUTO]
                    for dispatch in self.options("parallel.dispatch", forms):
                        yield {"ffn": name, "ep": ep, "etp": etp, "dispatch": dispatch}

    def _placed(self, pp: int, attention: str, sizes: dict[str, Any]) -> Iterator[CandidateLayout]:
        """Return one way to place weights, with each micro-batch and schedule, if it fits."""
        config, p = self.config, self.config.parallel
        parallel = replace(
            p, pp=pp, dp=0, attention=attention, **sizes,  # type: ignore[arg-type]
            schedule="1f1b", virtual_stages=1,
            stage_layers=p.stage_layers if "parallel.pp" in self.kept else (),
        )  # fmt: skip
        try:
            mesh = mesh_of(parallel, config.model, self.gpus)
        except ConfigError:
            return
        if config.train.global_batch % mesh.dp or ("parallel.dp" in self.kept and p.dp not in (0, mesh.dp)):
            return
        parallel, share = replace(parallel, dp=mesh.dp), config.train.global_batch // mesh.dp
        most = max(TOKENS // config.model.sequence_length, 1)
        for rows in self.options("train.micro_batch", [2**n for n in range(most.bit_length()) if share % 2**n == 0]):
            rows = rows or (share if pp == 1 else 1)
            for schedule, virtual in self._schedules(pp, share // rows):
                yield CandidateLayout(parallel, mesh, rows, schedule, virtual)

    def _schedules(self, pp: int, micros: int) -> list[tuple[str, int]]:
        """Return the schedules with their stages per rank, for so many micro-batches."""
        if pp == 1 and "parallel.schedule" not in self.kept:
            return [("1f1b", 1)]
        names = self.options("parallel.schedule", ["1f1b", "zero_bubble", "interleaved"])
        depths = self.options("parallel.virtual_stages", (1, *VIRTUAL_STAGES))
        most = self.config.model.layers // pp if micros % pp == 0 else 0
        return [(name, n) for name in names for n in depths if (1 < n <= most if name == "interleaved" else n == 1)]


@lru_cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def parallel_words(parallel: ParallelConfig) -> str:
    """Return a layout in a few words, as a table has room for: "pp 15 x dp 12 x node 8, sp + ep 8 all_to_all, 1f1b"."""
    p = parallel
    experts = registry.named(registry.FFN, p.ffn, "parallel.ffn").words(p)
    schedule = "" if p.pp == 1 else f", {p.schedule}" + (f" x {p.virtual_stages}" if p.virtual_stages > 1 else "")
    dispatch = "" if p.dispatch == registry.AUTO else f" {p.dispatch}"
    cp = f" x cp {p.cp}" if p.cp > 1 else ""
    return f"pp {p.pp} x dp {p.dp}{cp} x node {p.node}, {p.attention} + {experts}{dispatch}{schedule}"
