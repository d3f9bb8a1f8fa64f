"""Pipeline schedules as data: for every pipeline rank the list of actions it executes, in order.

A schedule is nothing but these lists: a rank's step is strung together from one of them, the checker proves that they
cannot deadlock, the planner prices them. Schedules written as loops around sends and receives, as most trainers have
them, can only be tried.

Inside a schedule every stage sees its micro-batches in rising order, in F, in B and in W alike. Gradients are then
summed over the micro-batches in the order they have without a pipeline, and the sums are bit-equal.

| schedule | idle time per rank, p ranks | activations alive on rank r, micro-batches of a whole rank |
|---|---|---|
| 1f1b | (p - 1) (f + b + w) | p - r |
| interleaved, v stages per rank | (p - 1) (f + b + w) / v | at most p + (p - 1) / v |
| zero_bubble | (p - 1) (f + b - w) | p |

f, b, w: time of forward, input gradient and weight gradient of one micro-batch on one rank; `checker.bubble` has the
conditions and the sources, `checker.timeline` the simulation that agrees with them.

With `pairs`, what alternates becomes a forward and the backward of another micro-batch that can run woven into each
other. Each rank then is deeper in the warm-up: a micro-batch passes a rank in the time of a pair, on its way there and
back (the reason why DualPipe, in DeepSeek-V3's report, arXiv 2412.19437, needs more activations as well). 1F1B holds
2 (p - r) micro-batches instead of p - r, interleaved one stage more than without.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megascale_moe.config import ConfigError, require


@dataclass(frozen=True)
class Action:
    """One stage's work on one micro-batch; written "2F0": stage 2, forward, micro-batch 0.

    `stage` counts virtual stages in the order of the model, 0 .. pp x virtual - 1; stage s lives on pipeline rank
    s % pp. `phase` is F (forward), B (input gradient), W (weight gradient) or BW (both in one). `paired`: it may run
    woven into the action behind it, which belongs to another micro-batch.
    """

    stage: int
    phase: str
    micro: int
    paired: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.stage}{self.phase}{self.micro}"


Schedule = list[list[Action]]  # [pipeline rank][position]


def schedule(name: str, pp: int, micros: int, virtual_stages: int = 1, *, pairs: bool = False) -> Schedule:
    """Return the actions of one training step, one list per pipeline rank.

    `name` is "1f1b", "interleaved" or "zero_bubble", `micros` the number of micro-batches of the step,
    `virtual_stages` the number of stages on each rank; `pairs`: a forward and the backward behind it belong to two
    micro-batches. `ConfigError` for numbers that the schedule does not have.
    """
    require_legal(name, pp, micros, virtual_stages, pairs=pairs)
    if name == "zero_bubble":
        return [_zero_bubble(rank, pp, micros) for rank in range(pp)]
    return [_one_f_one_b(rank, pp, micros, virtual_stages, pairs) for rank in range(pp)]


def forward_only(pp: int, virtual_stages: int = 1) -> Schedule:
    """Return the actions of one evaluation micro-batch, one list per pipeline rank: F of each of its stages."""
    return [[Action(rank + chunk * pp, "F", 0) for chunk in range(virtual_stages)] for rank in range(pp)]


def in_pairs(actions: list[Action]) -> list[list[Action]]:
    """Return the list of a rank cut into pairs and single actions."""
    found: list[list[Action]] = []
    for action in actions:
        if found and found[-1][-1].paired:
            found[-1].append(action)
        else:
            found.append([action])
    return found


def _one_f_one_b(rank: int, pp: int, micros: int, virtual: int, pairs: bool) -> list[Action]:
    """Return the warm-up, then one forward and one backward in turn, then the backwards that remain.

    With one stage per rank (PipeDream-Flush in Narayanan et al. 2021, arXiv 2006.09503) the warm-up is just long enough
    that the first gradient finds the rank free, so p - rank micro-batches are alive.

    With several (interleaved; Narayanan et al. 2021, arXiv 2104.04473, section 2.2.2) order and warm-up are those of
    Megatron-LM: micro-batches move in groups of p, each group through all stages of the rank. The warm-up is all but
    the last stage of the first group, and two forwards more per rank further from the last: a forward passes p - 1 - r
    ranks on its way to the end, the first gradient as many on its way back.
    """
    order = [
        (chunk, micro)
        for group in range(0, micros, pp) for chunk in range(virtual) for micro in range(group, min(group + pp, micros))
    ]  # fmt: skip
    forwards = [Action(rank + chunk * pp, "F", micro) for chunk, micro in order]
    backwards = [Action(rank + (virtual - 1 - chunk) * pp, "BW", micro) for chunk, micro in order]
    behind = (pp - rank - 1) * (2 if pairs or virtual > 1 else 1)
    warm_up = min(behind + (virtual - 1) * pp + pairs, len(order))
    actions = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        actions += [replace(forward, paired=True) if pairs else forward, backward]
    return actions + backwards[len(order) - warm_up :]


def _zero_bubble(rank: int, pp: int, micros: int) -> list[Action]:
    """Return ZB-H1 (Qi et al. 2023, arXiv 2401.10241, section 2): 1F1B in which W lags `rank` micro-batches behind B.

    Rank r has p - r forwards in flight as in 1F1B and may hold r more micro-batches whose W is still to come, which
    makes p on every rank: the peak of 1F1B. The held weight gradients fill the end, where 1F1B waits; the last rank,
    which has most of them, sends its last input gradient p - 1 weight gradients earlier. A greedy choice,
    whatever is ready in the order B, F, W under the same limit, was tried and misses the bound for most sizes.
    """
    actions = [Action(rank, "F", micro) for micro in range(min(pp - rank, micros))]
    for micro in range(micros):
        actions.append(Action(rank, "B", micro))
        if micro >= rank:
            actions.append(Action(rank, "W", micro - rank))
        if micro + pp - rank < micros:
            actions.append(Action(rank, "F", micro + pp - rank))
    return actions + [Action(rank, "W", micro) for micro in range(max(0, micros - rank), micros)]


def require_legal(name: str, pp: int, micros: int, virtual: int, *, pairs: bool = False) -> None:
    """Raise `ConfigError` for numbers that a schedule does not have, without making it."""
    if name not in ("1f1b", "interleaved", "zero_bubble"):
        raise ConfigError(f"parallel.schedule = {name!r}: must be one of 1f1b, interleaved, zero_bubble")
    for what, value in (("parallel.pp", pp), ("number of micro-batches", micros), ("parallel.virtual_stages", virtual)):
        require(value >= 1, f"{what} = {value}: must be at least 1")
    if name == "interleaved":
        require(
            virtual >= 2 or pp == 1,  # one rank has nothing to interleave with
            f"parallel.virtual_stages = {virtual}: parallel.schedule = 'interleaved' needs at least 2 stages per rank; "
            "use 2, or parallel.schedule = '1f1b'",
        )
        below = micros // pp * pp
        nearest = f"{below} or {below + pp}" if below else f"{pp}"
        require(
            micros % pp == 0,
            f"number of micro-batches = {micros}: parallel.schedule = 'interleaved' needs a multiple of "
            f"parallel.pp = {pp}; use {nearest} (train.global_batch and train.micro_batch set it)",
        )
    else:
        require(
            virtual == 1,
            f"parallel.virtual_stages = {virtual}: parallel.schedule = {name!r} has one stage per rank; "
            "use 1, or parallel.schedule = 'interleaved'",
        )
    require(
        not (pairs and name == "zero_bubble"),
        "overlap.micro_batches = 2: parallel.schedule = 'zero_bubble' has no forward next to a whole backward; "
        "use schedule = '1f1b' or 'interleaved'",
    )
