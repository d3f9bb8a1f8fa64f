"""Memory of a real step, seen from between its operators.

What lives only inside an operator is not seen. A rehearsal without storage would do for a run, too (see `rehearsal`),
but torch imports its compiler for it: two seconds at the end of every run. Looking at the values of one real step costs
that step a little time, so it is one that no other picture shows, and steps of very many operators are left to a
rehearsal. What each recomputation policy keeps follows from the declared values alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from megascale_moe.engine.memory import tensors_in
from megascale_moe.engine.op import Op
from megascale_moe.engine.remat import kept_bytes
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.train.timeline.lists import phase_of
from megascale_moe.train.timeline.record import part
from megascale_moe.train.timeline.thin import of_curve
from megascale_moe.train.trainer import Trainer


class Watch:
    """Looks at a step without waiting for what is still travelling; `observe` is for `Trainer.step` and `Program.run`.

    Attributes:
        curve: (phase, bytes alive) after each operator; weights, gradients and their like are not in it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.curve: list[tuple[str, int]] = []
        optimizer = trainer.optimizer
        self._fixed: set[int] = set()
        for group in optimizer.groups:
            self._fixed |= {_key(tensor) for tensor in (group.weights, group.gradients, group.master)}

    def observe(self, op: Op, values: dict[str, Any]) -> None:
        """Add up the storages of all that is alive."""
        alive: dict[int, int] = {}
        for value in values.values():
            for tensor in tensors_in(value):
                storage = tensor.untyped_storage()
                alive[storage._cdata] = storage.nbytes()
        self.curve.append((phase_of(op), sum(size for key, size in alive.items() if key not in self._fixed)))

    def memory(self, trainer: Trainer, plan: StepPlan) -> dict[str, Any]:
        """As `rehearsal.memory`, of what was seen."""
        return of_curve(self.curve) | trainer.optimizer.held_bytes() | {
            "whole": True, "kept": {remat: _kept(plan, remat) for remat in policies(plan)}
        }  # fmt: skip


def _kept(plan: StepPlan, remat: str) -> int:
    """Bytes that the layers of the rank's first stage keep of one micro-batch for its backward."""
    plan = with_policy(plan, remat)
    stage = plan.stage(part(plan, len(plan.parts[min(plan.stages)].layers)))
    return round(kept_bytes(stage.forward, stage.backward))


def policies(plan: StepPlan) -> list[str]:
    """Those that are compared: a budget is only one where it is given."""
    return ["none", "paper", "full", *(["budget"] if plan.overlap.remat == "budget" else [])]


def with_policy(plan: StepPlan, remat: Any) -> StepPlan:
    """The plan with another recomputation policy."""
    budget = plan.overlap.activation_bytes if remat == "budget" else 0
    return replace(plan, overlap=replace(plan.overlap, remat=remat, activation_bytes=budget))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
