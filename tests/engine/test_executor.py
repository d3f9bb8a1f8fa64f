"""Execution: what lives how long, when communication is waited for, what the trace saw."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale_moe.comm.collectives import Pending
from megascale_moe.engine import trace as trace_module
from megascale_moe.engine.executor import Program, resolve
from megascale_moe.engine.op import Op, Phase, Stream
from megascale_moe.engine.trace import Event, Trace


class Watch:
    """Weak references to tensors, to see which are still there."""

    def __init__(self) -> None:
        self.references: dict[str, weakref.ref[Tensor]] = {}

    def made(self, name: str) -> Tensor:
        tensor = torch.zeros(3)
        self.references[name] = weakref.ref(tensor)
        return tensor

    @property
    def alive(self) -> set[str]:
        return {name for name, reference in self.references.items() if reference() is not None}


def make(watch: Watch, reads: str, write: str, log: list[tuple[str, set[str]]] | None = None) -> Op:
    """An operator that makes a new tensor and notes which of the earlier ones exist while it runs."""

    def run(*_: Tensor) -> Tensor:
        if log is not None:
            log.append((write, watch.alive))
        return watch.made(write)

    return Op(name=write, reads=tuple(reads.split()), writes=(write,), run=run)


def test_a_value_is_freed_right_after_its_last_reader() -> None:
    watch, log = Watch(), list[tuple[str, set[str]]]()
    ops = [make(watch, reads, write, log) for reads, write in (("", "a"), ("a", "b"), ("a b", "c"), ("c", "d"))]
    values = Program(ops, [], ["d"]).run({}, {})
    assert log == [("a", set()), ("b", {"a"}), ("c", {"a", "b"}), ("d", {"c"})]
    assert set(values) == {"d"}
    assert watch.alive == {"d"}


def test_kept_and_given_names_survive_and_unread_results_do_not() -> None:
    watch = Watch()
    given = watch.made("x")
    ops = [make(watch, "x", "kept"), make(watch, "x", "unread"), make(watch, "kept", "last")]
    values = Program(ops, ["x"], ["kept"]).run({"x": given}, {})
    assert set(values) == {"x", "kept"}
    del given
    assert watch.alive == {"x", "kept"}


def test_consumed_names_are_freed_although_given() -> None:
    watch, log = Watch(), list[tuple[str, set[str]]]()
    values = {"x": watch.made("x"), "y": watch.made("y")}
    ops = [make(watch, "x y", "a", log), make(watch, "a y", "b", log)]
    out = Program(ops, ["x", "y"], ["b"], consume=["x"]).run(values, {})
    assert log == [("a", {"x", "y"}), ("b", {"y", "a"})]
    assert set(out) == {"y", "b"}


def test_an_operator_runs_without_autograd() -> None:
    weight = torch.ones(2, requires_grad=True)
    double = Op(name="double", reads=("x",), writes=("y",), weights=("w",), run=lambda x, w: x * w)
    out = Program([double], ["x"], ["y"]).run({"x": torch.ones(2, requires_grad=True)}, {"w": weight})
    assert not out["y"].requires_grad


@pytest.mark.parametrize(
    ("writes", "result", "wanted"),
    [
        (("a",), 1, {"a": 1}),
        (("a",), (1,), {"a": 1}),
        (("a",), [1, 2], {"a": [1, 2]}),
        (("a", "b"), (1, 2), {"a": 1, "b": 2}),
        ((), None, {}),
    ],
)
def test_results_of_operators(writes: tuple[str, ...], result: Any, wanted: dict[str, Any]) -> None:
    ops = [Op(name="op", reads=(), writes=writes, run=lambda: result)]
    assert Program(ops, [], writes).run({}, {}) == wanted


@pytest.mark.parametrize("result", [(1,), (1, 2, 3)])
def test_wrong_number_of_results_is_an_error(result: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="zip"):
        Program([Op(name="op", reads=(), writes=("a", "b"), run=lambda: result)], []).run({}, {})


# --- communication ---------------------------------------------------------------------------------------------------


class Link:
    """Communication that notes when it starts and when somebody waits for it."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def start(self, name: str, result: Any, wire_bytes: int = 0) -> Pending:
        self.log.append(f"start {name}")

        def finish() -> Any:
            self.log.append(f"wait {name}")
            return result

        return Pending([], finish, wire_bytes)

    def compute(self, name: str, reads: str, write: str, function: Callable[..., Any]) -> Op:
        def run(*values: Any) -> Any:
            self.log.append(name)
            return function(*values)

        return Op(name=name, reads=tuple(reads.split()), writes=(write,), run=run)

    def send(self, name: str, writes: str, result: Any, wire_bytes: int = 0) -> Op:
        return Op(
            name=name, reads=(), writes=tuple(writes.split()), stream=Stream.INTRA,
            run=lambda: self.start(name, result, wire_bytes),
        )  # fmt: skip


