"""Slices of sequences: contiguous and in zig-zag order, as indices and through a whole training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig
from megascale_moe.model.attention import visible
from megascale_moe.model.segments import Segments
from megascale_moe.strategies import registry
from megascale_moe.strategies.attention_sp import SequenceParallel
from megascale_moe.strategies.attention_tp import TensorParallel
from megascale_moe.strategies.slices import Slices
from megascale_moe.testing import run_ranks
from tests.strategies.layouts import compare, random_rows, run_rank, wanted_of
from tests.strategies.test_layouts import CAPACITY, LATENT, SMALL, TOLERANCE


@pytest.mark.parametrize(("zigzag", "runs"), [
    (False, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    (True, [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]),
])  # fmt: skip
def test_positions_that_a_rank_holds(zigzag: bool, runs: list[list[int]]) -> None:
    slices = Slices(2, 12, 3, zigzag)
    assert [[position for run in slices.runs(part) for position in run] for part in range(3)] == runs
    tokens = torch.arange(24)
    for part, positions in enumerate(runs):
        assert slices.take(tokens, part).tolist() == [*positions, *(12 + position for position in positions)]
        assert [slices.place(position) for position in positions] == [(part, place) for place in range(4)]


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_slices_of_all_ranks_are_the_sequences(parts: int, zigzag: bool) -> None:
    """Of two nodes one behind the other; both ways."""
    slices = Slices(2, 24, parts, zigzag)
    whole = torch.randn(2 * 48, 3)
    by_rank = torch.cat([slices.take(node, part) for node in whole.split(48) for part in range(parts)])
    assert torch.equal(slices.by_rank(whole), by_rank)
    assert torch.equal(slices.sequences(by_rank), whole)
    assert torch.equal(slices.by_rank(whole[:, 0]), by_rank[:, 0])


@pytest.mark.parametrize(("zigzag", "runs"), [
    (False, [[0, 1, 2, 3], [4, 5, 18, 19], [20, 21, 22, 23], [6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 16, 17]]),
    (True, [[0, 1, 22, 23], [2, 3, 20, 21], [4, 5, 18, 19], [6, 7, 16, 17], [8, 9, 14, 15], [10, 11, 12, 13]]),
])  # fmt: skip
def test_positions_of_ranks_in_two_nodes(zigzag: bool, runs: list[list[int]]) -> None:
    """Chunks 0 and 3 of four are the first node's; a rank's slice may lie in both of them. All zig-zag is flat."""
    slices = Slices(2, 24, 3, zigzag, 2)
    assert [[position for run in slices.runs(part) for position in run] for part in range(6)] == runs
    if zigzag:
        assert [slices.runs(part) for part in range(6)] == [Slices(2, 24, 6, zigzag).runs(part) for part in range(6)]
    assert slices.place(18) == (1 if not zigzag else 2, 2)
    assert slices.tokens == len(slices.take(torch.arange(48), 0)) == 8


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize(("nodes", "parts"), [(2, 1), (2, 2), (3, 2), (2, 3)])
def test_slices_of_all_ranks_of_nodes_are_the_sequences(nodes: int, parts: int, zigzag: bool) -> None:
    """Node by node, and place by place, as two gathers leave them."""
    slices = Slices(2, 24, parts, zigzag, nodes)
    whole = torch.randn(2 * 48, 3)
    by_rank = torch.cat([slices.take(half, part) for half in whole.split(48) for part in range(nodes * parts)])
    assert torch.equal(slices.by_rank(whole), by_rank)
    assert torch.equal(slices.sequences(by_rank), whole)
    crossed = replace(slices, crossed=True)
    by_place = torch.cat([
        slices.take(whole[:48], node * parts + place) for place in range(parts) for node in range(nodes)
    ])  # fmt: skip
    assert torch.equal(crossed.by_rank(whole[:48]), by_place)
    assert torch.equal(crossed.sequences(by_place), whole[:48])
    shares = torch.cat([slices.between.take(whole[:48], node) for node in range(nodes)])
    assert torch.equal(slices.within.by_rank(shares), by_rank[:48])


def test_a_position_outside_of_the_rows_is_held_by_nobody() -> None:
    with pytest.raises(IndexError, match="position 12 of rows of 12 tokens"):
        Slices(1, 12, 3).place(12)


PACKED = Segments(2, 24, (0, 1, 7, 24, 36, 41, 48))


def pairs(slices: Slices, part: int, segments: Segments, window: int) -> torch.Tensor:
    """Which keys the queries of a rank see, bool [rows, tokens of a row, length], counted out of its blocks."""
    found = torch.zeros(slices.rows, slices.length // slices.ranks, slices.length, dtype=torch.int64)
    for rows, queries, keys in slices.blocks(part, segments, window):
        count = queries.stop - queries.start
        positions = torch.arange(keys.stop - count, keys.stop)[:, None]
        distance = positions - torch.arange(keys.start, keys.stop)
        found[rows, queries, keys] += (distance >= 0) & (distance < (window or slices.length))
    assert found.max() == 1  # no query meets a key twice
    return found.bool()


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("segments", [Segments.whole_rows(2, 24), PACKED], ids=["whole rows", "documents"])
def test_blocks_are_what_the_mask_of_whole_rows_shows(segments: Segments, zigzag: bool, window: int) -> None:
    mask = visible(segments, window).flatten(0, 1)
    for slices in (Slices(2, 24, 3, zigzag), Slices(2, 24, 3, zigzag, 2), Slices(2, 24, 1, zigzag, 4)):
        for part in range(slices.ranks):
            assert torch.equal(pairs(slices, part, segments, window).flatten(0, 1), slices.take(mask, part))


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_zigzag_shares_the_causal_square_out_equally(parts: int) -> None:
    """Exactly; contiguous slices have from 1 to 2n - 1 parts of it."""
    segments = Segments.whole_rows(2, 24)
    sizes = [int(pairs(Slices(2, 24, parts, zigzag=True), part, segments, 0).sum()) for part in range(parts)]
    assert sizes == [2 * (24 * 25 // 2) // parts] * parts
    between = Slices(2, 24, 2, nodes=parts).between
    assert [int(pairs(between, node, segments, 0).sum()) for node in range(parts)] == sizes
    uneven = [int(pairs(Slices(2, 24, parts), part, segments, 0).sum()) for part in range(parts)]
    assert uneven[-1] > 2 * uneven[0]


# --- whole steps in zig-zag order ------------------------------------------------------------------------------------


class ZigzagSequenceParallel(SequenceParallel):
    """All-to-all attention over tokens in zig-zag order."""

    name = "zigzag-sp"
    zigzag = True


class ZigzagTensorParallel(TensorParallel):
    """Tensor-parallel attention over tokens in zig-zag order."""

    name = "zigzag-tp"
    zigzag = True


@pytest.fixture
def zigzag() -> Iterator[None]:
    """Both are registered for a test."""
    before = registry.ATTENTION
    for strategy in (ZigzagSequenceParallel(), ZigzagTensorParallel()):
        registry.register(strategy)
    yield
    registry.ATTENTION = before


STEPS: dict[str, tuple[ModelConfig, Mesh, dict[str, Any]]] = {
    "capacity over two nodes": (CAPACITY, Mesh(dp=2, node=2, ep=4), {"attention": "zigzag-sp"}),
    "sharded vocabulary": (SMALL, Mesh(node=4, ep=4), {"attention": "zigzag-sp", "vocabulary": "sharded"}),
    "tensor-parallel experts": (LATENT, Mesh(node=4, etp=4), {"attention": "zigzag-sp", "ffn": "tp"}),
    "tensor-parallel attention": (SMALL, Mesh(node=2, ep=2), {"attention": "zigzag-tp", "vocabulary": "sharded"}),
    "three pieces": (replace(SMALL, kv_heads=1), Mesh(node=4, ep=4), {"attention": "zigzag-sp", "pieces": 3}),
}


@pytest.mark.parametrize("step", STEPS)
def test_steps_in_zigzag_order_equal_the_plain_model(step: str, zigzag: None) -> None:
    """Whatever a strategy says of its slices, the rest follows: routing, capacity, balance, vocabulary, messages."""
    config, mesh, strategies = STEPS[step]
    run = partial(run_rank, **strategies)
    results = run_ranks(mesh.world, run, config, random_rows(config, rows=4), mesh, "all_to_all")
    loss, gradient, name = compare(results, wanted_of(config, 4))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name
