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
from functools import partial
from itertools import pairwise
from statistics import fmean, median

import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.bench.shares import Sample, link_of
from megascale_moe.bench.timed import barrier, spread
from megascale_moe.comm.axis import Axes, Axis, single
from megascale_moe.comm.collectives import Pending, all_gather, exchange, reduce_scatter, shift, tag_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megascale_moe.data import Batch
from megascale_moe.engine.executor import Program
from megascale_moe.engine.op import Op, Stream, Work
from megascale_moe.engine.trace import Event, now
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.pipeline.batches import DTYPES
from megascale_moe.planner.cluster import Link
from megascale_moe.train.progress import Update, silent
from megascale_moe.train.trainer import Trainer

FORMULAS = "formulas"
"""The kind of operators that work element by element and declare FLOPs, beside those that only move rows."""
QUARTILES = 1.349
"""Standard deviations of a normal distribution between its quartiles."""
LATE = (3, 6)
"""Messages that are sent beside computation: so many times the latency of the shortest."""


@dataclass(frozen=True)
class Effort:
    """Sizes and times of what is measured.

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
        cuda = device.type == "cuda"
        widths = [(128, 16, 256), (256, 8, 512), (512, 4, 1024)]  # hidden, experts, ffn_hidden
        shapes = [(64, 1), (64, 4), (256, 1), (256, 4), (1024, 1)]  # sequence_length, sequences
        if cuda:
            widths = [(hidden, experts, 16 * hidden // experts) for hidden in (1024, 4096) for experts in (8, 32)]
            shapes = [(1024, 1), (4096, 1), (4096, 4)]
        layers = []
        for hidden, experts, ffn_hidden in widths:  # all kinds of operators, in proportions in use
            heads = hidden // (128 if cuda else 32)
            model = ModelConfig(
                layers=1, hidden=hidden, heads=heads, kv_heads=max(heads // 4, 1), experts=experts, top_k=2,
                ffn_hidden=ffn_hidden, shared_experts=1, vocab=256, balance_loss=0.01,
            )  # fmt: skip
            layers += [(replace(model, sequence_length=length), rows) for length, rows in shapes]
        if cuda:
            return cls(tuple(layers), (2048, 4096, 8192), 1 << 28, list_s=1.0, step_s=0.3)
        return cls(tuple(layers), (512, 1024), 1 << 22)


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
    links: dict[Stream, Link]
    contention: float
    jitter: float
    step: float
    rings: bool


class MachineMeter:
    """Measures on one rank; all ranks call the same methods in the same order.

    Args:
        axes: of a mesh without pipeline.
    """

    def __init__(
        self, axes: Axes, mesh: Mesh, device: torch.device, dtype: str, effort: Effort | None = None,
        progress: Update = silent,
    ) -> None:  # fmt: skip
        self.axes, self.mesh, self.device, self.dtype = axes, mesh, device, dtype
        self.effort = effort or Effort.of(device)
        self.progress = progress
        self.world = mesh.world
        streams = {Stream.INTRA: axes["node"], Stream.INTER: axes["tensor_data"]}
        self.links_of = {stream: axis for stream, axis in streams.items() if axis.size > 1}

    def everything(self) -> MachineFigures:
        """Measure all of it. Jitter is looked at three times: what disturbs a machine for seconds is not how it is."""
        peaks = {name: self.peak(dtype) for name, dtype in DTYPES.items()}
        overhead, jitters = self.overhead(), [self.jitter()]
        samples = self.operators(overhead)
        jitters.append(self.jitter())
        links = self.links()
        jitters.append(self.jitter())
        return MachineFigures(
            self.dtype, self.world, self.mesh.node, torch.get_num_threads(), peaks, samples, overhead, links,
            self.contention(links), median(jitters), self.step(),
            rings=self.axes["world"].native and self.device.type == "cuda",
        )  # fmt: skip

    # --- computation -------------------------------------------------------------------------------------------------

    def peak(self, dtype: torch.dtype) -> float:
        """Return FLOP/s of the best square product, in the mean of the ranks."""
        best, enough = 0.0, self.effort.list_s / 4
        for side in self.effort.squares:
            took = self._mean_seconds(self._product(side, dtype), enough)
            best = max(best, 2.0 * side**3 / took)
            if took > enough:  # a dtype that the processor does not know
                break
        return best

    def overhead(self, count: int = 200) -> float:
        """Return the seconds that an operator takes which does nothing, from the executor's list."""
        x = torch.ones(1, device=self.device)
        ops = [Op(name=f"nothing {i}", reads=("x",), writes=(f"y{i}",), run=lambda x: x + 1) for i in range(count)]
        program = Program(ops, ["x"])
        return self._mean_seconds(lambda: program.run({"x": x}, {}), self.effort.list_s / 4) / count

    def operators(self, overhead: float) -> list[Sample]:
        """Return operators of layers and of the optimizer, with what each takes beyond starting it."""
        samples = []
        for done, (model, rows) in enumerate(self.effort.layers):
            self.progress("operators", done, len(self.effort.layers))
            ops, seconds = self._timed_layer(model, rows)
            gc.collect()  # weights of one layer may take a fifth of a GPU, and lists refer to themselves
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            samples += [_sample(op, took - overhead) for op, took in zip(ops, self._over_ranks(seconds), strict=True)]
        self.progress("operators", 1, 1)
        return [sample for sample in samples if sample.work > 0 and sample.seconds > 0]

    def _timed_layer(self, model: ModelConfig, rows: int) -> tuple[list[Op], list[float]]:
        """Train one layer on a lone rank; return the operators of a step with their median seconds."""
        train = TrainConfig(global_batch=rows, micro_batch=rows, dtype=self.dtype, steps=100,  # type: ignore[arg-type]
                            learning_rate=1e-6, device=self.device.type)  # type: ignore[arg-type]  # fmt: skip
        trainer = Trainer(Config(model=model, train=train), Mesh(), single(), self.device)
        random_weights(trainer.optimizer.groups, model.init_std)
        step, runs = _training_step(trainer), list[list[float]]()
        self._mean_seconds(
            lambda: runs.append([took for events in step() for took in _apart(events)]), self.effort.list_s / 2, least=3
        )
        ops = [*trainer.program(rows, 1, "train")[1].ops, *trainer.optimizer.ops]
        return ops, [median(times) for times in zip(*runs[1:], strict=True)]

    # --- messages ----------------------------------------------------------------------------------------------------

    def links(self) -> dict[Stream, Link]:
        """Return the links inside the node and between nodes, as far as there are any."""
        peer = self._peer()
        return {stream: self._link(axis, peer) for stream, axis in self.links_of.items()}

    def _link(self, axis: Axis, peer: float) -> Link:
        messages: list[tuple[float, float]] = []
        size = 64
        while size <= self.effort.most_bytes and (not messages or messages[-1][1] <= self.effort.message_s):
            self.progress(f"messages over {axis.name}", size, self.effort.most_bytes)
            x = self._payload(size, axis)
            took = fmean(self._behind_work(partial(form, x, axis)) for form in (_exchange, _gather, _reduce))
            messages.append((float(size), took))
            size = max(2 * size, 1 << 12)
        return replace(link_of(messages, axis.size - 1, peer), beside=self._late(axis, messages))

    def _payload(self, size: float, axis: Axis) -> Tensor:
        """Return what an exchange sends as so many bytes to each peer."""
        dtype = DTYPES[self.dtype]
        return torch.ones(max(int(size) // dtype.itemsize, 1) * axis.size, dtype=dtype, device=self.device)

    def _peer(self) -> float:
        """Return the seconds that a small exchange takes for each peer beyond the first; over all ranks, at most 8."""
        axis = self.axes["world"]
        most = min(axis.size - 1, 8)
        if most < 2:
            return 0.0

        def seconds(peers: int) -> float:
            send, room = ([torch.ones(16, device=self.device) for _ in range(peers)] for _ in range(2))
            distances, tag = range(1, peers + 1), tag_of(f"profile {peers}")
            return self._behind_work(lambda: shift(send, room, distances, axis, tag), 4 * self.effort.repeats)

        return max((seconds(most) - seconds(1)) / (most - 1), 0.0)

    def _behind_work(self, start: Callable[[], Pending], repeats: int = 0) -> float:
        """Return median seconds of a communication behind some computation."""
        work = self._product(256, torch.float32)

        def sent() -> float:
            _repeat(work, 8)
            self._synchronize()
            return self._seconds(lambda: start().wait())

        return self._rounds(repeats or self.effort.repeats, sent)[0]

    # --- both --------------------------------------------------------------------------------------------------------

    def contention(self, links: Mapping[Stream, Link]) -> float:
        """Return how many times as long a product takes beside a message, the mean over the links; at least 1."""
        sent = 2 * self.effort.piece_s
        ratios = [self._slowed(self.links_of[stream], sent * link.rate) for stream, link in links.items()]
        return max(fmean(ratios), 1.0) if ratios else 1.0

    def _slowed(self, axis: Axis, sent: float) -> float:
        """Return how many times as long a product takes beside a message of so many bytes."""
        x = self._payload(sent / (axis.size - 1), axis)
        work = self._product(self.effort.squares[0], DTYPES[self.dtype])
        compute = self._lasting(work, 0.7 * self._behind_work(lambda: _exchange(x, axis), 2))

        def beside() -> float:
            pending = _exchange(x, axis)
            took = self._seconds(compute)
            pending.wait()
            return took

        bare, slowed = self._rounds(self.effort.repeats, lambda: self._seconds(compute), beside)
        return slowed / bare

    def _late(self, axis: Axis, messages: Sequence[tuple[float, float]]) -> float:
        """Return the seconds that messages take longer beside computation which ends before them.

        It is the mean over some of a few times the latency, of which steps have most.
        """
        late = []
        for times in LATE:
            size, _ = next((each for each in messages if each[1] >= times * messages[0][1]), messages[-1])
            late += [self._later(axis, size, share) for share in (0.4, 0.8)]
        return max(fmean(late), 0.0)

    def _later(self, axis: Axis, size: float, share: float) -> float:
        """Send so many bytes to each peer, beside computation that takes a share of their time."""
        x = self._payload(size, axis)
        taken = share * self._behind_work(lambda: _exchange(x, axis), 2)
        compute = self._lasting(self._product(256, torch.float32), taken)

        def sent(meanwhile: Callable[[], object]) -> float:
            begin, pending = now(), _exchange(x, axis)
            meanwhile()
            pending.wait()
            self._synchronize()
            return now() - begin

        alone, beside = self._rounds(2 * self.effort.repeats, lambda: sent(lambda: None), lambda: sent(compute))
        return beside - alone

    def jitter(self) -> float:
        """Return the standard deviation, over ranks and times, of a step's worth of computation, over its mean.

        By quartiles: what disturbs a machine now and then is not how it is.
        """
        compute = self._lasting(self._product(self.effort.squares[0], DTYPES[self.dtype]), self.effort.step_s)
        times = []
        for _ in range(self.effort.repeats):
            barrier(self.world)
            times.append(self._seconds(compute))
        middle, deviation = median(times), spread(times) / QUARTILES
        mean, square = self._over_ranks([middle, middle**2 + deviation**2])
        return math.sqrt(max(square - mean**2, 0.0)) / mean

    def step(self) -> float:
        """Return the seconds of a training step outside its lists: batches to the device, sums over all ranks."""
        node = self.mesh.node
        model = ModelConfig(layers=1, hidden=64 * node, heads=4 * node, kv_heads=2 * node, experts=2 * node, top_k=2,
                            ffn_hidden=64, vocab=256, sequence_length=16 * node)  # fmt: skip
        train = TrainConfig(global_batch=self.world // node, micro_batch=1, dtype=self.dtype,  # type: ignore[arg-type]
                            steps=100, compile="off", device=self.device.type)  # type: ignore[arg-type]  # fmt: skip
        config = Config(model=model, train=train, parallel=ParallelConfig(node=node))
        trainer = Trainer(config, self.mesh, self.axes, self.device)
        trainer.initialise(0)
        step = _training_step(trainer)

        def outside() -> float:
            begin = now()
            lists = step()
            took = now() - begin
            return took - sum(max(e.end for e in events) - min(e.start for e in events) for events in lists)

        return self._rounds(2 * self.effort.repeats, outside)[0]

    # --- clocks ------------------------------------------------------------------------------------------------------

    def _rounds(self, count: int, *works: Callable[[], float]) -> list[float]:
        """Return the median of what each returns, the mean of the ranks.

        All are called once in every round, behind a barrier; the first round warms up.
        """
        results: list[list[float]] = [[] for _ in works]
        for _ in range(count + 1):
            for values, work in zip(results, works, strict=True):
                barrier(self.world)
                values.append(work())
        return self._over_ranks([median(values[1:]) for values in results])

    def _lasting(self, work: Callable[[], object], seconds: float) -> Callable[[], None]:
        """Return `work` so many times over that it takes so many seconds, equally many on all ranks."""
        count = round(seconds / self._mean_seconds(work, self.effort.piece_s))
        return partial(_repeat, work, max(count, 1))

    def _product(self, side: int, dtype: torch.dtype) -> Callable[[], object]:
        a, b = (torch.full((side, side), 0.5, dtype=dtype, device=self.device) for _ in range(2))
        return lambda: a @ b

    def _mean_seconds(self, work: Callable[[], object], least_s: float, least: int = 1) -> float:
        """Return the mean seconds of a call over all ranks, after one that warms up.

        Each rank calls at least `least` times, and for at least `least_s` seconds.
        """
        work()
        barrier(self.world)
        self._synchronize()
        begin, count = now(), 0
        while count < least or now() - begin < least_s:
            work()
            self._synchronize()
            count += 1
        return self._over_ranks([(now() - begin) / count])[0]

    def _seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds of one call, until the device is done."""
        begin = now()
        work()
        self._synchronize()
        return now() - begin

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each over the ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return (total / self.world).tolist()


def _repeat(work: Callable[[], object], count: int) -> None:
    for _ in range(count):
        work()


def random_weights(groups: Iterable[FlatWeights], deviation: float) -> None:
    """Fill weights where they lie, vectors with ones: a CPU would draw the billions of a GPU's for minutes."""
    for group in groups:
        for slot in group.slots:
            value = torch.ones(slot.placement.shape, device=group.master.device)
            group.set(slot, value if value.dim() == 1 else value.normal_(0.0, deviation))


def _training_step(trainer: Trainer) -> Callable[[], tuple[list[Event], list[Event]]]:
    """Return a function that trains a step on random tokens; it returns the events of the step and of the optimizer."""
    train, model = trainer.config.train, trainer.model
    tokens = torch.randint(model.vocab, (train.micro_batch, model.sequence_length), generator=torch.Generator())
    batch = Batch(tokens, tokens.roll(-1, 1), tuple(range(0, tokens.numel() + 1, model.sequence_length)))

    def step() -> tuple[list[Event], list[Event]]:
        events = trainer.step([batch], train.global_batch * model.sequence_length).trace.events
        split = next(i for i, event in enumerate(events) if event.name.startswith(("gradients.", "update.")))
        return events[:split], events[split:]

    return step


def _apart(events: Sequence[Event]) -> list[float]:
    """Return the seconds from the end of each operator to that of the next: with all that starting it takes."""
    return [after - before for before, after in pairwise([events[0].start, *(event.end for event in events)])]


def _sample(op: Op, seconds: float) -> Sample:
    """Return the sample that an operator gives."""
    cost = op.cost
    if cost.work == Work.ROWS:
        kind = FORMULAS if cost.flops else str(Work.ROWS)
        size = work = cost.memory_bytes
    else:
        kind, size, work = str(cost.work), cost.size, cost.flops
    return Sample(kind, size, work, seconds)


def _exchange(x: Tensor, axis: Axis) -> Pending:
    parts = list(x.chunk(axis.size))
    return exchange(parts, [torch.empty_like(part) for part in parts], axis, tag_of("profile exchange"))


def _gather(x: Tensor, axis: Axis) -> Pending:
    return all_gather(x[: len(x) // axis.size], axis, tag_of("profile gather"))


def _reduce(x: Tensor, axis: Axis) -> Pending:
    return reduce_scatter(x, axis, tag_of("profile reduce"))