def test_communication_is_waited_for_by_its_first_reader_and_only_once() -> None:
    link = Link()
    ops = [
        link.send("gather", "a b", (2, 3)),
        link.compute("other", "x", "y", lambda x: x),
        link.compute("first", "b y", "p", lambda b, y: b * y),
        link.compute("second", "a b p", "q", lambda a, b, p: a + b + p),
    ]
    out = Program(ops, ["x"], ["q"]).run({"x": 10}, {})
    assert link.log == ["start gather", "other", "wait gather", "first", "second"]
    assert out == {"x": 10, "q": 35}


def test_two_communications_are_under_way_together() -> None:
    link = Link()
    ops = [
        link.send("one", "a", 1), link.send("two", "b", 2), link.compute("read", "b", "c", lambda b: b),
        link.compute("end", "a c", "d", lambda a, c: a + c),
    ]  # fmt: skip
    assert Program(ops, [], ["d"]).run({}, {}) == {"d": 3}
    assert link.log == ["start one", "start two", "wait two", "read", "wait one", "end"]


def test_result_that_nothing_reads_does_not_come_back_with_its_sibling() -> None:
    """The wait stored all results under their names, also those dropped before: they stayed until the end."""
    watch, link = Watch(), Link()
    log: list[set[str]] = []

    def late() -> tuple[Tensor, Tensor]:
        return watch.made("a"), watch.made("unread")

    send = Op(name="send", reads=(), writes=("a", "unread"), run=lambda: Pending([], late, 0))
    look = Op(name="look", reads=("y",), writes=("z",), run=lambda y: log.append(watch.alive))
    out = Program([send, link.compute("read", "a", "y", lambda a: 1), look], [], ["z"]).run({}, {})
    assert log == [set()]
    assert set(out) == {"z"}


def test_kept_communication_is_still_travelling_until_resolved() -> None:
    link = Link()
    out = Program([link.send("gather", "a", 5)], [], ["a"]).run({}, {})
    assert link.log == ["start gather"]
    assert [resolve(out, "a"), resolve(out, "a")] == [5, 5]
    assert link.log == ["start gather", "wait gather"]
    assert out == {"a": 5}
    assert resolve(out, "") is None


# --- trace -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later."""
    seconds = iter(range(1000))
    monkeypatch.setattr(trace_module, "now", lambda: float(next(seconds)))


def traced() -> Trace:
    """One communication under two computations."""
    link, trace = Link(), Trace()
    ops = [
        link.send("gather", "a", 1, wire_bytes=100), link.compute("hidden", "", "b", lambda: 1),
        link.compute("reader", "a b", "c", lambda a, b: a), link.send("unread", "d", 1, wire_bytes=7),
    ]  # fmt: skip
    Program(ops, []).run({}, {}, trace=trace)
    return trace


def test_trace_tells_hidden_from_exposed(clock: None) -> None:
    trace = traced()
    spans = {event.name: (event.start, event.end, event.exposed) for event in trace.events}
    # gather starts at 0; hidden takes 1 to 2; the reader waits from 3 to 4, then runs from 5 to 6.
    assert spans == {"gather": (0, 4, 1), "hidden": (1, 2, 0), "reader": (5, 6, 0), "unread": (7, 7, 0)}
    assert (trace.exposed, trace.communication) == (1, 4)
    assert trace.wire_bytes() == {("gather", Phase.F): 100, ("unread", Phase.F): 7}


def test_chrome_trace_has_a_lane_per_stream(clock: None, tmp_path: Path) -> None:
    trace = traced()
    trace.events.append(Event("over", Phase.B, Stream.INTER, 8.0, 9.0))
    trace.write_chrome(tmp_path / "trace.json", rank=3)
    document = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    rows = document["traceEvents"]
    lanes = {row["tid"]: row["args"]["name"] for row in rows if row["ph"] == "M"}
    assert sorted(lanes.values()) == ["compute", "inter", "intra"]
    assert {row["pid"] for row in rows} == {3}
    spans = {row["name"]: (lanes[row["tid"]], row["ts"], row["dur"]) for row in rows if row["ph"] == "X"}
    assert spans == {
        "F gather": ("intra", 0, 4e6), "F hidden": ("compute", 1e6, 1e6), "F reader": ("compute", 5e6, 1e6),
        "F unread": ("intra", 7e6, 0), "B over": ("inter", 8e6, 1e6),
    }  # fmt: skip
    (gather,) = (row for row in rows if row["name"] == "F gather")
    assert gather["args"] == {"wire_bytes": 100, "exposed_us": 1e6}


def test_bytes_of_an_operator_add_up_over_runs_and_phases_stay_apart() -> None:
    trace = Trace()
    for phase, size in ((Phase.F, 3), (Phase.B, 5), (Phase.F, 4)):
        trace.events.append(Event("swap", phase, Stream.INTRA, 0.0, 0.0, size))
    trace.events.append(Event("matmul", Phase.F, Stream.COMPUTE, 0.0, 0.0))
    assert trace.wire_bytes() == {("swap", Phase.F): 7, ("swap", Phase.B): 5}
