"""The list of a step: what the schedule says, messages that meet, buffers that live as long as needed and no longer.

Most is looked at on stages of three operators made by hand, one per phase; the model's own lists follow at the end.
Nothing is sent: operators that would are run with `send` and `receive` replaced by what writes down their arguments.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from megascale_moe.comm.axis import Axis, axes_of
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig
from megascale_moe.engine.executor import Program
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Op, Phase, Stream, backward
from megascale_moe.pipeline import step
from megascale_moe.pipeline.checker import peak_in_flight
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.schedule import Action, Schedule, forward_only, schedule
from megascale_moe.pipeline.step import SHARED, Message, Stage, of_micro, step_ops
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import INPUTS, model_ops
from tests.pipeline.plans import drawn

Case = tuple[str, int, int, int]  # name, pp, micros, virtual stages
CASES: list[Case] = [
    *((name, pp, micros, 1) for name in ("1f1b", "zero_bubble") for pp in (1, 2, 3, 4, 8) for micros in (1, 2, 5, 12)),
    *(("interleaved", pp, times * pp, virtual) for pp in (1, 2, 3, 4) for times in (1, 3) for virtual in (2, 3)),
]
MESSAGE = Message((6, 4), torch.float32, torch.device("cpu"))
RUN: Callable[..., Any] = lambda *_: None  # noqa: E731


def stage_of(index: int, last: int) -> Stage:
    """Operators "2F", "2B" and "2W"; F keeps "kept_2", which W is the last to read, B leaves "slope_2" for W."""
    reads = f"hidden_{index}" if index else ""
    writes = f"hidden_{index + 1}" if index < last else ""
    kept, slope = f"kept_{index}", f"slope_{index}"
    forward = Op(name=f"{index}F", reads=(reads or "tokens",), writes=(writes or "loss", kept), run=RUN)
    back = [
        Op(name=f"{index}B", reads=(kept, grad(writes) if writes else ""), phase=Phase.B, run=RUN,
           writes=(grad(reads), slope) if reads else (slope,)),
        Op(name=f"{index}W", reads=(kept, slope), writes=(), phase=Phase.W, run=RUN),
    ]  # fmt: skip
    return Stage([forward], back, reads, writes)


def lists_of(actions: Schedule, virtual: int) -> list[list[Op]]:
    """The list of every rank."""
    pp = len(actions)
    last = pp * virtual - 1
    stages = {index: stage_of(index, last) for index in range(last + 1)}
    return [step_ops(actions, stages, last, Axis("pp", pp, rank), MESSAGE) for rank in range(pp)]


def case_lists(case: Case) -> list[list[Op]]:
    return lists_of(schedule(*case), case[3])


def work_of(op: Op) -> Action | None:
    """The action that a made-up operator is (a half of); None for messages."""
    if not op.name[0].isdigit():
        return None
    name = next(name for name in (*op.reads, *op.writes) if name)
    return Action(int(op.name[:-1]), op.name[-1], int(name.split("/")[0]))


def halves(action: Action) -> list[Action]:
    return [replace(action, phase=phase) for phase in action.phase]


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_actions_in_the_order_of_the_schedule(case: Case) -> None:
    """So in zero_bubble a W operator stands in its W action and nowhere else."""
    for ops, actions in zip(case_lists(case), schedule(*case), strict=True):
        wanted = [half for action in actions for half in halves(action)]
        assert [action for op in ops if (action := work_of(op))] == wanted


@pytest.mark.parametrize("case", CASES, ids=str)
def test_receives_stand_one_action_before_their_use(case: Case) -> None:
    """They travel while that action computes; earlier they would only hold memory."""
    for ops, actions in zip(case_lists(case), schedule(*case), strict=True):
        place = {half: index for index, action in enumerate(actions) for half in halves(action)}
        reader = {name: place[action] for op in ops if (action := work_of(op)) for name in op.reads}
        begun = 0
        for op in ops:
            if action := work_of(op):
                begun = place[action] + 1
            elif op.name.startswith("receive"):
                assert begun == max(reader[op.writes[0]] - 1, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sends_follow_their_action_at_once(case: Case) -> None:
    for ops in case_lists(case):
        action = None
        for op in ops:
            action = work_of(op) or action
            if op.name.startswith("send"):
                assert action is not None
                # A BW sends at its end, behind its half W, what a B sends.
                whole = action.phase == "W" and case[0] != "zero_bubble"
                assert op.writes[0] == f"sent:{replace(action, phase='B') if whole else action}"


# --- messages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A message as one of its two ends describes it."""

    source: int
    target: int
    tag: int
    nbytes: int
    backward: bool


