"""What a budget drops: enough, and not more than that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megascale_moe.comm.axis import single
from megascale_moe.config import ConfigError, ParallelConfig
from megascale_moe.engine.remat import kept_names, rematerialize
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.strategies.kept import keeps_within
from tests.strategies.test_layouts import SMALL

LAYERS = 4
GIVEN = ("rope", "segments")


def made_again(budget: int) -> list[str]:
    """Operators of the backward list of four layers, in which nothing but fc2_in has a size: 100 bytes a layer."""
    model = replace(SMALL, layers=LAYERS)
    plan = StepPlan(model, ParallelConfig(dp=1, node=1, ep=1), single(), torch.float32, 1, device=torch.device("meta"))
    (stage,) = plan.stages.values()
    sizes = {name: 100 * name.endswith(".fc2_in") for op in stage.forward for name in op.writes}
    keeps = keeps_within(budget, stage.forward, stage.backward, GIVEN, sizes, lambda op: 1.0)
    backward = rematerialize(stage.forward, stage.backward, keeps, GIVEN)
    assert sum(sizes.get(name, 0) for name in kept_names(stage.forward, backward)) <= budget
    return [op.name for op in backward if op.phase == "R"]


@pytest.mark.parametrize(("budget", "count"), [(400, 0), (399, 1), (300, 1), (299, 2), (100, 3), (0, 4)])
def test_a_budget_drops_a_tensor_in_as_few_layers_as_it_must(budget: int, count: int) -> None:
    """It dropped a kind in all layers or in none: half the bytes took the time of all of them."""
    assert made_again(budget) == [f"layers.{layer}.swiglu" for layer in reversed(range(LAYERS - count, LAYERS))]


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="activation_bytes = -1"):
        made_again(-1)
