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
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config
from megascale_moe.engine.op import Op
from megascale_moe.model.counts import counts
from megascale_moe.pipeline.batches import DTYPES, check_batches, micro_batch
from megascale_moe.pipeline.checker import Timeline, timeline
from megascale_moe.pipeline.program import Profile, StepPlan
from megascale_moe.pipeline.schedule import Action, Schedule, in_pairs, schedule
from megascale_moe.planner.cluster import Cluster
from megascale_moe.planner.memory import RankBytes, rank_bytes
from megascale_moe.planner.price import Prices
from megascale_moe.planner.stages import Once, StageKind, Stages, Took, along, optimizer_of, plan_of
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.stages import parts_of_rank, together


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
    """Return how many standard deviations the slowest of so many equal ranks is behind their mean.

    It is the expected largest of normal variables (Blom's approximation, off by 4.5 % for two ranks and by 2.7 % or
    less for more).
    """
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def memory(config: Config, cluster: Cluster, gpus: int, place: int = 0) -> RankBytes:
    """Return what the ranks at a place of the pipeline hold at their peak; the first has most micro-batches under way.

    Raises:
        ConfigError: the layout does not fit so many ranks, or the model.
    """
    return Pricer(cluster).layout(config, gpus).bytes(place)


class Pricer:
    """Prices layouts on one cluster, and remembers what they have in common."""

    def __init__(self, cluster: Cluster, products: str = "", hides_synchronisation: bool | None = None) -> None:
        self.cluster, self.products, self.hides = cluster, products, hides_synchronisation
        self._stages: dict[Config, Stages] = {}

    def layout(self, config: Config, gpus: int) -> PricedLayout:
        """Return one layout.

        Raises:
            ConfigError: it does not fit so many ranks, or the model.
        """
        mesh = mesh_of(config.parallel, config.model, gpus)
        check_batches(config, mesh)
        prices = Prices.of(self.cluster, DTYPES[config.train.dtype], mesh, self.products)
        plan = plan_of(config, mesh, 0, Profile(prices))
        inside = _inside(config, mesh)
        if inside not in self._stages:
            self._stages[inside] = Stages(plan, inside.train, prices)
        hides = config.overlap.hides_synchronisation if self.hides is None else self.hides
        return PricedLayout(config, mesh, plan, self._stages[inside], prices, hides)


def _inside(config: Config, mesh: Mesh) -> Config:
    """Return what of a config decides about the lists of its layers: layouts that agree in it share their stages."""
    rows = micro_batch(config, mesh)
    parallel = replace(
        config.parallel, pp=1, dp=0, node=mesh.node, ep=mesh.ep, etp=mesh.etp, schedule="1f1b", virtual_stages=1,
        stage_layers=(),
    )  # fmt: skip
    train = replace(config.train, global_batch=rows, micro_batch=rows)
    wire = replace(config.wire, gradients="fp32", parameters="fp32")
    return replace(config, parallel=parallel, train=train, wire=wire)


