"""Rematerialization as a pass: what backward reads and a policy does not keep is made again.

A list of forward operators, and a predicate on what they write, become R operators in the backward list: copies of what
made the dropped tensors, under new names, each before its first reader. Where an operator can make its results again
from less than it first read (a norm from the sum that is kept anyway), it says so in `Op.redo`. Orders move R operators
like all others, so a norm made again hides a communication, and a communication made again hides under others. They may
move within the backward of their layer: none starts before the gradient that enters it is there. Else an order, which
knows times but no bytes, makes everything again at the beginning and the memory that was freed is taken at once.

Nothing is dropped by a special runtime: a tensor that no operator of the backward list reads any more dies in the
forward, as everything does after its last reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from megascale_moe.engine.cost import LAYER
from megascale_moe.engine.op import Op, Phase


def again(name: str) -> str:
    """The name of a tensor that is made a second time."""
    return f"{name}~"


def rematerialize(
    forward: Sequence[Op], backward: Sequence[Op], keeps: Callable[[Op, str], bool], given: Iterable[str]
) -> list[Op]:
    """The backward list that makes again what is not kept.

    Args:
        keeps: whether a tensor that a forward operator writes survives until its backward.
        given: names that are there anyway (inputs of the list, such as "rope").
    """
    there = set(given) | {name for op in forward for name in op.writes if keeps(op, name)}
    makers = {name: op for op in forward for name in op.writes}
    gates = _gates(backward)
    out: list[Op] = []
    made: set[str] = set()

    def make(name: str) -> None:
        """Append what makes `name` again, unless it was."""
        if name in there or name in made or name not in makers:
            return
        op = _maker(makers[name], name, there)
        for read in op.reads:
            make(read)
        writes = tuple(again(written) for written in op.writes)
        redone = replace(op, phase=Phase.R, reads=renamed(op.reads), writes=writes, backward=(), redo=())
        out.append(_behind(gates.get(_layer(op.name), ""), redone))
        made.update(op.writes)

    def renamed(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(again(name) if name in made and name not in there else name for name in names)

    for op in backward:
        for name in op.reads:
            make(name)
        reads = renamed(op.reads)
        out.append(op if reads == op.reads else replace(op, reads=reads))
    return out


def _layer(name: str) -> str:
    found = LAYER.search(name)
    return found[0] if found else ""


def _gates(backward: Sequence[Op]) -> dict[str, str]:
    """By layer, the gradient that the first operator of its backward reads."""
    gates: dict[str, str] = {}
    for op in backward:
        gradient = next((name for name in op.reads if name.startswith("d:")), "")
        if gradient:
            gates.setdefault(_layer(op.name), gradient)
    return gates


def _behind(gate: str, op: Op) -> Op:
    """The operator, which also waits for `gate`."""
    run = op.run
    return replace(op, reads=(gate, *op.reads), run=lambda _, *values: run(*values)) if gate else op


def _maker(op: Op, name: str, there: set[str]) -> Op:
    """The operator that makes `name` again: one of `op.redo` that needs nothing else made, else `op` itself."""
    return next((redo for redo in op.redo if name in redo.writes and there.issuperset(redo.reads)), op)


def kept_names(forward: Sequence[Op], backward: Sequence[Op]) -> list[str]:
    """What the forward list leaves for the backward list, in the order in which it is made."""
    needed = {name for op in backward for name in op.reads}
    return [name for op in forward for name in op.writes if name in needed]
