"""Which heads a rank attends with, where heads, key heads and ranks do not divide each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megascale_moe.comm.mesh import Mesh
from megascale_moe.strategies.heads import heads_of_rank
from megascale_moe.testing import run_ranks
from tests.strategies.layouts import compare, random_rows, reference, run_rank
from tests.strategies.test_layouts import SMALL, TOLERANCE


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 12])
def test_every_query_head_meets_its_key_head_once(kv_heads: int, size: int) -> None:
    config = replace(SMALL, heads=12, kv_heads=kv_heads)
    seen = []
    for rank in range(size):
        mine, keys = heads_of_rank(rank, size, config)
        assert len(mine) % len(keys) == 0  # the core spreads its queries evenly over its keys
        share = len(mine) // len(keys)
        seen += [(head, keys[place // share]) for place, head in enumerate(mine)]
    assert seen == [(head, head // (12 // kv_heads)) for head in range(12)]


@pytest.mark.parametrize("variant", ["gqa", "norms"])
def test_shares_that_cut_through_groups_of_query_heads(variant: str) -> None:
    """Six heads in groups of two on two ranks: the middle group lies on both, each query brings its own key."""
    config = replace(SMALL, heads=6, kv_heads=3, head_dim=8, qk_norm="head" if variant == "norms" else "none")
    assert [len(heads_of_rank(rank, 2, config)[1]) for rank in range(2)] == [3, 3]
    batch = random_rows(config, rows=2)
    results = run_ranks(2, run_rank, config, batch, Mesh(node=2, ep=2), "all_to_all")
    loss, gradient, name = compare(results, reference(config, batch))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name
