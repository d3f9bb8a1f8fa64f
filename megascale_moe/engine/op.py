"""Operators over named tensors, and the check that a list of them makes sense.

A layer, and by concatenation a whole training step, is a list of `Op`. Everything else reads that one list: the
executor runs it, passes rewrite it, the planner prices it, the trace draws it. Backward is not a mode of the executor:
each forward operator carries the operators of its own backward (phases B and W), and `backward()` strings them
together into another plain list. Whatever moves, drops, splits or recomputes operators is then a function from
list to list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.traffic import Traffic


class Stream(StrEnum):
    """Where an operator runs; operators of different streams may overlap."""

    COMPUTE = "compute"
    INTRA = "intra"  # links inside a node
    INTER = "inter"  # links between nodes


class Phase(StrEnum):
    """Forward, input gradient, weight gradient, recompute."""

    F = "F"
    B = "B"
    W = "W"
    R = "R"


class Work(StrEnum):
    """What an operator's FLOPs are made of, which decides about the share of a processor's peak that it reaches."""

    ROWS = "rows"  # element by element, or moving rows: bound by memory
    PRODUCT = "product"
    GROUPED = "grouped"  # one product per expert
    ATTENTION = "attention"


@dataclass(frozen=True)
class Cost:
    """What an operator takes, with balanced routing: FLOPs, bytes of memory traffic, bytes this rank sends.

    Attributes:
        size: what the reached share of the peak depends on: of products the harmonic mean of m, n and k, of grouped
            ones the rows of an expert, of attention the tokens of a sequence.
        ring: whether ranks of a node need but one copy of what comes from another node: gathers and reductions that
            NCCL carries from node to node. Else what is sent to each rank is its own.
    """

    flops: float = 0.0
    memory_bytes: float = 0.0
    wire_bytes: float = 0.0
    axis: str = ""
    work: Work = Work.ROWS
    size: float = 0.0
    ring: bool = False


def product(m: float, n: float, k: float, memory_bytes: float, count: int = 1) -> Cost:
    """Of matrix products [m, k] @ [k, n]: which of the three is summed over changes neither FLOPs nor size.

    Args:
        memory_bytes: of all of them.
    """
    return Cost(2.0 * count * m * n * k, memory_bytes, work=Work.PRODUCT, size=3 / (1 / m + 1 / n + 1 / k))


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator.

    `run(*reads, *weights, *gradients)` returns the values of `writes`: a tuple, a lone value for one write, None for
    none, or a `Pending` that finishes with one of these. Reads named "" arrive as None. `gradients` are weights
    whose gradient the operator adds to; it receives their `Gradient`. Operators never change what they read.

    `backward` are the operators of its own backward. `redo` are ways to make some of its results again from others,
    cheaper than the operator itself. `traffic` says what a communication exchanges, where it may be written otherwise.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[..., Any]
    weights: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    phase: Phase = Phase.F
    stream: Stream = Stream.COMPUTE
    cost: Cost = Cost()
    backward: tuple[Op, ...] = ()
    redo: tuple[Op, ...] = ()
    traffic: Traffic | None = None


class ProgramError(RuntimeError):
    """A list of operators contradicts itself; a defect of the program, not of the user's input."""


def grad(name: str) -> str:
    """The name of a tensor's gradient."""
    return f"d:{name}"


def check(ops: Iterable[Op], given: Iterable[str]) -> None:
    """Refuse a list before it runs.

    Raises:
        ProgramError: a name is read before it is written, or written twice.
    """
    known = {"", *given}
    for op in ops:
        for name in op.reads:
            if name not in known:
                raise ProgramError(f"{op.phase} {op.name} reads {name!r}, which nothing before it writes")
        for name in op.writes:
            if name in known:
                raise ProgramError(f"{op.phase} {op.name} writes {name!r} a second time")
            known.add(name)


def backward(
    ops: Sequence[Op], seeds: Iterable[str] = (), size: Callable[[str], float] = lambda name: 0.0
) -> list[Op]:
    """The backward list of a forward list.

    Gradients that nothing produces are pruned: an operator none of whose gradients exist disappears, others read
    None in their place. A tensor used by several operators gets its gradients summed by an explicit operator.

    Args:
        seeds: gradients that are given from outside, as "d:name".
        size: bytes of a gradient by its name, for what summing several costs; 0 of what is too small to count.
    """
    known = set(seeds)
    kept: list[Op] = []
    for op in (b for forward in reversed(ops) for b in forward.backward):
        wanted = [name for name in op.reads if name.startswith("d:")]
        if wanted and not any(name in known for name in wanted):
            continue
        reads = tuple("" if name.startswith("d:") and name not in known else name for name in op.reads)
        kept.append(op if reads == op.reads else replace(op, reads=reads))
        known.update(op.writes)
    return _sum_shared(kept, size)


def _sum_shared(ops: list[Op], size: Callable[[str], float]) -> list[Op]:
    total = Counter(name for op in ops for name in op.writes)
    seen: Counter[str] = Counter()
    out: list[Op] = []
    for op in ops:
        writes, complete = [], []
        for name in op.writes:
            seen[name] += 1
            writes.append(f"{name}#{seen[name]}" if total[name] > 1 else name)
            if seen[name] == total[name] > 1:
                complete.append(_sum_op(name, total[name], size(name)))
        out += [replace(op, writes=tuple(writes)) if tuple(writes) != op.writes else op, *complete]
    return out


def _sum_op(name: str, count: int, size: float) -> Op:
    reads = tuple(f"{name}#{i + 1}" for i in range(count))
    cost = Cost(memory_bytes=3 * (count - 1) * size)  # each addition reads two and writes one
    return Op(name=f"sum {name}", reads=reads, writes=(name,), run=_add_all, phase=Phase.B, cost=cost)


def _add_all(*parts: Tensor) -> Tensor:
    total = torch.add(parts[0], parts[1])
    for part in parts[2:]:
        total += part
    return total
