"""Training through a pipeline is the training without one: bit for bit where no sum has another order.

A pipeline moves layers to other ranks and changes when they run. It does not change what is added to what: gradients
of a stage are summed micro-batch by micro-batch in the same order (tests/pipeline/test_schedule.py holds the schedules
to that), messages carry the bits of the hidden states. So with one rank per stage losses and weights are equal to the
last bit. Two sums are an exception, and only they: the gradient norm, whose shards are cut elsewhere, which matters
where it clips; and a tied embedding, whose two gradients meet over ranks instead of in one buffer.

Covered by pairs (tests/pairs.py): schedule, ranks of the pipeline, number of micro-batches. With strategies it is cases
that differ in how weights are shared and cut; that every strategy has the right gradients in every schedule is in
tests/pipeline/test_passes.py.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch

from megascale_moe.config import Config, ModelConfig
from tests.pairs import Case, name_of, pairs
from tests.train.short_runs import MODEL, TRAIN, Story, alone, config_of, same_on_every_rank, state_of, stories

STEPS = 10  # a bit that differs does so in the first steps
LONG = 30  # until losses have fallen
SHORT = 2  # an update, and one from there
# Sums of up to a few hundred float32 terms in another order: some 2^-24 of a loss near 4, so 1e-6, and training makes
# it grow: 2e-6 measured after three steps. A gradient that is lost, doubled or of the wrong micro-batch shows as 1e-3.
LOSS = 1e-5
# With clipping all gradients are scaled by a norm that is rounded to 2^-24 before it is squared: 6e-8 of every update.
CLIPPED = 1e-6
FOUR = replace(MODEL, layers=4, dense_layers=1, dense_ffn_hidden=24)  # a stage without experts
EIGHT = replace(FOUR, layers=8, dense_layers=5)


@functools.cache
def reference(config: Config, steps: int) -> Story:
    """One rank, no pipeline."""
    assert config == alone(config)
    (story,) = stories(config, steps)
    return story


def schedule_of(name: str) -> dict[str, Any]:
    return {"schedule": name, "virtual_stages": 2 if name == "interleaved" else 1}


def one_rank_a_stage(pp: int, schedule: str, micros: int, **train: Any) -> Config:
    stages = pp * (2 if schedule == "interleaved" else 1)
    model = {1: MODEL, 2: MODEL, 4: FOUR, 8: EIGHT}[stages]  # a layer for every stage
    return config_of(model, replace(TRAIN, global_batch=micros, **train), pp=pp, **schedule_of(schedule))


def assert_bit_equal(ours: list[Story], wanted: Story) -> None:
    same_on_every_rank(ours)
    assert ours[0].losses == wanted.losses
    assert all(torch.equal(a, b) for a, b in zip(ours[0].loads, wanted.loads, strict=True))
    assert (ours[0].evaluation, ours[0].sample) == (wanted.evaluation, wanted.sample)
    state, expected = state_of(ours), state_of([wanted])
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


FACTORS = {"schedule": ("1f1b", "interleaved", "zero_bubble"), "pp": ("1", "2", "4"), "micros": ("4", "8")}


def it_is_not_the_reference(schedule: str, pp: str) -> bool:
    """1F1B on one rank is."""
    return (schedule, pp) != ("1f1b", "1")


@pytest.mark.parametrize("case", pairs(FACTORS, it_is_not_the_reference), ids=name_of)
def test_bit_equal_to_the_unpartitioned_model(case: Case) -> None:
    config = one_rank_a_stage(int(case["pp"]), case["schedule"], int(case["micros"]))
    ours, wanted = stories(config, STEPS), reference(alone(config), STEPS)
    assert_bit_equal(ours, wanted)
    # Sums over stages, in float64 but of float32 numbers in another order; the norm in float32 over rows of a shard.
    assert ours[0].auxiliary == pytest.approx(wanted.auxiliary, rel=1e-12)
    assert ours[0].norms == pytest.approx(wanted.norms, rel=1e-6)


def test_the_reference_learns() -> None:
    losses = reference(alone(one_rank_a_stage(2, "1f1b", 8)), LONG).losses
    assert statistics.mean(losses[-5:]) < statistics.mean(losses[:5]) - 0.5


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_bit_equal_in_bf16(schedule: str) -> None:
    """Hidden states travel in the compute dtype, so here as well nothing is rounded on the way."""
    config = one_rank_a_stage(2, schedule, 4, dtype="bf16")
    assert_bit_equal(stories(config, SHORT), reference(alone(config), SHORT))


def test_bit_equal_with_a_correction_bias_and_uneven_stages() -> None:
    """The bias of a layer lives in its stage, and moves by the load of all ranks' tokens of that layer alone."""
    model = replace(FOUR, score="sigmoid", correction_bias=True, bias_update_rate=0.01)
    for stage_layers in ((1, 3), (3, 1)):
        config = config_of(model, pp=2, stage_layers=stage_layers, schedule="zero_bubble")
        ours = stories(config, SHORT)
        assert_bit_equal(ours, reference(alone(config), SHORT))
        biases = [value for name, value in state_of(ours).items() if name.startswith("buffers.")]
        assert len(biases) == 3
        assert min(float(bias.abs().max()) for bias in biases) > 0.005  # half of one move


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_clipping_differs_by_the_rounding_of_the_norm(schedule: str) -> None:
    config = one_rank_a_stage(2, schedule, 4, clip_norm=0.5)
    ours, wanted = stories(config, STEPS), reference(alone(config), STEPS)
    same_on_every_rank(ours)
    assert min(wanted.norms) > 0.5  # it clips, in every step
    assert worst(ours[0].losses, wanted.losses) < CLIPPED


