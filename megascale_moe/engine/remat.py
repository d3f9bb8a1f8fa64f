"""Rematerialization as a pass: what backward reads and a policy does not keep is made again.

A list of forward operators, and a predicate on names, become R operators in the backward list: copies of those that
made the dropped tensors, under new names, each before its first reader. Where an operator can make its results again
from less than it first read (a norm from the sum that is kept anyway), it says so in `Op.redo`. Orders move R operators
like all others, so a norm made again hides a communication, and a communication made again hides under others.

Nothing is dropped by a special runtime: a tensor that no operator of the backward list reads any more dies in the
forward, as everything does after its last reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from megascale_moe.engine.op import Op, Phase


def again(name: str) -> str:
    """The name of a tensor that is made a second time."""
    return f"{name}~"


def rematerialize(
    forward: Sequence[Op], backward: Sequence[Op], keeps: Callable[[str], bool], given: Iterable[str]
) -> list[Op]:
    """The backward list that makes again what is not kept.

    Args:
        keeps: whether a tensor that a forward operator writes survives until its backward.
        given: names that are there anyway (inputs of the list, such as "rope").
    """
    there = set(given) | {name for op in forward for name in op.writes if keeps(name)}
    makers = {name: op for op in forward for name in op.writes}
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
        out.append(replace(op, phase=Phase.R, reads=renamed(op.reads), writes=writes, backward=(), redo=()))
        made.update(op.writes)

    def renamed(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(again(name) if name in made and name not in there else name for name in names)

    for op in backward:
        for name in op.reads:
            make(name)
        out.append(replace(op, reads=renamed(op.reads)))
    return out


def _maker(op: Op, name: str, there: set[str]) -> Op:
    """The operator that makes `name` again: one of `op.redo` that needs nothing else made, else `op` itself."""
    return next((redo for redo in op.redo if name in redo.writes and there.issuperset(redo.reads)), op)


def kept_names(forward: Sequence[Op], backward: Sequence[Op]) -> list[str]:
    """What the forward list leaves for the backward list, in the order in which it is made."""
    needed = {name for op in backward for name in op.reads}
    return [name for op in forward for name in op.writes if name in needed]
