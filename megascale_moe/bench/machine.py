"""What the ranks at hand can do, measured with all of them at work: operators, messages, and both at once.

Operators are those of the package, as lists run them: layers of a few widths, lengths and numbers of experts, and the
optimizer's list, each rank on its own. So a share includes what an operator does besides its product, and the time of
an operator what the executor takes for it. Messages are the package's exchange, gather and reduce-scatter over the two
axes that a layout has, each behind some computation, as in a step: links and ranks have rested or not as they would
have then. Every figure is the mean over ranks of a median over time.

Nothing here looks at a layout: a layout's time is predicted from these, never fitted.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.bench.shares import LinkFound, Sample, link_of
from megascale_moe.bench.timed import barrier, random_inputs, spread
from megascale_moe.comm.axis import Axes, Axis, single
from megascale_moe.comm.collectives import Pending, all_gather, exchange, reduce_scatter, shift, tag_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megascale_moe.data import Batch
from megascale_moe.engine.executor import Program
from megascale_moe.engine.op import Op, Stream, Work
from megascale_moe.engine.trace import Trace, now
from megascale_moe.kernels.blocks import Fusion
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.groups import flat_groups
from megascale_moe.optim.sharded import ShardedOptimizer
from megascale_moe.pipeline.batches import DTYPES
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.strategies.weights import placements
from megascale_moe.train.trainer import Trainer

FORMULAS = "formulas"
"""The kind of operators that work element by element and declare FLOPs, beside those that only move rows."""
QUARTILES = 1.349
"""Standard deviations of a normal distribution between its quartiles."""
LATE = (3, 6)
"""Messages that are sent beside computation: so many times the latency of the shortest."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Effort:
    """How large and how long.

    Attributes:
        layers: (model, sequences) of the lists that are timed. squares: sides of the products that peaks are of.
        most_bytes: of a message. message_s: seconds of one beyond which no larger one is tried.
        repeats: of a message. list_s: seconds a list is repeated for. piece_s: of computation, for what is compared.
        step_s: about as long as a step takes; what a rank loses in shorter times than that averages out in a step.
    """

    layers: tuple[tuple[ModelConfig, int], ...]
    squares: tuple[int, ...]
    most_bytes: int
    message_s: float = 0.4
    repeats: int = 8
    list_s: float = 2.0
    piece_s: float = 0.15
    step_s: float = 1.0

    @classmethod
    def of(cls, device: torch.device) -> Effort:
        """Return the effort that takes one to three minutes."""
        if device.type == "cuda":
            layers = [(_layer(hidden, length, experts, 16 * hidden // experts), rows) for hidden in (1024, 4096)
                      for length, rows in ((1024, 1), (4096, 1), (4096, 4)) for experts in (8, 32)]  # fmt: skip
            return cls(tuple(layers), (2048, 4096, 8192), 1 << 28, list_s=1.0, step_s=0.3)
        layers = [(_layer(hidden, length, experts, 2 * hidden), rows)
                  for hidden, experts in ((128, 16), (256, 8), (512, 4))
                  for length, rows in ((64, 1), (64, 4), (256, 1), (256, 4), (1024, 1))]  # fmt: skip
        return cls(tuple(layers), (512, 1024), 1 << 22)


def _layer(hidden: int, length: int, experts: int, ffn_hidden: int) -> ModelConfig:
    """One layer with all kinds of operators, in proportions in use."""
    head = 128 if hidden >= 1024 else 32
    return ModelConfig(
        layers=1, hidden=hidden, heads=hidden // head, kv_heads=max(hidden // head // 4, 1), experts=experts, top_k=2,
        ffn_hidden=ffn_hidden, shared_experts=1, vocab=256, sequence_length=length, balance_loss=0.01,
    )  # fmt: skip


@dataclass(frozen=True)
class MachineFigures:
    """Measurements of the machine, the mean of all ranks.

    Attributes:
        peaks: FLOP/s of the best product by dtype. samples: of operators, in `dtype`. overhead: seconds of an operator
            that does nothing. links: by stream; one that the ranks do not have is missing. contention: how many times
            as long computation takes beside a message. jitter: standard deviation of a piece of computation over its
            mean. step: seconds of a training step outside its lists. rings: whether gathers go from
            rank to rank, as those of NCCL do.
    """

    dtype: str
    ranks: int
    node: int
    threads: int
    peaks: dict[str, float]
    samples: list[Sample]
    overhead: float
    links: dict[Stream, LinkFound]
    contention: float
    jitter: float
    step: float
    rings: bool


class MachineMeter:
    """Measures on one rank; all ranks call the same methods in the same order.

    Args:
        axes: of a mesh without pipeline. alone: no other rank takes part (tests of operators).
    """

    def __init__(self, axes: Axes, mesh: Mesh, device: torch.device, dtype: str, effort: Effort | None = None,
                 progress: Progress = lambda what, done, total: None) -> None:
        self.axes, self.mesh, self.device, self.dtype = axes, mesh, device, dtype
        self.effort = effort or Effort.of(device)
        self.progress = progress
        self.world = mesh.world

    def everything(self) -> MachineFigures:
        """All of it. Jitter is looked at three times: what disturbs a machine for seconds is not how it is."""
        peaks = {name: self.peak(DTYPES[name]) for name in DTYPES}
        overhead, jitters = self.overhead(), [self.jitter()]
        samples = self.operators(overhead)
        jitters.append(self.jitter())
        links = self.links()
        jitters.append(self.jitter())
        rings = self.axes["world"].native and self.device.type == "cuda"
        return MachineFigures(
            self.dtype, self.world, self.mesh.node, torch.get_num_threads(), peaks, samples, overhead, links,
            self.contention(links), median(jitters), self.step(), rings,
        )  # fmt: skip

    # --- computation -------------------------------------------------------------------------------------------------

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of the best square product, in the mean of the ranks."""
        best = 0.0
        for side in self.effort.squares:
            work = self._product(side, dtype)
            work()
            barrier(self.world)
            took = self._over_ranks([self._mean_seconds(work, self.effort.list_s / 4)])[0]
            best = max(best, 2.0 * side**3 / took)
            if took > self.effort.list_s / 4:  # a dtype that the processor does not know
                break
        return best

    def overhead(self, count: int = 200) -> float:
        """Seconds that an operator takes which does nothing, from the executor's list."""
        x = torch.ones(1, device=self.device)
        ops = [Op(name=f"nothing {i}", reads=("x",), writes=(f"y{i}",), run=lambda x: x + 1) for i in range(count)]
        program = Program(ops, ["x"])

        def work() -> None:
            program.run({"x": x}, {})

        work()
        barrier(self.world)
        return self._over_ranks([self._mean_seconds(work, self.effort.list_s / 4) / count])[0]

    def operators(self, overhead: float) -> list[Sample]:
        """Operators of layers and of the optimizer; what each takes beyond starting it."""
        Fusion.enabled = self.device.type != "cpu"  # as in training, but for long runs on a CPU
        found = []
        for done, (model, rows) in enumerate(self.effort.layers):
            self.progress("operators", done, len(self.effort.layers))
            ops, seconds = self._timed_layer(model, rows)
            gc.collect()  # weights of one layer may take a fifth of a GPU, and lists refer to themselves
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            for op, took in zip(ops, self._over_ranks(seconds), strict=True):
                sample = _sample(op, took - overhead)
                if sample is not None:
                    found.append(sample)
        self.progress("operators", 1, 1)
        return found

    def _timed_layer(self, model: ModelConfig, rows: int) -> tuple[list[Op], list[float]]:
        """A training step of one layer on a lone rank; each of its operators with its median time."""
        dtype = DTYPES[self.dtype]
        plan = StepPlan(model, ParallelConfig(), single(), dtype, rows, device=self.device)
        weights = placements(model, plan.layout, plan.part)
        groups = flat_groups(weights, plan.axes, dtype, self.device)
        optimizer = ShardedOptimizer(groups, plan.axes, TrainConfig(dtype=self.dtype))  # type: ignore[arg-type]
        random_weights(groups, model.init_std)
        inputs = {name: _to(value, self.device) for name, value in random_inputs(plan, 0).items()}
        lists = (plan.program(), Program(optimizer.ops, optimizer.given(0.0), ["norm"]))
        runs: list[list[float]] = []

        def work() -> None:
            step, update = Trace(device=self.device), Trace(device=self.device)
            lists[0].run(dict(inputs), optimizer.weights, optimizer.gradients, step)
            step.settle()
            for gradient in optimizer.gradients.values():
                gradient.value()
            optimizer.end(float(lists[1].run(optimizer.given(1e-6), {}, trace=update)["norm"]))
            update.settle()
            runs.append([*_apart(step), *_apart(update)])

        work()
        barrier(self.world)
        runs.clear()
        self._mean_seconds(work, self.effort.list_s / 2, least=3)
        return [*lists[0].ops, *lists[1].ops], [median(times) for times in zip(*runs, strict=True)]

    # --- messages ----------------------------------------------------------------------------------------------------

    def links(self) -> dict[Stream, LinkFound]:
        """Return the links inside the node and between nodes, as far as there are any."""
        axes = {Stream.INTRA: self.axes["node"], Stream.INTER: self.axes["tensor_data"]}
        peer = self._peer()
        return {stream: self._link(axis, peer) for stream, axis in axes.items() if axis.size > 1}

    def _link(self, axis: Axis, peer: float) -> LinkFound:
        messages: list[tuple[float, float]] = []
        size, took = 64, 0.0
        sizes = [64, *(1 << power for power in range(12, 64))]
        for size in sizes:
            if size > self.effort.most_bytes or took > self.effort.message_s:
                break
            self.progress(f"messages over {axis.name}", size, self.effort.most_bytes)
            took = fmean(self._message(form, size, axis) for form in (_exchange, _gather, _reduce))
            messages.append((float(size), took))
        return replace(link_of(messages, axis.size - 1, peer), beside=self._late(axis, messages))

    def _message(self, form: Callable[[Tensor, Axis], Pending], size: int, axis: Axis) -> float:
        """Seconds of a collective that sends so many bytes to each peer."""
        x = self._payload(size, axis)
        return self._behind_work(lambda: form(x, axis))

    def _payload(self, size: float, axis: Axis) -> Tensor:
        """Return an operator that sends so many bytes to each peer."""
        dtype = DTYPES[self.dtype]
        return torch.ones(max(int(size) // dtype.itemsize, 1) * axis.size, dtype=dtype, device=self.device)

    def _peer(self) -> float:
        """Seconds that a small exchange takes for each peer beyond the first; over all ranks, at most 8 peers."""
        axis = self.axes["world"]
        most = min(axis.size - 1, 8)
        if most < 2:
            return 0.0
        alone, together = (self._small(axis, peers) for peers in (1, most))
        return max((together - alone) / (most - 1), 0.0)

    def _small(self, axis: Axis, peers: int) -> float:
        """Seconds of a few bytes to so many ranks."""
        send, room = ([torch.ones(16, device=self.device) for _ in range(peers)] for _ in range(2))
        distances, tag = range(1, peers + 1), tag_of(f"profile {peers}")
        return self._behind_work(lambda: shift(send, room, distances, axis, tag), 4 * self.effort.repeats)

    def _behind_work(self, start: Callable[[], Pending], repeats: int = 0) -> float:
        """Median seconds of a communication behind some computation."""
        work, times = self._product(256, torch.float32), []
        for _ in range((repeats or self.effort.repeats) + 1):
            barrier(self.world)
            for _ in range(8):
                work()
            self._synchronize()
            begin = now()
            start().wait()
            self._synchronize()
            times.append(now() - begin)
        return self._over_ranks([median(times[1:])])[0]

    # --- both --------------------------------------------------------------------------------------------------------

    def contention(self, links: Mapping[Stream, LinkFound]) -> float:
        """How many times as long a product takes beside a message, the mean over the links; at least 1."""
        axes = {Stream.INTRA: self.axes["node"], Stream.INTER: self.axes["tensor_data"]}
        ratios = [self._slowed(axes[stream], 2 * self.effort.piece_s * link.rate) for stream, link in links.items()]
        return max(fmean(ratios), 1.0) if ratios else 1.0

    def _late(self, axis: Axis, messages: Sequence[tuple[float, float]]) -> float:
        """Seconds that messages take longer beside computation which ends before them; the mean over some of a few
        times the latency, of which steps have most."""
        late = []
        for times in LATE:
            size, _ = next((each for each in messages if each[1] >= times * messages[0][1]), messages[-1])
            late += [self._later(axis, size, part) for part in (0.4, 0.8)]
        return max(fmean(late), 0.0)

    def _later(self, axis: Axis, size: float, part: float) -> float:
        """A message of so many bytes to each peer, beside computation that takes a part of its time."""
        x = self._payload(size, axis)
        work = self._product(256, torch.float32)
        count = self._calls(work, part * self._behind_work(lambda: _exchange(x, axis), 2))

        def sent(calls: int) -> float:
            begin = now()
            pending = _exchange(x, axis)
            for _ in range(calls):
                work()
            pending.wait()
            self._synchronize()
            return now() - begin

        alone, beside = self._rounds(2 * self.effort.repeats, lambda: sent(0), lambda: sent(count))
        return self._over_ranks([beside - alone])[0]

    def _slowed(self, axis: Axis, sent: float) -> float:
        """By a message of so many bytes."""
        x = self._payload(sent / (axis.size - 1), axis)
        work = self._product(self.effort.squares[0], DTYPES[self.dtype])
        count = self._calls(work, 0.7 * self._behind_work(lambda: _exchange(x, axis), 2))

        def computed() -> float:
            begin = now()
            for _ in range(count):
                work()
            self._synchronize()
            return now() - begin

        def computed_beside() -> float:
            pending = _exchange(x, axis)
            took = computed()
            pending.wait()
            return took

        alone, beside = self._rounds(self.effort.repeats, computed, computed_beside)
        return self._over_ranks([beside / alone])[0]

    def jitter(self) -> float:
        """Standard deviation, over ranks and times, of a step's worth of computation, over its mean. By quartiles: what
        disturbs a machine now and then is not how it is.
        """
        work = self._product(self.effort.squares[0], DTYPES[self.dtype])
        count = self._calls(work, self.effort.step_s)
        times = []
        for _ in range(self.effort.repeats):
            barrier(self.world)
            begin = now()
            for _ in range(count):
                work()
            self._synchronize()
            times.append(now() - begin)
        middle, deviation = median(times), spread(times) / QUARTILES
        mean, square = self._over_ranks([middle, middle**2 + deviation**2])
        return math.sqrt(max(square - mean**2, 0.0)) / mean

    def step(self) -> float:
        """Seconds of a training step outside its lists: batches to the device, numbers that all ranks add up."""
        node = self.mesh.node
        model = ModelConfig(layers=1, hidden=64 * node, heads=4 * node, kv_heads=2 * node, experts=2 * node, top_k=2,
                            ffn_hidden=64, vocab=256, sequence_length=16 * node)  # fmt: skip
        train = TrainConfig(global_batch=self.world // node, micro_batch=1, dtype=self.dtype,  # type: ignore[arg-type]
                            steps=100, compile="off", device=self.device.type)  # type: ignore[arg-type]  # fmt: skip
        config = Config(model=model, train=train, parallel=ParallelConfig(node=node))
        trainer = Trainer(config, self.mesh, self.axes, self.device)
        trainer.initialise(0)
        tokens = torch.zeros(1, model.sequence_length, dtype=torch.long)
        batch = Batch(tokens, tokens, (0, model.sequence_length))
        outside = []
        for _ in range(2 * self.effort.repeats + 1):
            barrier(self.world)
            begin = now()
            trace = trainer.step([batch], tokens.numel() * train.global_batch).trace
            took = now() - begin
            inside = 0.0
            for first, last in _lists(trace.events):
                inside += last - first
            outside.append(took - inside)
        return self._over_ranks([median(outside[1:])])[0]

    # --- clocks ------------------------------------------------------------------------------------------------------

    def _rounds(self, count: int, *works: Callable[[], float]) -> list[float]:
        """The median of what each returns, seconds; all of them once in every round, behind a barrier."""
        found: list[list[float]] = [[] for _ in works]
        for _ in range(count):
            for times, work in zip(found, works, strict=True):
                barrier(self.world)
                times.append(work())
        return [median(times) for times in found]

    def _calls(self, work: Callable[[], object], seconds: float) -> int:
        """How often to call it for so many seconds, the same on all ranks."""
        return max(round(self._over_ranks([seconds / self._mean_seconds(work, self.effort.piece_s)])[0]), 1)

    def _product(self, side: int, dtype: torch.dtype) -> Callable[[], object]:
        a, b = (torch.full((side, side), 0.5, dtype=dtype, device=self.device) for _ in range(2))
        return lambda: a @ b

    def _mean_seconds(self, work: Callable[[], object], least_s: float, least: int = 1) -> float:
        """Return the seconds of one call, over at least so many seconds and calls; ranks may differ in their number."""
        self._synchronize()
        begin, count = now(), 0
        while count < least or now() - begin < least_s:
            work()
            self._synchronize()
            count += 1
        return (now() - begin) / count

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _over_ranks(self, values: Sequence[float]) -> list[float]:
        """The mean of each."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return [float(value) / self.world for value in total]


def random_weights(groups: Iterable[FlatWeights], deviation: float) -> None:
    """Fill weights where they lie, vectors with ones: a CPU would draw the billions of a GPU's for minutes."""
    for group in groups:
        for slot in group.slots:
            value = torch.ones(slot.placement.shape, device=group.master.device)
            group.set(slot, value if value.dim() == 1 else value.normal_(0.0, deviation))


def _apart(trace: Trace) -> list[float]:
    """Seconds from the end of each operator to that of the next: with all that starting it takes."""
    ends = [event.end for event in trace.events]
    return [end - begin for begin, end in zip([trace.events[0].start, *ends], ends, strict=False)]


def _sample(op: Op, seconds: float) -> Sample | None:
    """Return the sample that an operator gives; None if it declares no work, or too little to be seen."""
    cost = op.cost
    if cost.work == Work.ROWS:
        kind = FORMULAS if cost.flops else str(Work.ROWS)
        size = work = cost.memory_bytes
    else:
        kind, size, work = str(cost.work), cost.size, cost.flops
    return Sample(kind, size, work, seconds) if work > 0 and seconds > 0 else None


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_to(part, device) for part in value) if isinstance(value, tuple) else value


def _exchange(x: Tensor, axis: Axis) -> Pending:
    parts = list(x.chunk(axis.size))
    return exchange(parts, [torch.empty_like(part) for part in parts], axis, tag_of("profile exchange"))


def _gather(x: Tensor, axis: Axis) -> Pending:
    return all_gather(x[: len(x) // axis.size], axis, tag_of("profile gather"))


def _reduce(x: Tensor, axis: Axis) -> Pending:
    return reduce_scatter(x, axis, tag_of("profile reduce"))


def _lists(events: Sequence[Any]) -> Iterable[tuple[float, float]]:
    """Begin and end of the step's list and of the optimizer's in a trace."""
    split = next(place for place, event in enumerate(events) if event.name.startswith(("gradients.", "update.")))
    for part in (events[:split], events[split:]):
        yield min(event.start for event in part), max(event.end for event in part)
