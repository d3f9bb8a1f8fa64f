"""What a list reads, on tensors without storage: for counting what it takes without taking it."""

from __future__ import annotations

from typing import Any

import torch

from megascale_moe.model.segments import Segments
from megascale_moe.parallel.model import local_inputs
from megascale_moe.pipeline.program import StepPlan

META = torch.device("meta")


def inputs_without_storage(plan: StepPlan) -> dict[str, Any]:
    """A micro-batch's inputs, every row one document, and what all micro-batches share."""
    shape = (plan.rows, plan.model.sequence_length)
    tokens = torch.empty(shape, dtype=torch.int64, device=META)
    inputs = local_inputs(tokens, tokens, plan.layout, Segments.whole_rows(*shape), plan.model)
    return inputs | {"loss_scale": 1.0, "auxiliary_scale": torch.empty((), device=META)}
