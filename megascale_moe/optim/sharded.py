"""Weights, gradients and optimizer state in flat buffers, split over the ranks that hold the same weights (ZeRO-1).

A step is one list of operators: gradients summed in float32 over each weight's own replicas, so that every rank has a
shard of each group (`sync`: inside of the node, then between nodes); one global norm over all shards (`norm`); clipping
and the optimizer's rule on the shards (`rule`, and `whole` where it needs whole matrices); weights gathered in the
compute dtype. In the list all reductions start before anything waits, and a group is gathered while the next one is
updated. It is built once, runs like any other list, and shows in the trace; on meta tensors it is a dry run.

Nothing here knows an optimizer: `registry.rule_of` finds the one that the config names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axes
from megascale_moe.config import TrainConfig
from megascale_moe.engine.executor import Program
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Cost, Op, Phase
from megascale_moe.engine.trace import Trace
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.hidden import hide, without_gathering
from megascale_moe.optim.norm import clipped, norm_ops
from megascale_moe.optim.registry import rule_of
from megascale_moe.optim.rule import MatrixRule, Rule, WeightShard
from megascale_moe.optim.sync import (
    CHUNK,
    Job,
    arrived,
    gather,
    gather_job,
    given,
    pipelined,
    reduce,
    shard_of,
    updated,
    updated_of,
)
from megascale_moe.optim.whole import Loads, WholeMatrices


class ShardedOptimizer:
    """Holds the weights' buffers and the optimizer's state, and updates them by the rule that the config names.

    Args:
        groups: made for the same rule (`groups.flat_groups`). axes: those of the rank; the norm is summed over "world".
        chunk: elements of a shard that travel together, where they pass two links.

    Attributes:
        weights: name -> weight in the compute dtype. gradients: name -> `Gradient` in float32.
        shards: what the rule updates, one per group.

    Raises:
        ConfigError: there is no such rule.
    """

    def __init__(self, groups: list[FlatWeights], axes: Axes, config: TrainConfig, chunk: int = CHUNK) -> None:
        self.groups, self.axes, self.config = groups, axes, config
        self.weights: dict[str, Tensor] = {}
        self.gradients: dict[str, Gradient] = {}
        for group in groups:
            for name, weight, gradient in group.views():
                self.weights[name], self.gradients[name] = weight, gradient
        rule = rule_of(config)
        self.rules = [_rule_of_group(group, rule) for group in groups]
        self.shards = [_shard(group, rule) for group, rule in zip(groups, self.rules, strict=True)]
        self._chunk = chunk

    @cached_property
    def ops(self) -> list[Op]:
        """A step, from `given` to "norm"; changes weights, masters and state."""
        reductions, gathers = reduce(self.groups, self._chunk), gather(self.groups, self._updates(), self._chunk)
        return [*reductions, *norm_ops(self.groups, self.axes["world"]), *gathers]

    @cached_property
    def _program(self) -> Program:
        return Program(self.ops, self.given(0.0), ["norm"])

    def given(self, learning_rate: float) -> dict[str, Any]:
        """What `ops` read from outside, by name."""
        return {"learning_rate": learning_rate, **given(self.groups)}

    def hidden(self, step: Sequence[Op]) -> list[Op]:
        """The list of a whole training step: `step` (forward and backward) with synchronisation inside and the update.

        Reads what `given` and `updated` name; the weights of others arrive in the next step, or by `settle`.
        """
        rest = [*norm_ops(self.groups, self.axes["world"]), *without_gathering(self._updates())]
        added = {name for op in step for name in op.gradients}
        untouched = [gradient for name, gradient in self.gradients.items() if name not in added]
        return [*([_clear(untouched)] if untouched else []), *hide(step, self.groups, rest)]

    def end(self, norm: float) -> float:
        """After a step: what was summed is spent; returns the norm."""
        for gradient in self.gradients.values():
            gradient.reset()
        return norm

    def updated(self) -> dict[str, Tensor]:
        """This rank's shards of the weights, by the names that gathers read."""
        return updated(self.groups)

    def settle(self, trace: Trace | None = None) -> None:
        """Bring all weights up to date after a hidden step."""
        gather_all(self.groups).run(updated(self.groups), {}, trace=trace)

    def step(self, learning_rate: float, trace: Trace | None = None) -> float:
        """Update the weights from the summed gradients.

        Args:
            trace: gets the operators' events after those it has; whoever brings it settles it.

        Returns:
            The global gradient norm before clipping; NaN on meta tensors.
        """
        for gradient in self.gradients.values():
            gradient.value()  # a weight nothing flowed into counts as zero
        return self.end(self._program.run(self.given(learning_rate), {}, trace=trace)["norm"])

    def state(self) -> list[dict[str, Tensor]]:
        """Return the rule's tensors by name, for each group, shaped like its master shard; whoever resumes fills them.

        Groups may differ in what they have, where an optimizer has several rules.
        """
        return [shard.state for shard in self.shards]

    def held_bytes(self) -> dict[str, int]:
        """Bytes that stay from step to step: of weights, gradient buffers, and masters and state."""
        masters = [group.master for group in self.groups if not group.shares_memory]
        state = [tensor for shard in self.shards for tensor in shard.state.values()]
        return {
            "parameters": sum(group.weights.nbytes for group in self.groups),
            "gradients": sum(group.gradients.nbytes for group in self.groups),
            "optimizer": sum(tensor.nbytes for tensor in [*masters, *state]),
        }

    def restore(self, step: int) -> None:
        """Continue after `step` updates with the tensors that `state` was filled with."""
        for shard in self.shards:
            shard.count.fill_(step)

    # --- operators ---------------------------------------------------------------------------------------------------

    def _updates(self) -> dict[str, Job]:
        """Of each group by name, what comes between the norm and the gathering of its weights."""
        loads: Loads = {}
        return {group.name: self._update_job(index, loads) for index, group in enumerate(self.groups)}

    def _update_job(self, index: int, loads: Loads) -> Job:
        group, rule = self.groups[index], self.rules[index]
        if not isinstance(rule, MatrixRule):
            return [[self._update_op(index)]]
        whole = WholeMatrices(group, rule, self.axes, self.config, loads)
        prepare = self._prepare_op(index, rule, whole.name("direction"))
        return whole.job(prepare, lambda returned: self._finish_op(index, whole, returned))

    def _update_op(self, index: int) -> Op:
        """Clip, the rule on the shard of one group, and round the masters to the compute dtype."""
        group, rule, shard = self.groups[index], self.rules[index], self.shards[index]

        def run(gradient: Tensor, norm: float, learning_rate: float) -> Tensor:
            rule.update(shard, clipped(gradient, norm, self.config.clip_norm), learning_rate, self.config)
            return _written(group)

        cost = rule.cost(group.master.numel())
        return Op(
            name=f"update.{group.name}", reads=(shard_of(group), "norm", "learning_rate"), writes=(updated_of(group),),
            run=run, phase=Phase.W, cost=_more(cost, self._clipping_bytes(group) + _written_bytes(group)),
        )  # fmt: skip

    def _prepare_op(self, index: int, rule: MatrixRule, writes: str) -> Op:
        """Clip, and the beginning of the rule; what it writes may lie where the sums were."""
        group, shard = self.groups[index], self.shards[index]

        def run(gradient: Tensor, norm: float) -> Tensor:
            return rule.prepare(shard, clipped(gradient, norm, self.config.clip_norm), self.config)

        cost = _more(rule.prepare_cost(group.master.numel()), self._clipping_bytes(group))
        return Op(
            name=f"update.{group.name}.prepare", reads=(shard_of(group), "norm"), writes=(writes,), run=run,
            phase=Phase.W, cost=cost,
        )  # fmt: skip

    def _finish_op(self, index: int, whole: WholeMatrices, returned: str) -> Op:
        """The end of the rule with whole matrices transformed, and round the masters to the compute dtype."""
        group, rule, shard = self.groups[index], self.rules[index], self.shards[index]

        def run(direction: Tensor, transformed: Sequence[Tensor], learning_rate: float) -> Tensor:
            rule.update(shard, whole.settled(direction, transformed), learning_rate, self.config)
            return _written(group)

        return Op(
            name=f"update.{group.name}", reads=(whole.name("direction"), returned, "learning_rate"),
            writes=(updated_of(group),), run=run, phase=Phase.W,
            cost=_more(rule.cost(group.master.numel()), _written_bytes(group)),
        )  # fmt: skip

    def _clipping_bytes(self, group: FlatWeights) -> int:
        """Clipping reads and writes the gradient once more."""
        return 8 * group.master.numel() if self.config.clip_norm else 0