def worst(ours: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, wanted, strict=True))


# --- with every strategy, several ranks per stage --------------------------------------------------------------------

TIED = replace(MODEL, tied_embeddings=True)
BIAS = replace(MODEL, score="sigmoid", correction_bias=True, bias_update_rate=0.01)
CAPACITY = replace(MODEL, capacity_factor=1.0, device_groups=2, balance_granularity="device")
LATENT = replace(
    BIAS, attention="mla", q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, shared_experts=1,
    dense_layers=1, dense_ffn_hidden=24,
)  # fmt: skip
SHARED = replace(MODEL, kv_heads=4, shared_experts=1, shared_gate=True)
INTERLEAVED = schedule_of("interleaved")

COMBINED: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "dp-interleaved-tied": (TIED, {"dp": 2, **INTERLEAVED}),
    # Stages in between hold no embedding.
    "four-stages-tied": (replace(TIED, layers=4), {"pp": 4, "schedule": "zero_bubble"}),
    "uneven-dp": (FOUR, {"dp": 2, "stage_layers": (1, 3), "schedule": "zero_bubble"}),
    "uneven-interleaved": (replace(MODEL, layers=6), {"dp": 2, "stage_layers": (1, 2, 1, 2), **INTERLEAVED}),
    "sp-ep-all-gather-capacity": (CAPACITY, {"node": 2, "ep": 2, "dispatch": "all_gather", **INTERLEAVED}),
    "sp-ep-across-nodes": (BIAS, {"dp": 2, "node": 1, "ep": 2, "dispatch": "all_to_all"}),
    "sp-tp-sharded": (SHARED, {"node": 2, "ffn": "tp", "vocabulary": "sharded", "schedule": "zero_bubble"}),
    "tp-ep": (SHARED, {"node": 2, "attention": "tp", "ep": 2, "dispatch": "all_to_all", **INTERLEAVED}),
    "tp-tp-sharded-tied": (
        TIED, {"node": 2, "attention": "tp", "ffn": "tp", "vocabulary": "sharded", "schedule": "zero_bubble"},
    ),
    "tp-ep+tp-sharded": (BIAS, {"node": 2, "attention": "tp", "ffn": "ep+tp", "etp": 2, "vocabulary": "sharded"}),
    "mla-tp-tp": (LATENT, {"node": 2, "attention": "tp", "ffn": "tp", "schedule": "zero_bubble"}),
    "mla-sp-ep-sharded-tied": (
        replace(LATENT, tied_embeddings=True), {"node": 2, "ep": 2, "vocabulary": "sharded", **INTERLEAVED},
    ),
    "dp-node-everything": (
        replace(LATENT, tied_embeddings=True),
        {"dp": 2, "node": 2, "attention": "tp", "ffn": "ep+tp", "ep": 2, "etp": 2, "dispatch": "all_to_all",
         "vocabulary": "sharded", "schedule": "zero_bubble"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMBINED)
def test_with_strategies_the_losses_of_one_rank(name: str) -> None:
    model, parallel = COMBINED[name]
    model = replace(model, layers=max(model.layers, 2 * parallel.get("virtual_stages", 1)))
    config = config_of(model, replace(TRAIN, clip_norm=1.0), **{"pp": 2, **parallel})
    ours, wanted = stories(config, SHORT), reference(alone(config), SHORT)
    same_on_every_rank(ours)
    assert worst(ours[0].losses, wanted.losses) < LOSS
    assert worst(ours[0].auxiliary, wanted.auxiliary) < LOSS
    assert abs(ours[0].evaluation - wanted.evaluation) < LOSS
    assert ours[0].sample == wanted.sample
    assert torch.equal(ours[0].loads[0], wanted.loads[0])
    tokens = config.train.global_batch * model.sequence_length * model.top_k
    assert all((load.sum(1) == tokens).all() for load in ours[0].loads)  # every layer's, from whatever stage
    state, expected = state_of(ours), state_of([wanted])
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in expected.items()
    }
