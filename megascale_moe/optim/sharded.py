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
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megascale_moe.comm.axis import Axes
from megascale_moe.config import TrainConfig
from megascale_moe.engine.executor import Program
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.op import Op, Phase
from megascale_moe.engine.trace import Trace
from megascale_moe.optim.flat import FlatWeights
from megascale_moe.optim.hidden import hide
from megascale_moe.optim.norm import clipped, clipping_bytes, norm_ops, with_bytes
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
        self.shards: list[WeightShard] = []
        self.rules: list[Rule] = []
        for group in groups:
            for name, weight, gradient in group.views():
                self.weights[name], self.gradients[name] = weight, gradient
            rules = {rule_of(config).of(slot.placement.matrices) for slot in group.slots}
            assert len(rules) == 1, f"weights of {group.name} follow several rules: make the groups for this optimizer"
            master, rule = group.master, rules.pop()
            state = {each.name: torch.zeros_like(master, dtype=each.dtype) for each in rule.state}
            self.shards.append(WeightShard(master, state, torch.zeros((), device=master.device), group.decay))
            self.rules.append(rule)
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
        """Return what `ops` read from outside, by name."""
        return {"learning_rate": learning_rate, **given(self.groups)}

    def hidden(self, step: Sequence[Op]) -> list[Op]:
        """Return the list of a whole training step: `step` (forward and backward) with synchronisation inside and the
        update.

        Reads what `given` and `updated` name; the weights of others arrive in the next step, or by `settle`.
        """
        updates = self._updates().values()
        for *_, last in updates:  # what it writes is read in the next step only
            last[-1] = replace(last[-1], writes=())
        rest = [*norm_ops(self.groups, self.axes["world"]), *pipelined(list(updates))]
        added = {name for op in step for name in op.gradients}
        untouched = [gradient for name, gradient in self.gradients.items() if name not in added]

        def clear() -> None:
            for gradient in untouched:
                gradient.value()

        # Zero what no operator of the step adds to: buffers are sent from inside of it. All others are overwritten.
        first = [Op(name="gradients.clear", reads=(), writes=(), run=clear, phase=Phase.W)] if untouched else []
        return [*first, *hide(step, self.groups, rest)]

    def end(self, norm: float) -> float:
        """Mark what was summed as spent, after a step; returns the norm."""
        for gradient in self.gradients.values():
            gradient.reset()
        return norm

    def updated(self) -> dict[str, Tensor]:
        """Return this rank's shards of the weights, by the names that gathers read."""
        return updated(self.groups)

    def settle(self) -> None:
        """Bring all weights up to date after a hidden step."""
        gather_all(self.groups).run(updated(self.groups), {})

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
        """Return the bytes that stay from step to step: of weights, gradient buffers, and masters and state."""
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

    def _updates(self) -> dict[str, Job]:
        """Return, by name of the group, what comes between the norm and the gathering of its weights."""
        loads: Loads = {}
        return {
            group.name: WholeMatrices(group, rule, shard, self.axes, self.config, loads).job()
            if isinstance(rule, MatrixRule) else [[self._update_op(group, rule, shard)]]
            for group, rule, shard in zip(self.groups, self.rules, self.shards, strict=True)
        }  # fmt: skip

    def _update_op(self, group: FlatWeights, rule: Rule, shard: WeightShard) -> Op:
        """Return the operator that clips, updates the shard of one group and rounds it to the compute dtype."""
        config = self.config

        def run(gradient: Tensor, norm: float, learning_rate: float) -> Tensor:
            rule.update(shard, clipped(gradient, norm, config.clip_norm), learning_rate, config)
            return group.round()

        return Op(
            name=f"update.{group.name}", reads=(shard_of(group), "norm", "learning_rate"), writes=(updated_of(group),),
            run=run, phase=Phase.W,
            cost=with_bytes(rule.cost(group.master.numel()), clipping_bytes(group, config) + group.rounding_bytes),
        )  # fmt: skip


def gather_all(groups: Sequence[FlatWeights]) -> Program:
    """Return a program that fills all weights from the shards; it reads `sync.updated`."""
    jobs = [gather_job(group) for group in groups]
    waiting = [group for group, job in zip(groups, jobs, strict=True) if job]
    return Program([*pipelined(jobs), *map(arrived, waiting)], updated(groups))
