"""What a list reads, on tensors without storage: for counting what it takes without taking it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megascale_moe.model.segments import Segments
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.step import of_micro
from megascale_moe.strategies.model import local_inputs

META = torch.device("meta")


def inputs_without_storage(plan: StepPlan) -> dict[str, Any]:
    """Return a micro-batch's inputs, every row one document, and what all micro-batches share."""
    shape = (plan.rows, plan.model.sequence_length)
    tokens = torch.empty(shape, dtype=torch.int64, device=META)
    inputs = local_inputs(tokens, tokens, plan.layout, Segments.whole_rows(*shape), plan.model)
    return inputs | {"loss_scale": 1.0, "auxiliary_scale": torch.empty((), device=META)}


def step_inputs_without_storage(plan: StepPlan) -> dict[str, Any]:
    """Return the inputs of all micro-batches, which share their tensors."""
    inputs = inputs_without_storage(plan)
    return {of_micro(name, micro): value for name, value in inputs.items() for micro in range(plan.micros)}


def message_without_storage(plan: StepPlan) -> Tensor:
    """Return a hidden state, or its gradient, as another stage sends it."""
    return torch.empty(plan.message.shape, dtype=plan.message.dtype, device=META)
