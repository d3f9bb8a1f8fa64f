"""Runs a list of operators.

There is nothing else in the runtime: no modes, and an observer only looks. Communication overlaps because an operator
that returns a `Pending` is only waited for when something reads its result; memory is bounded because each value is
dropped right after its last reader. Both follow from the order of the list, so passes control them by reordering it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megascale_moe.comm.collectives import Pending
from megascale_moe.comm.lost import LostPeer
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Op, check
from megascale_moe.engine.trace import Trace

Observer = Callable[[Op, dict[str, Any]], None]


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
        self.release: list[tuple[str, ...]] = []  # for each operator, the names that nothing after it reads
        alive = {*(self.given - set(consume)), *keep}
        for op in reversed(self.ops):
            dead = dict.fromkeys(name for name in (*op.reads, *op.writes) if name and name not in alive)
            alive.update(dead)
            self.release.append(tuple(dead))
        self.release.reverse()

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


def _step(
    op: Op, values: dict[str, Any], weights: Mapping[str, Tensor], gradients: Mapping[str, Gradient],
    trace: Trace | None,
) -> None:  # fmt: skip
    """Run one operator; a function of its own, so that none of its tensors outlive it here."""
    inputs = [resolve(values, name) for name in op.reads]
    mark: Callable[[str], None] = _unmarked
    event = None
    if trace is not None:
        event = trace.begin(op)
        mark = partial(trace.mark, event)
    result = op.run(*inputs, *(weights[w] for w in op.weights), *(gradients[g] for g in op.gradients))
    if isinstance(result, Pending):
        if event is not None:
            event.wire_bytes = result.wire_bytes
        values.update(dict.fromkeys(op.writes, _InFlight(result, op, mark)))
    else:
        values.update(_named(op.writes, result))
        mark("end")


class _InFlight(NamedTuple):
    """A Pending under all the names it will fill, with the operator that started it, and how its times are noted."""

    pending: Pending
    op: Op
    mark: Callable[[str], None]


def _unmarked(time: str) -> None:
    """Note nothing: there is no trace."""


def resolve(values: dict[str, Any], name: str) -> Any:
    """Return the value of a name; wait for it if it is still travelling."""
    value = values[name] if name else None
    if isinstance(value, _InFlight):
        value.mark("waited")
        try:
            result = value.pending.wait()
        except LostPeer as lost:
            lost.operator = f"{value.op.phase} {value.op.name}"
            raise
        value.mark("end")
        arrived = _named(value.op.writes, result)
        # A name that nothing reads was dropped already and stays so.
        values.update({name: part for name, part in arrived.items() if values.get(name) is value})
        value = values[name]
    return value


def _named(names: tuple[str, ...], result: Any) -> dict[str, Any]:
    if len(names) == 1 and not isinstance(result, tuple):
        return {names[0]: result}
    return dict(zip(names, result, strict=True)) if names else {}
