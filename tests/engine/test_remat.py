"""Recomputation policies: bytes that are kept, counted on declared values, by running without storage, and for real."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megascale_moe.comm.axis import axes_of, single
from megascale_moe.config import ConfigError, ModelConfig, OverlapConfig, ParallelConfig
from megascale_moe.engine.cost import Rates
from megascale_moe.engine.executor import Program
from megascale_moe.engine.memory import Meter
from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, backward
from megascale_moe.engine.remat import keeps_within, kept_bytes, kept_names, policy, rematerialize
from megascale_moe.engine.value import Keep, Value
from megascale_moe.model.segments import Segments
from megascale_moe.pipeline.program import StepPlan
from megascale_moe.pipeline.step import Stage
from megascale_moe.presets import PRESETS
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.model import INPUTS, buffers_of, hidden_state, local_inputs
from megascale_moe.strategies.placement import Placement
from megascale_moe.strategies.weights import placements
from tests.strategies.test_layouts import SMALL

LAYERS = 4
GIVEN = ("rope", "segments")
ALONE = ParallelConfig(dp=1, node=1, ep=1)
CPU, META = torch.device("cpu"), torch.device("meta")
MODELS = ("qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v3", "mixtral-8x7b", "gpt-oss-20b")


def layers_of(name: str, count: int = 2) -> ModelConfig:
    """A model with few layers, all with experts, and no more vocabulary than is needed."""
    return replace(PRESETS[name], layers=count, dense_layers=0, vocab=64, sequence_length=512)


def small(name: str) -> ModelConfig:
    """The same kinds of heads and experts, small enough to be computed."""
    shared = {"layers": 2, "dense_layers": 0, "vocab": 64, "sequence_length": 64, "hidden": 64, "ffn_hidden": 32}
    model = replace(PRESETS[name], **shared, experts=8, top_k=2, expert_groups=1, top_groups=1)  # type: ignore[arg-type]
    if model.attention == "mla":
        widths = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        return replace(model, heads=4, kv_heads=4, **widths)  # type: ignore[arg-type]
    return replace(model, heads=8, kv_heads=2 if model.heads != model.kv_heads else 8, head_dim=16)


def stage_of(
    model: ModelConfig, remat: str, budget: int = 0, dtype: torch.dtype = torch.bfloat16,
    parallel: ParallelConfig = ALONE,
) -> tuple[StepPlan, Stage]:  # fmt: skip
    """The step of the first rank, whose peers exist on paper only."""
    overlap = OverlapConfig(remat=remat, activation_bytes=budget)  # type: ignore[arg-type]
    axes = axes_of(mesh_of(parallel, model, parallel.node), 0)
    plan = StepPlan(model, parallel, axes, dtype, 1, device=META, overlap=overlap)
    (stage,) = plan.stages.values()
    return plan, stage


def counted(plan: StepPlan, stage: Stage, device: torch.device) -> int:
    """Bytes that the layers' forward leaves for their backward, by running it and looking at what is alive."""
    model, dtype = plan.model, plan.dtype
    inner = [op for op in stage.forward if parse(op.name).layer is not None]
    needed = {name for op in stage.backward if parse(op.name).layer is not None for name in op.reads}
    shape = (1, model.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    inputs: dict[str, Any] = local_inputs(tokens, None, plan.layout, Segments.whole_rows(*shape), model)
    with torch.device(device):
        weights = {name: torch.rand(place.shape, dtype=dtype) for name, place in shapes_of(plan).items()}
        weights |= buffers_of(model, plan.part, device)
    meter = Meter()
    with meter:
        x = torch.randn(plan.layout.tokens, model.hidden, dtype=dtype, device=device)
        values = {**inputs, str(hidden_state(0, model, plan.layout)): x}
        del x
        Program(inner, values, needed - {*INPUTS}, ["hidden_0"]).run(values, weights)
        for name in [name for name in values if name not in needed or name in INPUTS]:
            del values[name]
        gc.collect()
        return meter.alive


def shapes_of(plan: StepPlan) -> dict[str, Placement]:
    return placements(plan.model, plan.layout, plan.part)


@pytest.mark.parametrize("remat", ["none", "paper", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_declared_bytes_are_kept_where_keys_are_gathered(name: str, remat: str) -> None:
    """Context parallelism on four ranks; "paper" keeps no tokens of other ranks."""
    parallel = ParallelConfig(dp=1, node=4, attention="cp", dispatch="all_gather")
    plan, stage = stage_of(layers_of(name), remat, parallel=parallel)
    declared, found = kept_bytes(stage.forward, stage.backward), counted(plan, stage, META)
    fused = 0 if plan.model.attention_sinks else {"none": 1, "paper": 1, "full": 0}[remat]
    statistics = fused * 2 * 4 * 512 // 4 * plan.model.heads
    assert declared == found + statistics
    kept = {parse(name).tensor for name in kept_names(stage.forward, stage.backward)}
    assert bool(kept & {"keys_ag", "kv_latent_ag"}) is (remat == "none")


@pytest.mark.parametrize("remat", ["none", "paper", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_declared_bytes_are_those_that_the_executor_keeps(name: str, remat: str) -> None:
    """What autograd saved counted as nothing: "paper" kept twice its formula, a budget of 30 MB a layer took 61.7."""
    plan, stage = stage_of(layers_of(name), remat)
    declared, found = kept_bytes(stage.forward, stage.backward), counted(plan, stage, META)
    # Without storage attention keeps no statistics: float32 for each token and head. With sinks it never does.
    fused = 0 if plan.model.attention_sinks else {"none": 1, "paper": 1, "full": 0}[remat]
    statistics = fused * 2 * 4 * 512 * plan.model.heads
    assert declared == found + statistics


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_declared_bytes_are_those_of_a_real_run(name: str, threads: int) -> None:
    """With two threads torch's own attention runs, whose graph holds statistics alone, unless values are narrower than
    keys.
    """
    plan, stage = stage_of(small(name), "paper", dtype=torch.float32)
    torch.set_num_threads(threads)
    try:
        found = counted(plan, stage, CPU)
    finally:
        torch.set_num_threads(1)
    declared = kept_bytes(stage.forward, stage.backward)
    fused = threads > 1 and plan.model.attention != "mla"
    assert declared == found + (0 if fused or plan.model.attention_sinks else 2 * 4 * 64 * plan.model.heads)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
@pytest.mark.parametrize("name", MODELS)
def test_a_budget_is_kept_and_used(name: str, share: float) -> None:
    model = layers_of(name)
    none, full = (kept_bytes(s.forward, s.backward) for _, s in (stage_of(model, r) for r in ("none", "full")))
    budget = int(full + share * (none - full))
    plan, stage = stage_of(model, "budget", budget)
    kept = kept_bytes(stage.forward, stage.backward)
    assert counted(plan, stage, META) <= kept <= budget
    assert kept >= 0.9 * budget or not one_more(plan, stage, budget)


def one_more(plan: StepPlan, stage: Stage, budget: int) -> list[str]:
    """Values that are recomputed although keeping them would fit and save time."""
    _, everything = stage_of(plan.model, "none")
    forward, back = everything.forward, everything.backward
    given = [*INPUTS, ""]
    kept = {str(name) for name in kept_names(stage.forward, stage.backward)}
    now = rematerialize(forward, back, keeping(kept), given)
    found = []
    for name in kept_names(forward, back):
        if isinstance(name, Value) and name.keep < Keep.FULL and name not in kept:
            more = kept | {name}
            then = rematerialize(forward, back, keeping(more), given)
            saves = sum(map(Rates().seconds, recomputing(then))) < sum(map(Rates().seconds, recomputing(now)))
            if saves and kept_bytes(forward, then) <= budget:
                found.append(str(name))
    return found


def keeping(names: set[str]) -> Callable[[str], bool]:
    return lambda value: not isinstance(value, Value) or value.keep == Keep.FULL or value in names


def recomputing(ops: list[Op]) -> list[Op]:
    return [op for op in ops if op.phase == "R"]


@pytest.mark.parametrize(
    "name", ["qwen3-30b-a3b", "olmoe-1b-7b", "mixtral-8x7b", "qwen3-235b-a22b", "internal-352b", "gpt-oss-20b"]
)
def test_paper_keeps_what_its_formula_says(name: str) -> None:
    """(2kf + 2 + 2a + 2a/m) bsh elements of a layer, a the width of the queries over the hidden size: norms of heads
    change nothing, since the projection in front of them is kept instead of what they make. Routing comes on top.
    """
    model = replace(layers_of(name, 1), shared_experts=0)
    _, stage = stage_of(model, "paper")
    T, h = model.sequence_length, model.hidden
    a, m = model.heads * model.query_dim / h, model.heads / model.kv_heads
    elements = (2 * model.top_k * model.ffn_hidden / h + 2 + 2 * a + 2 * a / m) * T * h
    assert large(stage) == 2 * elements


def test_paper_keeps_latents_of_latent_attention() -> None:
    """(2kf + 2) bsh, and per token both latents, the rotary key and the attention's result."""
    model = replace(layers_of("deepseek-v3", 1), shared_experts=0)
    _, stage = stage_of(model, "paper")
    T, h = model.sequence_length, model.hidden
    latents = model.q_lora_rank + model.kv_lora_rank + model.qk_rope_head_dim
    elements = (2 * model.top_k * model.ffn_hidden + 2 * h + latents + model.heads * model.value_dim) * T
    assert large(stage) == 2 * elements


def large(stage: Stage) -> float:
    """Bytes that layers keep in the compute dtype: not of routing, row maps and statistics of norms and attention."""
    read = {name for op in stage.backward if parse(op.name).layer is not None for name in op.reads}
    kept = [name for name in kept_names(stage.forward, stage.backward) if name in read]
    return sum(name.nbytes for name in kept if isinstance(name, Value) and name.dtype == torch.bfloat16)


# --- budgets by tensors ----------------------------------------------------------------------------------------------


def recomputed(budget: int) -> list[str]:
    """Operators of the backward list of four layers, in which nothing but fc2_in has a size: 100 bytes a layer."""
    model = replace(SMALL, layers=LAYERS)
    plan = StepPlan(model, ParallelConfig(dp=1, node=1, ep=1), single(), torch.float32, 1, device=META)
    (stage,) = plan.stages.values()
    forward = [resized(op) for op in stage.forward]
    back = backward([replace(op, backward=tuple(map(resized, op.backward))) for op in forward])
    keeps = keeps_within(budget, forward, back, GIVEN, lambda op: 1.0)
    made = rematerialize(forward, back, keeps, GIVEN)
    assert kept_bytes(forward, made) <= budget
    return [op.name for op in made if op.phase == "R"]


def resized(op: Op) -> Op:
    def sized(name: str) -> str:
        if not isinstance(name, Value):
            return name
        size = 100 if parse(name).tensor == "fc2_in" else 0
        return Value(name, (size,), torch.uint8, keep=name.keep, alias=name.alias)

    return replace(op, reads=tuple(map(sized, op.reads)), writes=tuple(map(sized, op.writes)))


@pytest.mark.parametrize(("budget", "count"), [(400, 0), (399, 1), (300, 1), (299, 2), (100, 3), (0, 4)])
def test_a_budget_drops_a_tensor_in_as_few_layers_as_it_must(budget: int, count: int) -> None:
    """It dropped a kind in all layers or in none: half the bytes took the time of all of them."""
    assert recomputed(budget) == [f"layers.{layer}.swiglu" for layer in reversed(range(LAYERS - count, LAYERS))]


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="activation_bytes = -1"):
        recomputed(-1)


def test_what_nobody_declared_is_kept() -> None:
    assert policy("full")("x")
    assert not policy("full")(Value("layers.0.x", (1,), torch.float32, keep=Keep.PAPER))