def messages(ops: Iterable[Op], rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Sent], list[Sent]]:
    """What a rank sends and what it receives, by running those operators."""
    sent: list[Sent] = []
    received: list[Sent] = []

    def send(x: torch.Tensor, peer: int, axis: Axis, tag: int, *, backward: bool) -> None:
        sent.append(Sent(rank, peer, tag, x.nbytes, backward))

    def receive(out: torch.Tensor, peer: int, axis: Axis, tag: int, *, backward: bool) -> None:
        received.append(Sent(peer, rank, tag, out.nbytes, backward))

    monkeypatch.setattr(step, "send", send)
    monkeypatch.setattr(step, "receive", receive)
    for op in ops:
        if op.name.startswith("send"):
            op.run(torch.empty(MESSAGE.shape, dtype=MESSAGE.dtype))
            assert op.cost.wire_bytes == sent[-1].nbytes
        elif op.name.startswith("receive"):
            op.run()
    return sent, received


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_send_has_exactly_one_receive(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same tag, bytes and direction, on the rank that it goes to; and no two messages share a tag."""
    _, pp, micros, virtual = case
    sent, received = [], []
    for rank, ops in enumerate(case_lists(case)):
        out, into = messages(ops, rank, monkeypatch)
        sent += out
        received += into
        assert all(message.target != rank for message in out)
    assert Counter(sent) == Counter(received)
    assert len({message.tag for message in sent}) == len(sent)
    borders = pp * virtual - 1 if pp > 1 else 0  # every border of stages is one of ranks, crossed both ways
    assert len(sent) == 2 * borders * micros


def test_no_two_messages_of_a_long_step_share_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tag is a checksum of 31 bits, so only likely to be another one; a pair of ranks has a few hundred alive."""
    lists = case_lists(("interleaved", 8, 64, 4))
    sent = [message for rank, ops in enumerate(lists) for message in messages(ops, rank, monkeypatch)[0]]
    by_pair = Counter((message.source, message.target, message.tag) for message in sent)
    assert len(sent) == 2 * (8 * 4 - 1) * 64
    assert max(by_pair.values()) == 1


def test_evaluation_sends_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = lists_of(forward_only(3, 2), 2)
    found = [messages(ops, rank, monkeypatch) for rank, ops in enumerate(lists)]
    assert Counter(message for out, _ in found for message in out) == Counter(m for _, into in found for m in into)
    assert [len(out) for out, _ in found] == [2, 2, 1]
    assert not any(message.backward for out, _ in found for message in out)


def test_messages_to_the_same_rank_are_none() -> None:
    for ops in (*case_lists(("interleaved", 1, 3, 3)), *case_lists(("1f1b", 1, 3, 1))):
        assert all(work_of(op) for op in ops)


# --- when a send is let go -------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One execution of all lists with given durations: what the executor does, with time instead of values."""

    lists: list[list[Op]]
    duration: Callable[[], float]

    def __post_init__(self) -> None:
        self.clock = [0.0] * len(self.lists)
        self.arrival: dict[str, float] = {}  # by name of the value
        self.consumed: dict[str, float] = {}  # by name, when what reads it was done on the receiving rank
        self.waited: list[tuple[str, float]] = []  # name, when its sender let go of it
        self.finished = self._execute()

    def _execute(self) -> bool:
        position, travelling = [0] * len(self.lists), {}
        progress = True
        while progress:
            progress = False
            for rank, ops in enumerate(self.lists):
                while position[rank] < len(ops) and self._runs(rank, ops[position[rank]], travelling):
                    position[rank] += 1
                    progress = True
        return all(done == len(ops) for done, ops in zip(position, self.lists, strict=True))

    def _runs(self, rank: int, op: Op, travelling: dict[str, str]) -> bool:
        """Run an operator unless it has to wait for another rank."""
        if op.name.startswith("receive"):
            return True
        if op.name.startswith("send"):
            travelling[op.writes[0]] = op.reads[0]
            self.arrival[op.reads[0]] = self.clock[rank] + self.duration()
            return True
        if op.name == "sent":  # as a link that keeps nothing: over when the other side has it
            name = travelling[op.reads[0]]
            if name not in self.consumed:
                return False
            self.waited.append((op.reads[0], max(self.consumed[name] - self.clock[rank], 0.0)))
            self.clock[rank] = max(self.clock[rank], self.consumed[name])
            return True
        needed = [name for name in op.reads if name in self.remote(rank)]
        if any(name not in self.arrival for name in needed):
            return False
        self.clock[rank] = max([self.clock[rank], *(self.arrival[name] for name in needed)]) + self.duration()
        self.consumed |= dict.fromkeys(needed, self.clock[rank])
        return True

    def remote(self, rank: int) -> set[str]:
        return {op.writes[0] for op in self.lists[rank] if op.name.startswith("receive")}


@pytest.mark.parametrize("case", [case for case in CASES if case[1] > 1 and case[2] <= 12], ids=str)
def test_a_send_is_let_go_after_its_receiver_ran(case: Case) -> None:
    """For any timing, and without waiting, except at the end of the list, where nothing is left that could be late.

    Here a send is over only when its message was read, later than on any real link; still nobody is ever held up
    before the end, nor for ever.
    """
    lists = case_lists(case)
    at_the_end = set()
    for ops in lists:
        end = max(index for index, op in enumerate(ops) if work_of(op))
        at_the_end |= {op.reads[0] for op in ops[end:] if op.name == "sent"}
    chooser = random.Random(str(case))
    for _ in range(8):
        run = Run(lists, lambda: chooser.expovariate(1.0))
        assert run.finished
        assert [token for token, late in run.waited if late and token not in at_the_end] == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_send_is_let_go_once_and_soon(case: Case) -> None:
    """Buffers on their way are bounded by the micro-batches in flight, whatever the length of the step."""
    name, pp, micros, virtual = case
    for ops, peak in zip(case_lists(case), peak_in_flight(schedule(*case)), strict=True):
        held = highest = 0
        for op in ops:
            held += op.name.startswith("send")
            held -= op.name == "sent"
            highest = max(highest, held)
        assert held == 0
        # Each direction has at most as many as there are activations, plus those that only wait to be confirmed.
        assert highest <= 2 * peak + 2 * pp * virtual, (name, micros)


# --- two micro-batches at once ---------------------------------------------------------------------------------------

PAIRED = [case for case in CASES if case[0] != "zero_bubble"]


def woven(case: Case, chooser: random.Random) -> list[list[Op]]:
    """The lists of every rank, the operators of each pair in some order that their names allow."""
    actions = schedule(*case, pairs=True)
    last = len(actions) * case[3] - 1
    stages = {index: stage_of(index, last) for index in range(last + 1)}
    pp = len(actions)
    weave = partial(drawn, chooser=chooser)
    return [step_ops(actions, stages, last, Axis("pp", pp, rank), MESSAGE, weave) for rank in range(pp)]


@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_pairs_run_in_any_order_and_timing(case: Case) -> None:
    """However two micro-batches are woven, no rank waits for ever, neither for a message nor for a send to end."""
    chooser = random.Random(str(case))
    for _ in range(8):
        lists = woven(case, chooser)
        assert Run(lists, lambda: chooser.expovariate(1.0)).finished
        for ops, plain in zip(lists, lists_of(schedule(*case), case[3]), strict=True):
            assert Counter((op.name, op.reads) for op in ops) == Counter((op.name, op.reads) for op in plain)


@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_pairs_hold_the_activations_of_their_schedule(case: Case) -> None:
    given = [of_micro("tokens", micro) for micro in range(case[2])]
    lists = woven(case, random.Random(0))
    found = [most_alive(Program(ops, given), lambda name: "/kept_" in name) for ops in lists]
    assert all(most <= peak for most, peak in zip(found, peak_in_flight(schedule(*case, pairs=True)), strict=True))


# --- memory ----------------------------------------------------------------------------------------------------------


def most_alive(program: Program, counted: Callable[[str], bool]) -> int:
    """The largest number of such names alive at once."""
    alive: set[str] = set()
    most = 0
    for op, dead in zip(program.ops, program.release, strict=True):
        alive |= {name for name in op.writes if counted(name)}
        most = max(most, len(alive))
        alive -= set(dead)
    assert not alive
    return most


@pytest.mark.parametrize("case", CASES, ids=str)
def test_activations_alive_are_those_of_the_schedule(case: Case) -> None:
    _, _, micros, _ = case
    given = [of_micro("tokens", micro) for micro in range(micros)]
    found = [most_alive(Program(ops, given), lambda name: "/kept_" in name) for ops in case_lists(case)]
    assert found == peak_in_flight(schedule(*case))


# --- the model's lists -----------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    layers=8, hidden=16, heads=4, kv_heads=4, experts=4, top_k=2, ffn_hidden=16, vocab=32, sequence_length=8,
    balance_loss=0.01,
)  # fmt: skip
STRATEGIES: dict[str, dict[str, Any]] = {
    "one-rank": {},
    "dp": {"dp": 2},
    "tp": {"node": 2, "attention": "tp", "ffn": "tp", "etp": 2, "vocabulary": "sharded"},
    "ep+tp": {"node": 4, "ffn": "ep+tp", "ep": 2, "etp": 2, "dispatch": "all_to_all"},
}


