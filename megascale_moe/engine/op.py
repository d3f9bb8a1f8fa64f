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
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megascale_moe.comm.traffic import Traffic
from megascale_moe.engine.names import is_grad, prefixed, term
from megascale_moe.engine.value import bytes_of, gradient_of


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
    """The kind of work that an operator's FLOPs are, which decides which share of the peak it reaches."""

    ROWS = "rows"  # element by element, or moving rows: bound by memory
    PRODUCT = "product"
    GROUPED = "grouped"  # one product per expert
    ATTENTION = "attention"


class Cost(NamedTuple):
    """The cost of an operator when routing is balanced: FLOPs, bytes of memory traffic, bytes that this rank sends.

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

    def times(self, flops: float, memory_bytes: float | None = None) -> Cost:
        """Return the cost of so many times the FLOPs, and as many times the memory traffic unless another is given."""
        memory = self.memory_bytes * (flops if memory_bytes is None else memory_bytes)
        return self._replace(flops=self.flops * flops, memory_bytes=memory)


FREE = Cost()
"""Of what takes no time worth counting."""


def product(m: float, n: float, k: float, memory_bytes: float, count: int = 1) -> Cost:
    """Return the cost of matrix products [m, k] @ [k, n]; which of the three is summed over changes nothing.

    Args:
        memory_bytes: what all of them read and write.
    """
    return Cost(2.0 * count * m * n * k, memory_bytes, work=Work.PRODUCT, size=3 / (1 / m + 1 / n + 1 / k))


@dataclass(frozen=True)
class Op:
    """One operator.

    `run(*reads, *weights, *gradients)` returns the values of `writes`: a tuple, a lone value for one write, None for
    none, or a `Pending` that finishes with one of these. Reads named "" arrive as None. `gradients` are weights
    whose gradient the operator adds to; it receives their `Gradient`. Operators never change what they read.

    What `writes` names is declared where it is a `Value`: the operators of layers declare all their results.

    `backward` are the operators of its own backward, see `input_gradient` and `weight_gradient`. `redo` are ways to
    recompute some of its results from others, cheaper than the operator itself. `traffic` says what a communication
    exchanges, where it may be written otherwise.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[..., Any]
    _: KW_ONLY
    weights: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    phase: Phase = Phase.F
    stream: Stream = Stream.COMPUTE
    cost: Cost = FREE
    backward: tuple[Op, ...] = ()
    redo: tuple[Op, ...] = ()
    traffic: Traffic | None = None

    def renamed(self, reads: tuple[str, ...], writes: tuple[str, ...]) -> Op:
        """Return the same operator on other values."""
        return self._changed(reads=reads, writes=writes)

    def _changed(self, **changes: object) -> Op:
        """Do what `dataclasses.replace` does in a fifth of the time: lists of whole steps are made with it."""
        new = object.__new__(Op)
        attributes = new.__dict__
        attributes.update(self.__dict__)
        attributes.update(changes)
        return new

    def input_gradient(
        self, of: Iterable[str], reads: tuple[str, ...], run: Callable[..., Any], *,
        weights: tuple[str, ...] = (), gradients: tuple[str, ...] = (), cost: Cost | None = None,
    ) -> Op:  # fmt: skip
        """Return the operator with one more in its backward: phase B, which writes the gradients of some of its reads.

        Args:
            cost: None: that of the operator itself.
        """
        back = self._changed(
            reads=reads, writes=tuple(map(gradient_of, of)), run=run, weights=weights, gradients=gradients,
            phase=Phase.B, cost=cost or self.cost, backward=(), redo=(), traffic=None,
        )  # fmt: skip
        return self._changed(backward=(*self.backward, back))

    def weight_gradient(self, reads: tuple[str, ...], run: Callable[..., Any], cost: Cost | None = None) -> Op:
        """Return the operator with one more in its backward: phase W, which adds to the gradients of all its weights.

        Args:
            cost: None: that of the operator itself.
        """
        back = self._changed(
            reads=reads, writes=(), run=run, weights=(), gradients=self.weights, phase=Phase.W, cost=cost or self.cost,
            backward=(), redo=(), traffic=None,
        )  # fmt: skip
        return self._changed(backward=(*self.backward, back))


class ProgramError(RuntimeError):
    """A list of operators contradicts itself; a defect of the program, not of the user's input."""


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


def backward(ops: Sequence[Op], seeds: Iterable[str] = ()) -> list[Op]:
    """Return the backward list of a forward list.

    Gradients that nothing produces are pruned: an operator none of whose gradients exist disappears, others read
    None in their place. A tensor used by several operators gets its gradients summed by an explicit operator.

    Args:
        seeds: names of gradients that are given from outside.
    """
    known = set(seeds)
    kept: list[Op] = []
    for op in (b for forward in reversed(ops) for b in forward.backward):
        wanted = [name for name in op.reads if is_grad(name)]
        if wanted and not any(name in known for name in wanted):
            continue
        reads = tuple("" if is_grad(name) and name not in known else name for name in op.reads)
        kept.append(op if reads == op.reads else op.renamed(reads, op.writes))
        known.update(op.writes)
    return _sum_shared(kept)


def hang_backward(ops: Sequence[Op], order: Sequence[Op]) -> list[Op]:
    """Return `ops` with the backward operators of all of them in another order than the reverse one.

    Where a communication and its neighbours are cut by peer, backward too has to send first and to begin with the
    rank's own piece, so the backward operators all hang on the last operator.

    Args:
        order: the same operators, in the order in which their backward runs.
    """
    if all(op is other for op, other in zip(reversed(ops), order, strict=True)):
        return list(ops)
    backwards = [b for op in order for b in op.backward]
    return [*(op._changed(backward=()) for op in ops[:-1]), ops[-1]._changed(backward=tuple(backwards))]


def _sum_shared(ops: list[Op]) -> list[Op]:
    """Give each gradient that several operators write its terms, and an operator that sums them."""
    total = Counter(name for op in ops for name in op.writes)
    seen: Counter[str] = Counter()
    out: list[Op] = []
    for op in ops:
        writes, sums = [], []
        for name in op.writes:
            count = total[name]
            seen[name] += 1
            writes.append(term(name, seen[name]) if count > 1 else name)
            if seen[name] == count > 1:
                cost = Cost(memory_bytes=3 * (count - 1) * bytes_of(name))  # each addition reads two and writes one
                terms = tuple(term(name, index + 1) for index in range(count))
                sums.append(Op(prefixed("sum", name), terms, (name,), add_all, phase=Phase.B, cost=cost))
        out += [op.renamed(op.reads, tuple(writes)) if tuple(writes) != op.writes else op, *sums]
    return out


def is_sum(op: Op) -> bool:
    """Return whether an operator sums the terms of a gradient that several operators add to."""
    return op.run is add_all


def add_all(first: Tensor, second: Tensor, *more: Tensor) -> Tensor:
    """Return the sum of tensors, added one after the other."""
    total = torch.add(first, second)
    for each in more:
        total += each
    return total
