"""How long a training step of a layout takes on a cluster: the lists that would run, priced and simulated.

Nothing is counted in closed form. The lists of each kind of stage are built as a rank builds them, ordered by the same
scheduler with the cluster's prices, and simulated by the executor's rules (`stages`); that gives each action of the
pipeline its duration, and the schedule, executed on these for few micro-batches, the pipeline's.

Synchronisation and update are the optimizer's own list. Behind the step they are simulated alone. Hidden, they are
simulated among the operators of one micro-batch's forward and backward of a rank, and what that takes longer is added.
That is what the executor does at the end of a step (its first gathers and last reductions have one micro-batch to hide
behind, an interleaved stage as many as pass it in a row), except that a rank which waits in the bubble could hide more.

A step ends with its slowest rank (`slowest`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config
from megascale_moe.engine.op import Op
from megascale_moe.engine.order import UNDISTURBED
from megascale_moe.model.counts import counts
from megascale_moe.pipeline.batches import DTYPES, check_batches, micro_batch
from megascale_moe.pipeline.checker import Timeline, timeline
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.pipeline.schedule import Action, Schedule, in_pairs, schedule
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.lists import optimizer_of, plan_of
from megascale_moe.planner.memory import RankBytes, rank_bytes
from megascale_moe.planner.price import Prices
from megascale_moe.planner.stages import Once, StageKind, Stages, Took, along, inner, simulated
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.stages import Part, parts_of_rank, together


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


def price(
    config: Config, cluster: Cluster, gpus: int, *, products: str = "", hides_synchronisation: bool | None = None
) -> StepPrice:
    """Price the layout of a config.

    Args:
        products: the format of products with weights, where it is not the compute dtype ("fp8").
        hides_synchronisation: whether gradients and weights travel behind computation; None: as the config's order
            says. Other systems hide these and no communication of a layer.

    Raises:
        ConfigError: it does not fit so many ranks, or the model.
    """
    return Pricer(cluster, products, hides_synchronisation).layout(config, gpus).price


def slowest(ranks: int) -> float:
    """How many standard deviations the slowest of so many equal ranks is behind their mean: the expected largest of
    normal variables (Blom's approximation, off by 4.5 % for two ranks and by 2.7 % or less for more).
    """
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def memory(config: Config, gpus: int, place: int = 0, cluster: Cluster | None = None) -> RankBytes:
    """Return what the ranks at a place of the pipeline hold at their peak; the first has most micro-batches under way.

    Args:
        cluster: whose prices decide about orders; without one they are those that a dry run assumes.

    Raises:
        ConfigError: the layout does not fit so many ranks, or the model.
    """
    return Pricer(cluster).layout(config, gpus).bytes(place)


class Pricer:
    """Prices layouts on one cluster, and remembers what they have in common."""

    def __init__(self, cluster: Cluster | None, products: str = "", hides_synchronisation: bool | None = None) -> None:
        self.cluster, self.products, self.hides = cluster, products, hides_synchronisation
        self._stages: dict[Config, Stages] = {}

    def layout(self, config: Config, gpus: int) -> PricedLayout:
        """One layout.

        Raises:
            ConfigError: it does not fit so many ranks, or the model.
        """
        mesh = mesh_of(config.parallel, config.model, gpus)
        check_batches(config, mesh)
        cluster = self.cluster
        prices = Prices.of(cluster, DTYPES[config.train.dtype], mesh, self.products) if cluster else None
        plan = plan_of(config, mesh, 0, Profile(prices) if prices else None)
        key = inner(config, mesh.node, mesh.ep, mesh.etp, micro_batch(config, mesh))
        if key not in self._stages:
            self._stages[key] = Stages(plan, key.train, prices, cluster.interference if cluster else UNDISTURBED)
        hides = config.overlap.hides_synchronisation if self.hides is None else self.hides
        return PricedLayout(config, mesh, plan, self._stages[key], cluster, prices, hides)


@dataclass(frozen=True)
class PricedLayout:
    """One layout on one cluster. `plan` is that of rank 0; whatever its stage, its lists of a part are every rank's.

    Attributes:
        hides: whether synchronisation is among the operators of the last micro-batches.
    """

    config: Config
    mesh: Mesh
    plan: StepPlan
    stages: Stages
    cluster: Cluster | None
    prices: Prices | None
    hides: bool
    _once: Once = field(default_factory=Once)

    @cached_property
    def price(self) -> StepPrice:
        """Return the price of a step."""
        assert self.cluster is not None
        assert self.prices is not None
        (pipeline, bubble), middle = self.pipeline, self.mesh.pp // 2
        synchronisation = max(self.synchronisation(place).seconds for place in {0, middle, self.mesh.pp - 1})
        worked = pipeline + synchronisation
        waits = self.cluster.host + worked * self.cluster.jitter * slowest(self.mesh.world)
        mine = self._kinds[middle :: self.mesh.pp]
        waited = self.plan.micros * sum(self.stages.took(kind, phase).exposed for kind in mine for phase in self.phases)
        exposed = self.synchronisation(middle).exposed + max(waited - self.woven(middle), 0.0)
        train, model = self.config.train, self.config.model
        seconds = worked + waits
        tokens = train.global_batch * model.sequence_length / seconds
        peak = self.prices.peak * self.mesh.world
        return StepPrice(
            seconds, pipeline, bubble, synchronisation, waits, exposed, tokens,
            tokens * counts(model).flops_per_token / peak,
        )  # fmt: skip

    def bytes(self, place: int, *, update: bool = True) -> RankBytes:
        """Return what the ranks at a place of the pipeline hold.

        Args:
            update: look at the end of the step, too.
        """
        stages, plan, train, actions = self.stages, self.plan, self.config.train, self._few[-1][place]
        return self._once(
            ("bytes", place, update), lambda: rank_bytes(stages, plan, train, place, actions, update=update)
        )

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of the actions that a micro-batch takes on a stage."""
        return ("F", "B", "W") if self.config.parallel.schedule == "zero_bubble" else ("F", "BW")

    @cached_property
    def timeline(self) -> Timeline:
        """When each action of the whole pipeline runs."""
        return self._executed(self.plan.schedule)

    def _executed(self, actions: Schedule) -> Timeline:
        assert self.prices is not None
        hop = self.prices.hop(self.plan.message.nbytes)
        alone = {
            (stage, phase): seconds
            for phase in self.phases for stage, seconds in enumerate(self._seconds(self._kinds, phase))
        }  # fmt: skip
        if not self.plan.overlap.in_pairs:
            return timeline(actions, self.mesh.pp, lambda each: alone[each.stage, each.phase], hop)
        pairs = [pair for row in actions for pair in in_pairs(row) if len(pair) == 2]
        saved = {pair[0]: self._saved(pair[0].stage, pair[1].stage) for pair in pairs}

        def woven(each: Action) -> float:
            return max(alone[each.stage, each.phase] - saved.get(each, 0.0), 0.0)

        return timeline(actions, self.mesh.pp, woven, hop)

    def woven(self, place: int) -> float:
        """Seconds that a rank of the pipeline waits less in a step, because it works on two micro-batches at once."""
        if not self.plan.overlap.in_pairs:
            return 0.0
        stages = range(place, len(self._kinds), self.mesh.pp)
        return self.plan.micros * sum(self._saved(stage, stage) for stage in stages)

    def _saved(self, forward: int, backward: int) -> float:
        """By weaving a stage's forward into the backward of another's behind it."""
        kind, other = self._kinds[forward], self._kinds[backward]
        common = StageKind(tuple(map(min, kind.layers, other.layers)), first=False, last=False)
        if not common.depth:  # nothing alike to weave
            return 0.0
        return self._once(("saved", common), lambda: self.stages.saved(common))

    @cached_property
    def _few(self) -> list[Schedule]:
        """The schedule of few micro-batches and of a pipeline's depth more; alone the whole one if it has no more."""
        p, pairs = self.config.parallel, self.plan.overlap.in_pairs
        depths = (3, 4) if pairs else (2, 3)  # in pairs, a rank is twice as deep in the warm-up
        if self.plan.micros <= depths[1] * p.pp:
            return [self.plan.schedule]
        return [schedule(p.schedule, p.pp, depth * p.pp, p.virtual_stages, pairs=pairs) for depth in depths]

    @cached_property
    def pipeline(self) -> tuple[float, float]:
        """Seconds of the micro-batches through the stages, and the fraction of all ranks' time without work.

        Between filling and draining a schedule repeats itself: each further micro-batch takes as long as the last.
        """
        times = [self._executed(actions) for actions in self._few]
        found = [(each.makespan, sum(each.busy)) for each in times]
        seconds, busy = found[-1]
        if len(found) > 1:
            more = (self.plan.micros - self._few_micros(-1)) / self.mesh.pp
            seconds, busy = (last + more * (last - first) for first, last in zip(*found, strict=True))
        return seconds, 1 - busy / (self.mesh.pp * seconds)

    @cached_property
    def floor(self) -> float:
        """Seconds below which no execution of the schedule comes: a rank's work, the way to it and the way back.

        Embedding and head are left out, so that their lists are not needed. In pairs no floor is known: what is woven
        takes less.
        """
        if self.plan.overlap.in_pairs:
            return 0.0
        zero_bubble = self.config.parallel.schedule == "zero_bubble"
        kinds = [kind._replace(first=False, last=False) for kind in self._kinds]
        forward, backward = self._seconds(kinds, "F"), self._seconds(kinds, *self.phases[1:])
        back = [0.0 if zero_bubble else seconds for seconds in backward]
        pp, micros = self.mesh.pp, self.plan.micros
        return max(
            micros * sum(forward[place::pp] + backward[place::pp]) + sum(forward[:place] + back[:place])
            for place in range(pp)
        )

    def closer(self) -> Iterator[float]:
        """Seconds that a step takes at least, each closer to its price and longer to find than the one before."""
        yield self.floor
        yield self.pipeline[0]
        yield self.pipeline[0] + self.synchronisation(self.mesh.pp // 2).seconds
        yield self.price.seconds

    def _few_micros(self, which: int) -> int:
        return 1 + max(action.micro for action in self._few[which][0])

    def _seconds(self, kinds: Sequence[StageKind], *phases: str) -> list[float]:
        """Return the seconds of the given actions on each of some stages, few of which differ."""
        found = {kind: sum(self.stages.took(kind, phase).seconds for phase in phases) for kind in set(kinds)}
        return [found[kind] for kind in kinds]

    @cached_property
    def _kinds(self) -> list[StageKind]:
        return [StageKind.of(part, self.config.model) for part in self.plan.parts]

    def synchronisation(self, place: int) -> Took:
        """Return by how much synchronisation and update lengthen a step, for the ranks at a place of the pipeline."""
        whole = together(parts_of_rank(self.plan.parts, self.mesh.pp, place))
        kind = StageKind.of(whole, self.config.model)
        return self._once(kind, lambda: self._synchronised(whole, kind))

    def _synchronised(self, whole: Part, kind: StageKind) -> Took:
        if not self.hides:
            return self._simulated(optimizer_of(self.plan, self.config.train, whole, by_layer=False).ops)
        return along(kind, self._hidden)

    def _hidden(self, kind: StageKind) -> Took:
        """Among the operators of the last micro-batches of a step."""
        assert self.prices is not None
        prices, stage = self.prices, self.stages.lists(kind)
        optimizer = optimizer_of(self.plan, self.config.train, kind.part(self.config.model), by_layer=True)
        ops = [*stage.forward, *stage.backward]
        own, passes = {id(op) for op in ops}, self._passes

        def seconds(op: Op) -> float:
            return prices.seconds(op) * (passes if id(op) in own else 1)

        hidden = [op if id(op) in own else prices.placed(op) for op in optimizer.hidden(ops)]
        with_it, without = (simulated(each, seconds, self.stages.interference) for each in (hidden, ops))
        return Took(max(with_it.seconds - without.seconds, 0.0), max(with_it.exposed - without.exposed, 0.0))

    @property
    def _passes(self) -> int:
        """Micro-batches that pass a stage of a rank before the rank turns to its next stage.

        An interleaved schedule takes pp micro-batches through one stage, then through the next: so far apart are the
        moments at which the gradients of two stages are complete, or the weights of two stages are needed.
        """
        several = self.config.parallel.virtual_stages > 1
        return min(self.mesh.pp, self.plan.micros) if several else 1

    def _simulated(self, ops: Sequence[Op]) -> Took:
        """With the prices of this layout: those of its stages do not know its data parallelism."""
        assert self.prices is not None
        return simulated([self.prices.placed(op) for op in ops], self.prices.seconds, self.stages.interference)
