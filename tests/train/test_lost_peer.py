"""A rank that is lost in the middle of an overlapped step: all ranks end, it is named, nothing is left.

The victim ends, or stops, itself inside an operator that the step's list shows to run while a communication is under
way, so that no case depends on who is how fast. A killed rank is noticed at once; a stopped one when the timeout of
the groups is over, here TIMEOUT.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megascale_moe import cli
from megascale_moe.comm.axis import connect
from megascale_moe.comm.collectives import exchange, tag_of
from megascale_moe.comm.lost import LostPeer
from megascale_moe.comm.mesh import Mesh
from megascale_moe.engine.op import Op, Phase, Stream
from megascale_moe.testing import run_ranks
from megascale_moe.train.trainer import Trainer
from tests.runs import Place

TIMEOUT = 3.0  # seconds; whole steps take tenths here
OVERLAP = (
    "--overlap.order=scheduled", "--overlap.split=2", "--model.layers=2", "--train.global_batch=8",
    "--train.steps=100", "--train.compile=off", "--train.eval_rows=0", "--nproc=4",
)  # fmt: skip
NODES = ("--parallel.dp=2", "--parallel.node=2")
PIPELINE = ("--parallel.pp=2", "--parallel.dp=2", "--parallel.node=1", "--train.micro_batch=1")
VICTIM = 2


def synchronises(op: Op) -> bool:
    """Gradients on their way."""
    return op.name.startswith("gradients.")


WHERE: dict[str, tuple[Callable[[Op], bool], Callable[[Op], bool]]] = {
    "forward": (lambda op: op.phase == Phase.F, lambda op: op.phase == Phase.F),
    "backward": (lambda op: op.phase == Phase.B, lambda op: op.phase == Phase.B),
    "hidden synchronisation": (lambda op: op.phase in (Phase.B, Phase.W) and not synchronises(op), synchronises),
}
"""Which operator is the victim's last, and what is under way then."""


def under_way(ops: Sequence[Op], place: int) -> list[Op]:
    """Communications that start before an operator and are read behind it."""
    later = {name for op in ops[place + 1 :] for name in op.reads} - set(ops[place].reads)
    earlier = {name for op in ops[:place] for name in op.reads}
    return [op for op in ops[:place] if op.stream != Stream.COMPUTE and set(op.writes) & later - earlier]


def last_operator(ops: Sequence[Op], where: str) -> int:
    """Its place in the list."""
    mine, flying = WHERE[where]
    return next(
        place for place, op in enumerate(ops)
        if op.stream == Stream.COMPUTE and op.reads and mine(op) and any(map(flying, under_way(ops, place)))
    )  # fmt: skip


def lose(number: signal.Signals, where: str) -> Callable[[], None]:
    """To run in the command before it starts: the victim signals itself in the first step that hides anything."""

    def install() -> None:
        made = Trainer._program

        def program(self: Trainer, rows: int, micros: int, head: Any) -> Any:
            plan, built = made(self, rows, micros, head)
            if self.hides and dist.get_rank() == VICTIM:
                ops = list(built.ops)
                place = last_operator(ops, where)
                op = ops[place]
                ops[place] = replace(op, run=lambda *values: (os.kill(os.getpid(), number), op.run(*values))[1])
                built.ops = tuple(ops)
            return plan, built

        Trainer._program = program  # type: ignore[method-assign]
        vars(cli)["TIMEOUT"] = timedelta(seconds=TIMEOUT)

    return install


@pytest.mark.parametrize(
    ("layout", "where"),
    [
        (NODES, "forward"),
        ((*NODES, "--parallel.ep=4"), "backward"),
        (NODES, "hidden synchronisation"),
        (PIPELINE, "forward"),
    ],
)
def test_a_killed_rank_is_named_at_once(place: Place, layout: tuple[str, ...], where: str) -> None:
    command = place.start(*OVERLAP, *layout, before=lose(signal.SIGKILL, where))
    ended = command.wait()
    assert ended.status == 128 + signal.SIGKILL, ended.stderr
    assert ended.messages == [f"megascale: rank {VICTIM} was killed by SIGKILL; all ranks are ended"]
    assert "Traceback" not in ended.stderr
    command.vanish()


def test_a_stopped_rank_is_named_after_the_timeout(place: Place) -> None:
    """Groups of the axes had torch's own timeout, half an hour, and the first rank that gave up was blamed."""
    command = place.start(*OVERLAP, *NODES, before=lose(signal.SIGSTOP, "hidden synchronisation"))
    ended = command.wait()
    assert ended.status == 128 + signal.SIGSTOP, ended.stderr
    assert ended.messages[-1] == f"megascale: rank {VICTIM} was stopped by SIGSTOP; all ranks are ended"
    assert any(" in vain (" in line and f"rank {VICTIM}" in line for line in ended.messages[:-1])
    assert "Traceback" not in ended.stderr
    command.vanish()


def test_who_waits_says_for_whom_and_on_which_axis() -> None:
    for rank, (text, waited, ranks) in enumerate(run_ranks(4, wait_for_nobody, timeout=2.0)):
        assert (waited, ranks) == (rank, (rank ^ 1,))
        assert text.startswith(f"rank {rank} waited for rank {rank ^ 1} in vain (axis ep): ")


def wait_for_nobody() -> tuple[str, int, tuple[int, ...]]:
    """Each rank begins something that its peer, the other one of its node, never does."""
    axis = connect(Mesh(dp=2, node=2, ep=2))["ep"]
    parts = [torch.zeros(4) for _ in range(2)]
    with pytest.raises(LostPeer) as lost:
        exchange(parts, [part.clone() for part in parts], axis, tag_of(f"of {dist.get_rank()}")).wait()
    return str(lost.value), lost.value.rank, lost.value.ranks


def test_every_group_has_the_timeout_of_the_job() -> None:
    assert run_ranks(4, timeouts, timeout=77.0) == [{77.0}] * 4


def timeouts() -> set[float]:
    axes = connect(Mesh(dp=2, node=2, ep=2))
    backends = [axis.group._get_backend(torch.device("cpu")) for axis in axes.values() if axis.group is not None]
    return {backend.options._timeout.total_seconds() for backend in backends}
