"""Runs a list of operators.

There is nothing else in the runtime: no modes, and an observer only looks. Communication overlaps because an operator
that returns a `Pending` is only waited for when something reads its result; memory is bounded because each value is
dropped right after its last reader. Both follow from the order of the list, so passes control them by reordering it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.collectives import Pending
from megascale_moe.comm.lost import LostPeer
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Op, check
from megascale_moe.engine.trace import Event, Trace

Observer = Callable[[Op, dict[str, Any]], None]
Traced = tuple[Trace, Event]


class Program:
    """A checked list of operators with the place where each value dies.

    Args:
        given: names present before the first operator; they survive the list.
        keep: names that must survive the list as well.
        consume: those of `given` that nobody needs afterwards: dropped after their last reader like any other value.

    Raises:
        ProgramError: see `check`.
    """

    def __init__(
        self, ops: Sequence[Op], given: Iterable[str], keep: Iterable[str] = (), consume: Iterable[str] = ()
    ) -> None:
        self.ops = tuple(ops)
        self.given = frozenset(given)
        check(self.ops, self.given)
        self.release = _releases(self.ops, (self.given - set(consume)) | set(keep))

    def run(
        self,
        values: dict[str, Any],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Gradient] | None = None,
        trace: Trace | None = None,
        observe: Observer | None = None,
    ) -> dict[str, Any]:
        """Execute the list on `values` (changed in place and returned: what is still alive).

        Args:
            observe: called after each operator with all that is alive then, its results among them; `resolve` waits
                for those that are still travelling.
        """
        gradients = gradients or {}
        with torch.no_grad():
            for op, dead in zip(self.ops, self.release, strict=True):
                _step(op, values, weights, gradients, trace)
                if observe is not None:
                    observe(op, values)
                for name in dead:
                    values.pop(name, None)
        return values


def _releases(ops: Sequence[Op], keep: Iterable[str]) -> list[tuple[str, ...]]:
    """For each operator, the names that nothing after it reads."""
    alive = set(keep)
    releases: list[tuple[str, ...]] = []
    for op in reversed(ops):
        dead = dict.fromkeys(name for name in (*op.reads, *op.writes) if name and name not in alive)
        alive.update(dead)
        releases.append(tuple(dead))
    return releases[::-1]


class _InFlight:
    """A Pending under all the names it will fill, with the operator that started it and its event in a trace."""

    def __init__(self, pending: Pending, op: Op, traced: Traced | None) -> None:
        self.pending = pending
        self.op = op
        self.traced = traced

    def wait(self) -> Any:
        _mark(self.traced, "waited")
        try:
            result = self.pending.wait()
        except LostPeer as lost:
            lost.operator = f"{self.op.phase} {self.op.name}"
            raise
        _mark(self.traced, "end")
        return result


def _mark(traced: Traced | None, time: str) -> None:
    if traced is not None:
        trace, event = traced
        trace.mark(event, time)


def resolve(values: dict[str, Any], name: str) -> Any:
    """The value of a name; waits for it if it is still travelling."""
    value = values[name] if name else None
    if isinstance(value, _InFlight):
        result = value.wait()
        alive = {name: part for name, part in _named(value.op.writes, result).items() if values.get(name) is value}
        values.update(alive)  # a name that nothing reads was dropped already and stays so
        value = values[name]
    return value


def _named(names: tuple[str, ...], result: Any) -> dict[str, Any]:
    if len(names) == 1 and not isinstance(result, tuple):
        return {names[0]: result}
    return dict(zip(names, result, strict=True)) if names else {}


def _step(
    op: Op,
    values: dict[str, Any],
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Gradient],
    trace: Trace | None,
) -> None:
    inputs = [resolve(values, name) for name in op.reads]
    traced = (trace, trace.begin(op)) if trace is not None else None
    result = op.run(*inputs, *(weights[w] for w in op.weights), *(gradients[g] for g in op.gradients))
    if isinstance(result, Pending):
        if traced is not None:
            traced[1].wire_bytes = result.wire_bytes
        values.update(dict.fromkeys(op.writes, _InFlight(result, op, traced)))
    else:
        values.update(_named(op.writes, result))
        _mark(traced, "end")
