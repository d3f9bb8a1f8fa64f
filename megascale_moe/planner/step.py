"""How long a training step of a layout takes on a cluster: the lists that would run, priced and simulated.

Nothing is counted in closed form. The lists of each kind of stage are built as a rank builds them, ordered by the same
scheduler with the cluster's prices, and simulated by the executor's rules (`stages`); that gives each action of the
pipeline its duration, and the schedule, executed on these, the pipeline's.

Synchronisation and update are the optimizer's own list. Behind the step they are simulated alone. Hidden, they are
simulated among the operators of one micro-batch's forward and backward of a rank, and what that takes longer is added.
That is what the executor does at the end of a step (its first gathers and last reductions have one micro-batch to hide
behind), except that a rank which waits in the pipeline's bubble could hide more.

A step ends with its slowest rank: of N whose times scatter by a relative standard deviation, that is about
sqrt(2 ln N) deviations behind the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megascale_moe.comm.mesh import Mesh, mesh_of
from megascale_moe.config import Config
from megascale_moe.engine.op import Op
from megascale_moe.model.counts import counts
from megascale_moe.parallel.stages import parts_of_rank, together
from megascale_moe.pipeline.batches import DTYPES, check_batches, micro_batch
from megascale_moe.pipeline.checker import Timeline, timeline
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.pipeline.schedule import Action, in_pairs
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.lists import optimizer_of, plan_of
from megascale_moe.planner.memory import RankBytes, rank_bytes
from megascale_moe.planner.price import Prices
from megascale_moe.planner.stages import Kind, Stages, Took, along, inner, simulated


@dataclass(frozen=True)
class StepPrice:
    """A step of a layout.

    Attributes:
        seconds: until the slowest rank is done. pipeline: of that, the micro-batches through the stages. bubble: the
            fraction of all ranks' pipeline time without work. synchronisation: what gradients, update and weights add.
        waits: of the seconds, what the host takes and what ranks wait for the slowest.
        exposed: seconds in which a rank of the middle of the pipeline waits for communication other than its stages'.
        mfu: of the peak in the compute dtype.
    """

    seconds: float
    pipeline: float
    bubble: float
    synchronisation: float
    waits: float
    exposed: float
    tokens_per_second: float
    mfu: float


def price(config: Config, cluster: Cluster, gpus: int) -> StepPrice:
    """Price the layout of a config.

    Raises:
        ConfigError: it does not fit so many ranks, or the model.
    """
    return Pricer(cluster).layout(config, gpus).price


def memory(config: Config, gpus: int, place: int = 0, cluster: Cluster | None = None) -> RankBytes:
    """What the ranks at a place of the pipeline hold at their peak; the first has most micro-batches under way.

    Args:
        cluster: whose prices decide about orders; without one they are those that a dry run assumes.

    Raises:
        ConfigError: the layout does not fit so many ranks, or the model.
    """
    return Pricer(cluster).layout(config, gpus).bytes(place)


class Pricer:
    """Prices layouts on one cluster, and remembers what they have in common."""

    def __init__(self, cluster: Cluster | None) -> None:
        self.cluster = cluster
        self._stages: dict[Config, Stages] = {}

    def layout(self, config: Config, gpus: int) -> Layout:
        """One layout.

        Raises:
            ConfigError: it does not fit so many ranks, or the model.
        """
        mesh = mesh_of(config.parallel, config.model, gpus)
        check_batches(config, mesh)
        cluster = self.cluster
        prices = Prices.of(cluster, DTYPES[config.train.dtype], mesh) if cluster else None
        plan = plan_of(config, mesh, 0, Profile(prices) if prices else None)
        key = inner(config, mesh.node, mesh.ep, mesh.etp, micro_batch(config, mesh))
        if key not in self._stages:
            self._stages[key] = Stages(plan, key.train, cluster.contention if cluster else 1.0)
        return Layout(config, mesh, plan, self._stages[key], cluster, prices)


@dataclass(frozen=True)
class Layout:
    """One layout on one cluster. `plan` is that of rank 0; whatever its stage, its lists of a part are every rank's."""

    config: Config
    mesh: Mesh
    plan: StepPlan
    stages: Stages
    cluster: Cluster | None
    prices: Prices | None

    @cached_property
    def price(self) -> StepPrice:
        """Of a step."""
        assert self.cluster is not None
        assert self.prices is not None
        times, middle = self.timeline, self.mesh.pp // 2
        synchronisation = max(self.synchronisation(place).seconds for place in {0, middle, self.mesh.pp - 1})
        worked = times.makespan + synchronisation
        waits = self.cluster.host + worked * self.cluster.jitter * math.sqrt(2 * math.log(self.mesh.world))
        exposed = self.synchronisation(middle).exposed + sum(
            self.span(action).exposed for action in self.plan.schedule[middle]
        )
        train, model = self.config.train, self.config.model
        seconds = worked + waits
        tokens = train.global_batch * model.sequence_length / seconds
        peak = self.prices.peak * self.mesh.world
        return StepPrice(
            seconds, times.makespan, times.bubble, synchronisation, waits, exposed, tokens,
            tokens * counts(model).flops_per_token / peak,
        )  # fmt: skip

    def bytes(self, place: int) -> RankBytes:
        """Of the ranks at a place of the pipeline."""
        return rank_bytes(self.stages, self.plan, self.config.train, place)

    @cached_property
    def timeline(self) -> Timeline:
        """Of the pipeline."""
        assert self.prices is not None
        hop = self.prices.hop(self.plan.message.nbytes)
        return timeline(self.plan.schedule, self.mesh.pp, self._duration, hop)

    def span(self, action: Action) -> Took:
        """Of one action."""
        return self.stages.took(self._kind(action), action.phase)

    def _kind(self, action: Action) -> Kind:
        return self._kinds[action.stage]

    @cached_property
    def _kinds(self) -> list[Kind]:
        return [Kind.of(part, self.config.model) for part in self.plan.parts]

    def _duration(self, action: Action) -> float:
        """Of an action; a forward that is woven into the backward behind it takes what both take more."""
        seconds = self.span(action).seconds
        if not action.paired:
            return seconds
        kind, other = self._kind(action), self._kinds[self._partners[action]]
        common = Kind(min(kind.experts, other.experts), min(kind.dense, other.dense), first=False, last=False)
        return max(seconds - self.stages.saved(common), 0.0)

    @cached_property
    def _partners(self) -> Mapping[Action, int]:
        """The stages of the backwards that forwards are woven into."""
        pairs = (pair for actions in self.plan.schedule for pair in in_pairs(actions) if len(pair) == 2)
        return {forward: backward.stage for forward, backward in pairs}

    def synchronisation(self, place: int) -> Took:
        """What a step takes longer than its micro-batches, for the ranks at a place of the pipeline."""
        whole = together(parts_of_rank(self.plan.parts, self.mesh.pp, place))
        if not self.plan.overlap.hides_synchronisation:
            return self._simulated(optimizer_of(self.plan, self.config.train, whole).ops)
        return along(Kind.of(whole, self.config.model), self._hidden)

    def _hidden(self, kind: Kind) -> Took:
        """Among the operators of one micro-batch."""
        stage = self.stages.lists(kind)
        optimizer = optimizer_of(kind.of_model(self.plan), self.config.train, kind.part)
        ops = [*stage.forward, *stage.backward]
        with_it, without = self._simulated(optimizer.hidden(ops)), self._simulated(ops)
        return Took(max(with_it.seconds - without.seconds, 0.0), max(with_it.exposed - without.exposed, 0.0))

    def _simulated(self, ops: Sequence[Op]) -> Took:
        """With the prices of this layout: those of its stages do not know its data parallelism."""
        assert self.prices is not None
        return simulated(ops, self.prices.seconds, self.stages.contention)
