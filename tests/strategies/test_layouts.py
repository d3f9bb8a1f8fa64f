"""N ranks equal one rank: every layout of the list against the plain modules."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig
from megascale_moe.testing import run_ranks
from tests.strategies.layouts import compare, random_rows, run_rank, wanted_of

# FP32 sums over a few hundred terms in another order: a few units of 6e-8, grown through two layers. 1e-5 is what the
# product promises; a misplaced token or a missing sum shows as 1e-2 or more.
TOLERANCE = 1e-5

SMALL = ModelConfig(
    layers=2, hidden=32, heads=4, kv_heads=2, experts=8, top_k=2, ffn_hidden=24, vocab=64, sequence_length=16,
    balance_loss=0.5, z_loss=0.1, init_std=0.2,
)
CAPACITY = replace(SMALL, capacity_factor=0.75, device_groups=4, balance_granularity="device")
LATENT = replace(
    SMALL, attention="mla", q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, score="sigmoid",
    correction_bias=True, expert_groups=4, top_groups=2, shared_experts=1, dense_layers=1, dense_ffn_hidden=40,
)
VARIANTS = {
    "gqa": SMALL,
    "capacity": CAPACITY,
    "one-kv-head": replace(SMALL, kv_heads=1, qk_norm="head", sliding_window=6),
    "three-heads-a-group": replace(SMALL, heads=12, kv_heads=4, head_dim=8, qk_norm="full", tied_embeddings=True),
    "mla": LATENT,
    "top-1-gated": replace(SMALL, top_k=1, norm_top_k=False, shared_experts=2, shared_gate=True),
    "top-all": replace(SMALL, top_k=8),
}

# One rank and pure data parallelism have no dispatch; the others run in both forms.
LAYOUTS = [("auto", 1, 1, 1), ("auto", 1, 2, 1)] + [
    (dispatch, *sizes)
    for dispatch in ("all_to_all", "all_gather")
    for sizes in ((2, 1, 2), (4, 1, 4), (2, 2, 2), (1, 2, 2), (2, 2, 4))
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dispatch", "node", "dp", "ep"), LAYOUTS)
def test_layout_equals_plain_model(variant: str, dispatch: str, node: int, dp: int, ep: int) -> None:
    config, mesh = VARIANTS[variant], Mesh(dp=dp, node=node, ep=ep)
    batch = random_rows(config, rows=4)
    wanted = wanted_of(config, 4)
    results = run_ranks(mesh.world, run_rank, config, batch, mesh, dispatch)
    loss, gradient, name = compare(results, wanted)
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name


# (attention, ffn, dispatch, node, dp, ep, etp): every strategy of attention with every one of the experts, on one node
# and over two.
STRATEGIES = [
    ("sp", "tp", "auto", 2, 1, 1, 2),
    ("sp", "tp", "auto", 2, 2, 1, 2),
    ("tp", "ep", "all_to_all", 2, 1, 2, 1),
    ("tp", "ep", "all_gather", 2, 2, 2, 1),
    ("tp", "ep", "all_to_all", 2, 2, 4, 1),
    ("tp", "tp", "auto", 2, 1, 1, 2),
    ("tp", "tp", "auto", 4, 1, 1, 4),
    ("sp", "ep+tp", "all_to_all", 4, 1, 2, 2),
    ("sp", "ep+tp", "all_gather", 4, 1, 2, 2),
    ("tp", "ep+tp", "all_to_all", 2, 2, 2, 2),
    ("tp", "ep+tp", "all_gather", 2, 2, 2, 2),
    ("sp", "ep+tp", "all_to_all", 1, 4, 2, 2),
    ("sp", "ep+tp", "all_gather", 2, 1, 1, 2),
]

# The vocabulary meets the rest of the model in one place, the hidden states before and behind the layers. So it is
# sharded in these variants, the second with tied embeddings, and replicated in the others.
SHARDED = ("gqa", "three-heads-a-group", "mla")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("attention", "ffn", "dispatch", "node", "dp", "ep", "etp"), STRATEGIES)
def test_strategies_equal_plain_model(
    variant: str, attention: str, ffn: str, dispatch: str, node: int, dp: int, ep: int, etp: int
) -> None:
    config, mesh = VARIANTS[variant], Mesh(dp=dp, node=node, ep=ep, etp=etp)
    if attention == "tp":  # heads that do not divide are refused (tests/comm/test_mesh.py)
        if config.qk_norm == "full":
            config = replace(config, qk_norm="head")
        if config.attention == "gqa" and config.kv_heads % node:
            config = replace(config, kv_heads=4)
    vocabulary = "sharded" if variant in SHARDED else "replicated"
    batch = random_rows(config, rows=4)
    results = run_ranks(
        mesh.world, partial(run_rank, attention=attention, ffn=ffn, vocabulary=vocabulary), config, batch, mesh,
        dispatch,
    )  # fmt: skip
    loss, gradient, name = compare(results, wanted_of(config, 4))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_do_not_change_gradients(micro: int) -> None:
    config, mesh = replace(SMALL, balance_granularity="device", device_groups=2), Mesh(dp=1, node=2, ep=2)
    batch = random_rows(config, rows=4)
    results = run_ranks(2, run_rank, config, batch, mesh, "all_to_all", micro)
    loss, gradient, name = compare(results, wanted_of(config, 4))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name
