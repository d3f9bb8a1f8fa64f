"""N ranks equal one rank: the list in every kind of layout against the plain modules.

Covered by pairs (tests/pairs.py): every variant of the model meets every shape of the mesh, every way of the experts
with its dispatch, both kinds of attention and of the vocabulary, and all of these meet each other.
tests/pipeline/test_passes.py has the same with pipelines, orders, rematerialization and splitting.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.testing import run_ranks
from tests.pairs import Case, name_of, pairs
from tests.strategies.layouts import (
    LAYOUT,
    RULES,
    SIZES,
    compare,
    fitted,
    parallel_of,
    random_rows,
    run_rank,
    wanted_of,
)

# FP32 sums over a few hundred terms in another order: a few units of 6e-8, grown through two layers. 1e-5 is what the
# product promises; a misplaced token or a missing sum shows as 1e-2 or more.
TOLERANCE = 1e-5

SMALL = ModelConfig(
    layers=2, hidden=32, heads=4, kv_heads=2, experts=8, top_k=2, ffn_hidden=24, vocab=64, sequence_length=16,
    balance_loss=0.5, z_loss=0.1, init_std=0.2,
)
# No gate is nearer than 6e-4 to the first that is dropped, with two layers or four; at 0.75 one is within rounding.
CAPACITY = replace(SMALL, capacity_factor=0.8, device_groups=4, balance_granularity="device")
LATENT = replace(
    SMALL, attention="mla", q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, score="sigmoid",
    correction_bias=True, expert_groups=4, top_groups=2, shared_experts=1, dense_layers=1, dense_ffn_hidden=40,
)
BIASED = replace(
    SMALL, attention_bias=True, attention_sinks=True, router_bias=True, expert_bias=True, sliding_window=6,
    full_attention_every=2, shared_experts=1,
)
GPT_OSS = replace(
    BIASED, shared_experts=0, activation="clamped_swiglu", swiglu_limit=0.6, rope_factor=4.0, rope_original_length=8,
    rope_truncate=False,
)
VARIANTS = {
    "gqa": SMALL,
    "capacity": CAPACITY,
    "one-kv-head": replace(SMALL, kv_heads=1, qk_norm="head", sliding_window=6),
    "three-heads-a-group": replace(SMALL, heads=12, kv_heads=4, head_dim=8, qk_norm="full", tied_embeddings=True),
    "mla": LATENT,
    "top-1-gated": replace(SMALL, top_k=1, norm_top_k=False, shared_experts=2, shared_gate=True),
    "top-all": replace(SMALL, top_k=8),
    "biases-and-sinks": BIASED,
    "gpt-oss": GPT_OSS,
}

LOCAL = tuple(name for name, (pp, *_) in SIZES.items() if pp == 1)  # pipelines have other lists
CASES = pairs({"variant": tuple(VARIANTS), **LAYOUT, "sizes": LOCAL}, *RULES)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_layout_equals_plain_model(case: Case) -> None:
    parallel = parallel_of(case)
    config = fitted(VARIANTS[case["variant"]], parallel)
    mesh = mesh_of(parallel, config, math.prod(SIZES[case["sizes"]]))
    batch = random_rows(config, rows=4)
    run = partial(
        run_rank, config, batch, mesh, parallel.dispatch, attention=parallel.attention, ffn=parallel.ffn,
        vocabulary=parallel.vocabulary,
    )  # fmt: skip
    results = run_ranks(mesh.world, run) if mesh.world > 1 else [run()]
    loss, gradient, name = compare(results, wanted_of(config, 4))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name


def test_every_layout_that_the_rules_allow_fits_every_model() -> None:
    """What the package refuses (ConfigError) is in no table."""
    allowed = 0
    for values in product(*LAYOUT.values()):
        for case in pairs({name: (value,) for name, value in zip(LAYOUT, values, strict=True)}, *RULES):
            parallel = parallel_of(case)
            parallel.check()
            for model in VARIANTS.values():
                config = fitted(model, parallel)
                config.check()
                mesh_of(parallel, config, math.prod(SIZES[case["sizes"]]))
            allowed += 1
    assert allowed > 80


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_do_not_change_gradients(micro: int) -> None:
    config, mesh = replace(SMALL, balance_granularity="device", device_groups=2), Mesh(dp=1, node=2, ep=2)
    batch = random_rows(config, rows=4)
    results = run_ranks(2, run_rank, config, batch, mesh, "all_to_all", micro)
    loss, gradient, name = compare(results, wanted_of(config, 4))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name
