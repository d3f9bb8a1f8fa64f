"""Rotary embedding: relative positions, both pairings, YaRN's end points."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megascale_moe.config import ModelConfig
from megascale_moe.kernels.rotary import rotate
from megascale_moe.model.rotary import frequencies, rotary_table, softmax_scale

PLAIN = ModelConfig(hidden=64, heads=1, kv_heads=1, rope_theta=10_000.0)
YARN = replace(PLAIN, rope_factor=4.0, rope_original_length=2048)


def test_plain_frequencies_are_powers_of_theta() -> None:
    expected = [10_000.0 ** (-2 * pair / 64) for pair in range(32)]
    # Both in float64.
    assert frequencies(PLAIN).tolist() == pytest.approx(expected, rel=1e-12)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    plain, yarn = frequencies(PLAIN), frequencies(YARN)
    turns = 2048 * plain / (2 * math.pi)  # full turns within the original context
    fast, slow = turns > 32, turns < 1
    # Pairs next to the two thresholds belong to the ramp, whose ends are rounded outwards to whole pairs.
    assert torch.equal(yarn[fast][:-1], plain[fast][:-1])
    assert torch.equal(yarn[slow][1:], plain[slow][1:] / 4)
    between = ~fast & ~slow
    assert (yarn[between] < plain[between]).all()
    assert (yarn[between] > plain[between] / 4).all()
    assert (yarn.diff() < 0).all()


def test_yarn_of_a_latent_model_turns_the_rotary_part_of_its_heads() -> None:
    config = replace(YARN, attention="mla", qk_nope_head_dim=128, qk_rope_head_dim=64)
    assert torch.equal(frequencies(config), frequencies(YARN))


def test_yarn_scales_table_or_softmax() -> None:
    """The attention factor 0.1 ln(s) + 1 goes on queries and keys, or (DeepSeek) squared on the scores."""
    factor = 0.1 * math.log(4) + 1
    cos, _ = rotary_table(YARN, torch.zeros(1, dtype=torch.int64))
    # One rounding to float32.
    assert cos[0].tolist() == pytest.approx([factor] * 32, rel=1e-7)
    assert softmax_scale(YARN) == 1 / 8
    deepseek = replace(YARN, rope_mscale_all_dim=1.0)
    cos, _ = rotary_table(deepseek, torch.zeros(1, dtype=torch.int64))
    assert cos[0].tolist() == [1.0] * 32
    assert softmax_scale(deepseek) == pytest.approx(factor**2 / 8, rel=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(interleaved: bool) -> None:
    q, k = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(0)).double()

    def score(query: int, key: int) -> float:
        tables = [rotary_table(PLAIN, torch.tensor([position]), torch.float64) for position in (query, key)]
        return float((rotate(q, *tables[0], interleaved) * rotate(k, *tables[1], interleaved)).sum())

    # float64 angles of up to 1e5 keep 1e-11.
    assert score(7, 3) == pytest.approx(score(100_007, 100_003), abs=1e-9)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_undone_by_the_negative_angle(interleaved: bool) -> None:
    x = torch.randn(5, 3, 64, dtype=torch.float64)
    cos, sin = rotary_table(PLAIN, torch.arange(5), torch.float64)
    turned = rotate(x, cos, sin, interleaved)
    # float64 rounding.
    assert torch.allclose(rotate(turned, cos, -sin, interleaved), x, atol=1e-12)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-12)


def test_pairings_differ_by_a_permutation_of_the_width() -> None:
    x = torch.randn(5, 3, 64)
    table = rotary_table(PLAIN, torch.arange(5))
    order = torch.arange(64).view(2, 32).T.flatten()  # 0, 32, 1, 33 ...
    assert torch.equal(rotate(x, *table, False)[..., order], rotate(x[..., order], *table, True))


def test_far_positions_keep_their_digits() -> None:
    position = 131_071
    _, sin = rotary_table(PLAIN, torch.tensor([position]))
    # Rounded once to float32, where an angle computed in float32 would be off by 1e-2.
    assert float(sin[0, 0]) == pytest.approx(math.sin(position), abs=1e-7)
