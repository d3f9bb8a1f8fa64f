"""Activations of a layer, counted tensor by tensor as declared, against the paper's formulas (table 1, section 4.1).

    everything kept     (2n + 2k + 3kf + 12 + 5/m) bsh/n elements
    the paper's set     (2kf + 4 + 2/m) bsh/n

The six models as the paper evaluates them, n = 8, one sequence of 8,192 tokens, all-gather form; one layer of rank 1.
That the declared sizes are those of a run is shown in tests/engine/test_remat.py. What the formulas leave out is named:
shared experts, routing, norms' scales.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megascale_moe.comm.axis import Axes, axes_of, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, OverlapConfig, ParallelConfig
from megascale_moe.engine.names import parse
from megascale_moe.engine.remat import kept_names
from megascale_moe.engine.value import Value
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.presets import PRESETS

pytestmark = pytest.mark.bulky  # what torch does on its meta device imports its compiler

N = 8
MODELS = ("internal-352b", "mixtral-8x7b", "mixtral-8x22b", "hunyuan-large", "phi-3.5-moe", "deepseek-moe")
SHARED = "shared"
P = "layers.0."

# The paper's names, in its order, beside ours: what a layer leaves behind if nothing is dropped. `v` is a part of qkv
# there and a tensor of its own here; it does not count twice.
EVERYTHING = {
    "hidden_0", "ln1_out", "qkv", "q", "k", "heads_a2a", "attn", "attn_a2a", "attn_out", "ln2_in", "ln2_out",
    "ln2_out_ag", "ffn_in", "fc13_out", "fc2_in", "fc2_out", "ffn_partial", "ffn_out", "hidden_1",
}  # fmt: skip
PAPER = {"hidden_0", "heads_a2a", "attn", "ln2_in", "fc13_out"}


def model_of(name: str) -> ModelConfig:
    """One MoE layer of a model of the paper, with plain heads as in its table."""
    return replace(PRESETS[f"paper-{name}"], layers=1, dense_layers=0, qk_norm="none", vocab=64)


@pytest.fixture(scope="module")
def axes() -> Axes:
    return axes_of(Mesh(node=N, ep=N), 1, "nccl")


def plan_of(config: ModelConfig, axes: Axes, remat: str) -> StepPlan:
    parallel = ParallelConfig(dp=1, node=N, dispatch="all_gather")
    overlap = OverlapConfig(remat=remat)  # type: ignore[arg-type]
    return StepPlan(config, parallel, axes, torch.bfloat16, 1, device=torch.device("meta"), overlap=overlap)


def forward_sizes(plan: StepPlan) -> dict[str, float]:
    """Elements of everything that the forward makes, as it is declared."""
    (stage,) = plan.stages.values()
    values = [value for op in stage.forward for value in op.writes if isinstance(value, Value)]
    return {value.removeprefix(P): value.nbytes / 2 for value in values}


@pytest.mark.parametrize("name", MODELS)
def test_everything_kept(name: str, axes: Axes) -> None:
    c = model_of(name)
    sizes = forward_sizes(plan_of(c, axes, "none"))
    m, k, f = c.heads / c.kv_heads, c.top_k, c.ffn_hidden / c.hidden
    unit = c.sequence_length * c.hidden / N
    wanted = (2 * N + 2 * k + 3 * k * f + 12 + 5 / m) * unit
    assert sum(sizes[tensor] for tensor in EVERYTHING) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_set(name: str, axes: Axes) -> None:
    """What the backward list reads under `paper` and the forward has to leave."""
    c = model_of(name)
    plan = plan_of(c, axes, "paper")
    sizes = forward_sizes(plan)
    (stage,) = plan.stages.values()
    kept = {tensor.removeprefix(P) for tensor in kept_names(stage.forward, stage.backward)}
    m, k, f = c.heads / c.kv_heads, c.top_k, c.ffn_hidden / c.hidden
    unit = c.sequence_length * c.hidden / N
    # Attention's backward does not need its result where it recomputes the scores, but the output projection's weight
    # gradient does, after the all-to-all is done again.
    assert kept >= PAPER
    assert sum(sizes[tensor] for tensor in PAPER) == pytest.approx((2 * k * f + 4 + 2 / m) * unit, rel=1e-12)
    rest = {tensor: sizes[tensor] for tensor in kept - PAPER if tensor in sizes}
    shared = 2 * c.shared_hidden * c.sequence_length / N
    assert sum(size for tensor, size in rest.items() if tensor.startswith(SHARED)) == shared
    rest.pop("hidden_1")  # which the final norm begins with
    routing = {tensor: size for tensor, size in rest.items() if not tensor.startswith((SHARED, "final"))}
    assert sum(routing.values()) < 0.12 * unit * (2 * k * f + 4 + 2 / m), routing  # a few numbers per token and expert
    assert not {tensor for tensor in kept if tensor.startswith(("ln", "ffn_in", "fc2", "qkv", "attn_"))} - {
        "ln1_out.scale", "ln2_out.scale", "ln2_in",
    }  # fmt: skip


def test_one_rank_keeps_the_result_of_attention() -> None:
    """It has the name that the sent one has elsewhere, which is dropped: attention was done a second time."""
    parallel, overlap = ParallelConfig(dp=1, node=1, ep=1), OverlapConfig(remat="paper")
    c, device = model_of("mixtral-8x7b"), torch.device("meta")
    plan = StepPlan(c, parallel, single(), torch.bfloat16, 1, device=device, overlap=overlap)
    (stage,) = plan.stages.values()
    again = {op.name.removeprefix(P) for op in stage.backward if op.phase == "R"}
    assert again == {"attention_norm", "ffn_norm", "scatter", "swiglu"}


@pytest.mark.parametrize("order", ["serial", "paper", "scheduled"])
@pytest.mark.parametrize("remat", ["paper", "full"])
def test_nothing_is_made_again_before_its_layers_backward(order: str, remat: str, axes: Axes) -> None:
    """Orders made everything again at the beginning, all layers at once: the peak was that of "none"."""
    model = replace(model_of("mixtral-8x7b"), layers=4)
    plan = plan_of(model, axes, remat)
    plan = replace(plan, overlap=replace(plan.overlap, order=order))  # type: ignore[arg-type]
    (stage,) = plan.stages.values()
    made = {name: place for place, op in enumerate(stage.backward) for name in op.writes}
    for place, op in enumerate(stage.backward):
        if op.phase == "R":
            layer = parse(op.name).layer
            assert layer is not None
            assert place > made[f"d:hidden_{layer + 1}"]


@pytest.mark.parametrize("remat", ["none", "paper", "full"])
def test_no_product_is_done_twice_under_the_papers_policy(remat: str, axes: Axes) -> None:
    (stage,) = plan_of(model_of("mixtral-8x7b"), axes, remat).stages.values()
    again = [op.name.removeprefix(P) for op in stage.backward if op.phase == "R"]
    products = {"qkv", "out", "fc13", "fc2", "attention", "router"}
    assert bool(products & set(again)) == (remat == "full")
    assert bool(again) == (remat != "none")
    if remat == "paper":
        assert set(again) == {
            "attention_norm", "gather_heads", "ffn_norm", "dispatch_all_gather", "scatter", "swiglu",
        }  # fmt: skip