def plan(name: str, pp: int, rank: int, micros: int = 4, **parallel: Any) -> StepPlan:
    sizes = {"dp": 1, "node": 1, "ep": 1, "etp": 1} | parallel
    mesh = Mesh(pp, sizes["dp"], sizes["node"], sizes["ep"], sizes["etp"])
    virtual = 2 if name == "interleaved" else 1
    config = ParallelConfig(pp=pp, schedule=name, virtual_stages=virtual, **sizes)  # type: ignore[arg-type]
    return StepPlan(MODEL, config, axes_of(mesh, rank), torch.float32, 1, micros)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zero_bubble"])
def test_the_list_of_every_rank_is_complete(name: str, pp: int, strategy: str) -> None:
    """`Program` refuses a list in which something is read before it is written, or written twice."""
    ranks = pp * STRATEGIES[strategy].get("dp", 1) * STRATEGIES[strategy].get("node", 1)
    micros = 2 * pp if name == "interleaved" else 5
    for rank in range(ranks):
        program = plan(name, pp, rank, micros, **STRATEGIES[strategy]).program()
        written = {name for op in program.ops for name in op.writes}
        assert {of_micro("loss", m) in written for m in range(micros)} == {rank >= ranks - ranks // pp}


def test_without_a_pipeline_it_is_the_plain_list_with_prefixes() -> None:
    """F and backward of micro-batch 0, then of 1, ..., and nothing else."""
    layout = Layout(1, MODEL.sequence_length, axes_of(Mesh(), 0))
    plain = model_ops(MODEL, layout)
    plain += backward(plain)

    def renamed(names: tuple[str, ...], micro: int) -> tuple[str, ...]:
        return tuple(name if not name or name in SHARED else f"{micro}/{name}" for name in names)

    wanted = [
        (op.name, op.phase, renamed(op.reads, micro), renamed(op.writes, micro), op.weights, op.gradients, op.cost)
        for micro in range(3)
        for op in plain
    ]
    found = [
        (op.name, op.phase, op.reads, op.writes, op.weights, op.gradients, op.cost)
        for op in plan("1f1b", 1, 0, 3).ops
    ]
    assert found == wanted
    assert {"0/tokens", "2/targets", "loss_scale"} < {name for _, _, reads, *_ in found for name in reads}
    assert frozenset(INPUTS) > SHARED


def test_weight_gradients_stand_in_the_w_actions() -> None:
    """Of the whole model: no W operator before the W action of its micro-batch begins, nothing else in one."""
    for rank in range(4):
        p = plan("zero_bubble", 4, rank, 6)
        own = [op for op in p.ops if op.stream == Stream.COMPUTE and op.name != "sent"]
        expected = []
        for action in p.schedule[rank]:
            stage = p.stages[rank]
            weights = [op for op in stage.backward if op.phase == Phase.W]
            rest = [op for op in stage.backward if op.phase != Phase.W]
            ops = {"F": stage.forward, "B": rest, "W": weights}[action.phase]
            assert weights
            expected += [(op.name, op.phase, action.micro) for op in ops]
        names = [
            (op.name, op.phase, int(next(n for n in (*op.reads, *op.writes) if "/" in n).split("/")[0])) for op in own
        ]
        assert names == expected


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zero_bubble"])
def test_the_models_activations_alive_are_those_of_the_schedule(name: str) -> None:
    """`ln1_out` is what the weight gradient of qkv reads: kept from F to W."""
    for pp, rank in itertools.chain.from_iterable(((pp, rank) for rank in range(pp)) for pp in (1, 2, 4)):
        p = plan(name, pp, rank, 8)
        per_stage = len(p.parts[0].layers)
        found = most_alive(p.program(), lambda n: n.endswith(".ln1_out") and not n.split("/")[1].startswith("d:"))
        # While a backward goes on, a stage loses its layers one by one; at the peak all of them are there.
        assert found == peak_in_flight(p.schedule)[rank] * per_stage
