"""How long a training step of a layout takes on a cluster: the lists that would run, priced and simulated.

Nothing is counted in closed form. The lists of each kind of stage are built as a rank builds them, ordered by the same
scheduler with the cluster's prices, and simulated by the executor's rules; that gives each action of the pipeline its
duration, and the schedule, executed on these, the pipeline's. Layers and micro-batches are alike, so each kind of stage
is simulated once.

Synchronisation and update are the optimizer's own list. Behind the step they are simulated alone. Hidden, they are
simulated among the operators of one micro-batch's forward and backward of a rank, and what that takes longer is added.
That is what the executor does at the end of a step (its first gathers and last reductions have one micro-batch to hide
behind), except that a rank which waits in the pipeline's bubble could hide more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megascale_moe.comm.mesh import Mesh, mesh_of
from megascale_moe.config import Config
from megascale_moe.engine.op import Op, Stream
from megascale_moe.engine.order import makespan, simulate
from megascale_moe.model.counts import counts
from megascale_moe.parallel.stages import Part, parts_of_rank
from megascale_moe.pipeline.batches import DTYPES, check_batches
from megascale_moe.pipeline.checker import Timeline, timeline
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.pipeline.schedule import Action
from megascale_moe.pipeline.step import Stage, action_ops
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.lists import optimizer_of, plan_of
from megascale_moe.planner.memory import RankBytes, rank_bytes
from megascale_moe.planner.price import Prices

Kind = tuple[int, int, bool, bool]  # layers with experts, without, first, last


@dataclass(frozen=True)
class Took:
    """Of a list: seconds in all, and those of them in which the computation waits for communication."""

    seconds: float
    exposed: float


@dataclass(frozen=True)
class StepPrice:
    """A step of a layout.

    Attributes:
        seconds: until the slowest rank is done. pipeline: of that, the micro-batches through the stages. bubble: the
            fraction of all ranks' pipeline time without work. synchronisation: what gradients, update and weights add.
        exposed: seconds in which a rank of the middle of the pipeline waits for communication other than its stages'.
        mfu: of the peak in the compute dtype.
    """

    seconds: float
    pipeline: float
    bubble: float
    synchronisation: float
    exposed: float
    tokens_per_second: float
    mfu: float


def price(config: Config, cluster: Cluster, gpus: int) -> StepPrice:
    """Price the layout of a config.

    Raises:
        ConfigError: it does not fit so many ranks, or the model.
    """
    mesh = mesh_of(config.parallel, config.model, gpus)
    check_batches(config, mesh)
    return _Pricing(config, cluster, mesh).step()


def memory(config: Config, gpus: int, place: int = 0) -> RankBytes:
    """What the ranks at a place of the pipeline hold at their peak; the first has most micro-batches under way.

    Raises:
        ConfigError: the layout does not fit so many ranks, or the model.
    """
    mesh = mesh_of(config.parallel, config.model, gpus)
    check_batches(config, mesh)
    plan = plan_of(config, mesh, place * mesh.stage)
    return rank_bytes(plan, optimizer_of(plan, config.train))


class _Pricing:
    """One layout on one cluster."""

    def __init__(self, config: Config, cluster: Cluster, mesh: Mesh) -> None:
        self.config, self.cluster, self.mesh = config, cluster, mesh
        self.prices = Prices.of(cluster, DTYPES[config.train.dtype], mesh)
        self._stages: dict[Kind, Stage] = {}
        self._spans: dict[tuple[Kind, str], Took] = {}

    def step(self) -> StepPrice:
        """All of it."""
        times = self.timeline
        middle = self.mesh.pp // 2
        synchronisation = max(self._synchronisation(place).seconds for place in {0, middle, self.mesh.pp - 1})
        seconds = times.makespan + synchronisation
        exposed = self._synchronisation(middle).exposed + sum(
            self._span(action).exposed for action in self.plan.schedule[middle]
        )
        train, model = self.config.train, self.config.model
        tokens = train.global_batch * model.sequence_length / seconds
        peak = self.prices.peak * self.mesh.world
        return StepPrice(
            seconds, times.makespan, times.bubble, synchronisation, exposed, tokens,
            tokens * counts(model).flops_per_token / peak,
        )  # fmt: skip

    @cached_property
    def plan(self) -> StepPlan:
        """What rank 0 runs; whatever its stage, its lists of a part are those of every rank."""
        return self._plan(0)

    def _plan(self, place: int) -> StepPlan:
        return plan_of(self.config, self.mesh, place * self.mesh.stage, Profile(self.prices))

    @cached_property
    def timeline(self) -> Timeline:
        """Of the pipeline."""
        hop = self.cluster.links[Stream.INTER].seconds(self.plan.message.nbytes, 1)
        return timeline(self.plan.schedule, self.mesh.pp, lambda action: self._span(action).seconds, hop)

    def _span(self, action: Action) -> Took:
        key = (self._kind(self.plan.parts[action.stage]), action.phase)
        if key not in self._spans:
            self._spans[key] = self._simulated(action_ops(self._stage(self.plan.parts[action.stage]), action.phase))
        return self._spans[key]

    def _simulated(self, ops: Sequence[Op]) -> Took:
        spans = simulate(ops, self.prices.seconds)
        return Took(makespan(spans), sum(span.exposed for span in spans))

    def _kind(self, part: Part) -> Kind:
        dense = sum(layer < self.config.model.dense_layers for layer in part.layers)
        return len(part.layers) - dense, dense, part.first, part.last

    def _stage(self, part: Part) -> Stage:
        kind = self._kind(part)
        if kind not in self._stages:
            self._stages[kind] = self.plan.stage(part)
        return self._stages[kind]

    def _synchronisation(self, place: int) -> Took:
        """Of the ranks at a place of the pipeline: what a step takes longer than its micro-batches."""
        plan = self._plan(place)
        optimizer = optimizer_of(plan, self.config.train)
        if not plan.overlap.hides_synchronisation:
            return self._simulated(optimizer.ops)
        stages = [self._stage(part) for part in parts_of_rank(plan.parts, self.mesh.pp, place).values()]
        ops = [op for stage in stages for op in stage.forward] + [op for s in reversed(stages) for op in s.backward]
        with_it, without = self._simulated(optimizer.hidden(ops)), self._simulated(ops)
        return Took(max(with_it.seconds - without.seconds, 0.0), max(with_it.exposed - without.exposed, 0.0))