def _rule_of_group(group: FlatWeights, rule: Rule) -> Rule:
    """The rule of all weights of a group."""
    found = {rule.of(slot.placement.matrices) for slot in group.slots}
    assert len(found) == 1, f"weights of {group.name} follow several rules: make the groups for this optimizer"
    return found.pop()


def _shard(group: FlatWeights, rule: Rule) -> WeightShard:
    master = group.master
    state = {each.name: torch.zeros_like(master, dtype=each.dtype) for each in rule.state}
    return WeightShard(master, state, torch.zeros((), device=master.device), group.decay)


def _written(group: FlatWeights) -> Tensor:
    """This rank's shard of the weights after the update, as gathers read it."""
    if group.formats.parameters is not None:
        return group.master  # the weights are those that arrive, not copied here
    mine = group.weights[group.shard]
    return mine if group.shares_memory else mine.copy_(group.master)


def _written_bytes(group: FlatWeights) -> int:
    """Memory traffic of `_written`."""
    copied = not group.shares_memory and group.formats.parameters is None
    return (4 + group.weights.itemsize) * group.master.numel() if copied else 0


def _more(cost: Cost, memory_bytes: float) -> Cost:
    return cost._replace(memory_bytes=cost.memory_bytes + memory_bytes)


def gather_all(groups: Sequence[FlatWeights]) -> Program:
    """Fills all weights from the shards; reads `sync.updated`."""
    jobs = [gather_job(group) for group in groups]
    waiting = [group for group, job in zip(groups, jobs, strict=True) if job]
    return Program([*pipelined(jobs), *map(arrived, waiting)], updated(groups))


def _clear(gradients: Sequence[Gradient]) -> Op:
    """Zero what no operator of a step adds to: the buffers are sent from inside of it. All others are overwritten."""

    def run() -> None:
        for gradient in gradients:
            gradient.value()

    return Op(name="gradients.clear", reads=(), writes=(), run=run, phase=Phase.W)