@dataclass(frozen=True)
class PricedLayout:
    """One layout on one cluster. `plan` is that of rank 0; whatever its stage, its lists of a part are every rank's.

    Attributes:
        stages: shared with other layouts, so their prices do not know this one's data parallelism; `prices` do.
        hides: whether synchronisation is among the operators of the last micro-batches.
    """

    config: Config
    mesh: Mesh
    plan: StepPlan
    stages: Stages
    prices: Prices
    hides: bool
    _once: Once = field(default_factory=Once)

    @property
    def cluster(self) -> Cluster:
        """The cluster that it is priced for."""
        return self.prices.cluster

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of the actions that a micro-batch takes on a stage."""
        return ("F", "B", "W") if self.config.parallel.schedule == "zero_bubble" else ("F", "BW")

    @cached_property
    def kinds(self) -> list[StageKind]:
        """Return what each stage of the pipeline consists of."""
        return [StageKind.of(part, self.config.model) for part in self.plan.parts]

    def kinds_of(self, place: int) -> list[StageKind]:
        """Return what the stages of the ranks at a place of the pipeline consist of."""
        return self.kinds[place :: self.mesh.pp]

    @cached_property
    def price(self) -> StepPrice:
        """The price of a step."""
        (pipeline, bubble), middle = self.pipeline, self.mesh.pp // 2
        synchronisation = max(self.synchronisation(place).seconds for place in {0, middle, self.mesh.pp - 1})
        worked = pipeline + synchronisation
        waits = self.cluster.host + worked * self.cluster.jitter * slowest(self.mesh.world)
        waited = self.plan.micros * sum(
            self.stages.took(kind, phase).exposed for kind in self.kinds_of(middle) for phase in self.phases
        )
        exposed = self.synchronisation(middle).exposed + max(waited - self.woven(middle), 0.0)
        model, seconds = self.config.model, worked + waits
        tokens = self.config.train.global_batch * model.sequence_length / seconds
        mfu = tokens * counts(model).flops_per_token / (self.prices.peak * self.mesh.world)
        return StepPrice(seconds, pipeline, bubble, synchronisation, waits, exposed, tokens, mfu)

    def closer(self) -> Iterator[float]:
        """Yield seconds that a step takes at least, each closer to its price and longer to find than the one before."""
        yield self.lower_bound
        yield self.pipeline[0]
        yield self.pipeline[0] + self.synchronisation(self.mesh.pp // 2).seconds
        yield self.price.seconds

    def bytes(self, place: int, *, update: bool = True) -> RankBytes:
        """Return what the ranks at a place of the pipeline hold.

        Args:
            update: look at the end of the step, too.
        """
        train, actions = self.config.train, self._few[-1][place]
        return self._once(
            ("bytes", place, update),
            lambda: rank_bytes(self.stages, self.plan, train, place, actions, update=update),
        )

    # --- the pipeline ------------------------------------------------------------------------------------------------

    @cached_property
    def lower_bound(self) -> float:
        """Seconds that any execution of the schedule takes: a rank's work, the way to it and the way back.

        Embedding and head are left out, so that their lists are not needed. In pairs no bound is known: what is woven
        takes less.
        """
        if self.plan.overlap.in_pairs:
            return 0.0
        kinds = [kind._replace(first=False, last=False) for kind in self.kinds]
        forward, backward = self._seconds(kinds, "F"), self._seconds(kinds, *self.phases[1:])
        back = [0.0] * len(kinds) if self.config.parallel.schedule == "zero_bubble" else backward
        pp, micros = self.mesh.pp, self.plan.micros
        return max(
            micros * sum(forward[place::pp] + backward[place::pp]) + sum(forward[:place] + back[:place])
            for place in range(pp)
        )

    @cached_property
    def pipeline(self) -> tuple[float, float]:
        """Seconds of the micro-batches through the stages, and the fraction of all ranks' time without work.

        Between filling and draining a schedule repeats itself: each further micro-batch takes as long as the last.
        """
        times = [self._executed(actions) for actions in self._few]
        seconds, busy = times[-1].makespan, sum(times[-1].busy)
        if len(times) > 1:
            more = (self.plan.micros - 1 - max(action.micro for action in self._few[-1][0])) / self.mesh.pp
            seconds += more * (seconds - times[0].makespan)
            busy += more * (busy - sum(times[0].busy))
        return seconds, 1 - busy / (self.mesh.pp * seconds)

    @cached_property
    def _few(self) -> list[Schedule]:
        """The schedule of few micro-batches and of a pipeline's depth more; alone the whole one if it has no more."""
        p, pairs = self.config.parallel, self.plan.overlap.in_pairs
        depths = (3, 4) if pairs else (2, 3)  # in pairs, a rank is twice as deep in the warm-up
        if self.plan.micros <= depths[1] * p.pp:
            return [self.plan.schedule]
        return [schedule(p.schedule, p.pp, depth * p.pp, p.virtual_stages, pairs=pairs) for depth in depths]

    @cached_property
    def timeline(self) -> Timeline:
        """When each action of the whole pipeline runs."""
        return self._executed(self.plan.schedule)

    def _executed(self, actions: Schedule) -> Timeline:
        alone = {
            (stage, phase): seconds
            for phase in self.phases for stage, seconds in enumerate(self._seconds(self.kinds, phase))
        }  # fmt: skip
        saved = {
            pair[0]: self._saved(*(self.kinds[each.stage] for each in pair))
            for row in actions if self.plan.overlap.in_pairs for pair in in_pairs(row) if len(pair) == 2
        }  # fmt: skip

        def seconds(each: Action) -> float:
            took = alone[each.stage, each.phase]
            return max(took - saved.get(each, 0.0), 0.0) if saved else took

        return timeline(actions, self.mesh.pp, seconds, self.prices.hop(self.plan.message.nbytes))

    def _seconds(self, kinds: Sequence[StageKind], *phases: str) -> list[float]:
        """Return the seconds of the given actions on each of some stages, few of which differ."""
        found = {kind: sum(self.stages.took(kind, phase).seconds for phase in phases) for kind in set(kinds)}
        return [found[kind] for kind in kinds]

    def woven(self, place: int) -> float:
        """Return by how many seconds a rank waits less in a step, because it works on two micro-batches at once."""
        if not self.plan.overlap.in_pairs:
            return 0.0
        return self.plan.micros * sum(self._saved(kind, kind) for kind in self.kinds_of(place))

    def _saved(self, forward: StageKind, backward: StageKind) -> float:
        """Return the seconds saved by weaving a stage's forward into the backward of another's behind it."""
        common = StageKind(tuple(map(min, forward.layers, backward.layers)), first=False, last=False)
        return self.stages.saved(common) if any(common.layers) else 0.0  # else there is nothing alike to weave

    # --- the end of a step -------------------------------------------------------------------------------------------

    def synchronisation(self, place: int) -> Took:
        """Return by how much synchronisation and update lengthen a step, for the ranks at a place of the pipeline."""
        whole = together(parts_of_rank(self.plan.parts, self.mesh.pp, place))
        kind = StageKind.of(whole, self.config.model)

        def made() -> Took:
            if self.hides:
                return Took(*along(kind, self._hidden))
            ops = optimizer_of(self.plan, self.config.train, whole, by_layer=False).ops
            return Took.of(self.prices.simulated(list(map(self.prices.placed, ops))))

        return self._once(kind, made)

    def _hidden(self, few: StageKind) -> Took:
        """Return how much longer the last micro-batches of a step take with synchronisation among their operators.

        An interleaved schedule takes pp micro-batches through one stage, then through the next: so far apart are the
        moments at which the gradients of two stages are complete, or the weights of two stages are needed.
        """
        stage = self.stages.lists(few)
        optimizer = optimizer_of(self.plan, self.config.train, few.part(self.config.model), by_layer=True)
        ops = [*stage.forward, *stage.backward]
        own = {id(op) for op in ops}
        passes = min(self.mesh.pp, self.plan.micros) if self.config.parallel.virtual_stages > 1 else 1

        def seconds(op: Op) -> float:
            return self.prices.seconds(op) * (passes if id(op) in own else 1)

        hidden = [op if id(op) in own else self.prices.placed(op) for op in optimizer.hidden(ops)]
        with_it, without = (Took.of(self.prices.simulated(each, seconds)) for each in (hidden, ops))
        return Took(max(with_it.seconds - without.seconds, 0.0), max(with_it.exposed - without.exposed, 0.0))
