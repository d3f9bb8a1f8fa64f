"""Recomputation as a pass: what backward reads and a policy does not keep is computed a second time.

    none     keep all that backward reads
    paper    recompute what no matrix product is needed for (the paper's section 4.1): norms, SwiGLU, dispatch. What is
             kept is declared with each value (`Value.keep`): inputs of products and of attention, (2kf + 4 + 2/m)
             bsh/n elements of a layer with grouped-query attention, with norms of heads too. Latent attention keeps its
             latents and projects them up a second time (as DeepSeek-V3's report, section 3.2.3):
             (2kf + 2) bsh/n and, per token, the latents' width and that of the attention's result
    full     keep only what enters a layer
    budget   recompute as little as fits a given number of bytes

A list of forward operators and a predicate on what they write become R operators in the backward list: copies of what
made the dropped tensors, under new names, each before its first reader. Where an operator can make its results from
less than it first read (a norm from the sum that is kept anyway), it says so in `Op.redo`. Orders move R operators like
all others, so a recomputed norm hides a communication, and a recomputed communication hides under others. They may move
within the backward of their layer: none starts before the gradient that enters it is there. Else an order, which knows
times but no bytes, would recompute everything at the beginning and take the memory that was freed at once.

Nothing is dropped by a special runtime: a tensor that no operator of the backward list reads any more dies in the
forward, as everything does after its last reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from megascale_moe.config import ConfigError
from megascale_moe.engine.cost import Seconds
from megascale_moe.engine.names import is_grad, parse, recomputed
from megascale_moe.engine.op import Op, Phase
from megascale_moe.engine.value import Keep, Value

Keeps = Callable[[str], bool]
"""Whether a value of the forward list is kept for backward."""

POLICIES = {"none": Keep.NONE, "paper": Keep.PAPER, "full": Keep.FULL}


def policy(name: str) -> Keeps:
    """Return the predicate of one of `POLICIES`; what nobody declared is kept."""
    strictness = POLICIES[name]
    return lambda value: not isinstance(value, Value) or value.keep >= strictness


def rematerialize(forward: Sequence[Op], backward: Sequence[Op], keeps: Keeps, given: Iterable[str]) -> list[Op]:
    """Return the backward list that recomputes what is not kept.

    Args:
        given: names that are there anyway (inputs of the list, such as "rope").
    """
    there = set(given) | {name for op in forward for name in op.writes if keeps(name)}
    makers = {name: op for op in forward for name in op.writes}
    gates: dict[int | None, str] = {}  # by layer, the gradient that the first operator of its backward reads
    for op in backward:
        gradient = next((name for name in op.reads if is_grad(name)), "")
        if gradient:
            gates.setdefault(parse(op.name).layer, gradient)
    out: list[Op] = []
    made: set[str] = set()

    def make(name: str) -> None:
        """Append what recomputes `name`, unless it is there."""
        if name in there or name in made or name not in makers:
            return
        op = makers[name]
        # One of its ways to recompute that needs nothing else recomputed, if there is one.
        op = next((redo for redo in op.redo if name in redo.writes and there.issuperset(redo.reads)), op)
        for read in op.reads:
            make(read)
        reads, run, gate = current(op.reads), op.run, gates.get(parse(op.name).layer)
        if gate:  # it also waits for that
            reads, run = (gate, *reads), lambda _, *values: op.run(*values)
        writes = tuple(map(recomputed, op.writes))
        out.append(replace(op, phase=Phase.R, reads=reads, writes=writes, run=run, backward=(), redo=()))
        made.update(op.writes)

    def current(names: Sequence[str]) -> tuple[str, ...]:
        """Return the names under which backward finds values."""
        return tuple(recomputed(name) if name in made and name not in there else name for name in names)

    for op in backward:
        for name in op.reads:
            make(name)
        reads = current(op.reads)
        out.append(op if reads == op.reads else op.renamed(reads, op.writes))
    return out


# --- bytes -----------------------------------------------------------------------------------------------------------


def kept_names(forward: Sequence[Op], backward: Sequence[Op]) -> list[str]:
    """Return what the forward list leaves for the backward list, in the order in which it is made."""
    needed = {name for op in backward for name in op.reads}
    return [name for op in forward for name in op.writes if name in needed]


def kept_bytes(forward: Sequence[Op], backward: Sequence[Op]) -> float:
    """Return the bytes that the layers of a list keep for their backward, their inputs included.

    Values that lie in another's memory keep all of that; embedding, head and loss do not count.
    """
    declared: dict[str, Value] = {
        value: value for op in forward for value in (*op.reads, *op.writes) if isinstance(value, Value)
    }
    needed = {name for op in backward if parse(op.name).layer is not None for name in op.reads}
    roots = {declared[name].alias or name for name in needed if name in declared}
    return sum(declared[root].nbytes for root in roots if root in declared)


class _Held(NamedTuple):
    """What a choice of dropped values costs: bytes kept, seconds of recomputation."""

    nbytes: float
    seconds: float


def keeps_within(
    budget: int, forward: Sequence[Op], backward: Sequence[Op], given: Sequence[str], seconds: Seconds
) -> Keeps:
    """Return the policy "budget": drop the kind of value that frees most bytes per second of recomputation, until the
    rest fits.

    The last kind dropped often frees more than is needed: what of all that was dropped still fits is kept after all,
    layer by layer, the most expensive kinds first.

    Args:
        budget: bytes that the layers of the list may keep, as `kept_bytes` counts them.

    Raises:
        ConfigError: nothing that can be dropped makes the rest fit.
    """
    dropped: list[str] = []
    spared: set[str] = set()

    def keeps(value: str) -> bool:
        if not isinstance(value, Value) or value.keep == Keep.FULL or value in spared:
            return True
        return parse(value).tensor not in dropped

    def held() -> _Held:
        made = rematerialize(forward, backward, keeps, given)
        return _Held(kept_bytes(forward, made), sum(seconds(op) for op in made if op.phase == Phase.R))

    wanted = [name for name in kept_names(forward, backward) if isinstance(name, Value) and name.keep < Keep.FULL]
    kinds = sorted({parse(name).tensor for name in wanted})
    now = held()
    while now.nbytes > budget:
        options: list[tuple[float, str, _Held]] = []
        for kind in (kind for kind in kinds if kind not in dropped):
            dropped.append(kind)
            then = held()
            dropped.pop()
            if then.nbytes < now.nbytes:
                options.append(((then.seconds - now.seconds) / (now.nbytes - then.nbytes), kind, then))
        if not options:
            raise ConfigError(
                f"overlap.activation_bytes = {budget}: with everything recomputed a micro-batch still keeps "
                f"{now.nbytes:,.0f} bytes of this rank's layers; give at least that"
            )
        _, kind, now = min(options)
        dropped.append(kind)
    spare = [name for name in wanted if parse(name).tensor in dropped]
    for name in sorted(spare, key=lambda name: dropped.index(parse(name).tensor), reverse=True):
        spared.add(name)
        then = held()
        if then.nbytes <= budget and then.seconds < now.seconds:
            now = then
        else:
            spared.discard(name)
    return keeps
