"""Row maps, row moves and grouped products against their slow twins; experts without rows, no rows at all."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from megascale_moe.kernels import reference
from megascale_moe.kernels.grouped import Groups, grouped_mm, rows_of_groups, sums_of_groups
from megascale_moe.kernels.rows import row_map, sum_rows, take_rows
from tests.kernels.compare import FP32, NEAR, assert_near, gradients, leaves

DTYPES = [torch.float32, torch.bfloat16]


def random_choice(tokens: int, k: int, experts: int) -> Tensor:
    """k different experts for each token."""
    return torch.rand(tokens, experts).topk(k, dim=-1).indices


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(("first", "count"), [(0, 6), (2, 3), (5, 1)])
@pytest.mark.parametrize(("tokens", "k"), [(0, 2), (1, 1), (9, 2), (40, 6)])
def test_row_map_equals_its_twin(tokens: int, k: int, first: int, count: int, dropping: bool) -> None:
    choice = random_choice(tokens, k, 6)
    kept = torch.rand(tokens, k) < 0.6 if dropping else None
    found, wanted = row_map(choice, first, count, kept), reference.row_map(choice, first, count, kept)
    assert found.counts == wanted.counts
    for field in fields(found):
        value, other = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(value, Tensor):
            assert value.dtype == other.dtype, field.name
            assert torch.equal(value, other), field.name
        else:
            assert value == other, field.name


def test_row_map_of_experts_nobody_chose() -> None:
    found = row_map(torch.tensor([[0, 3], [3, 0]]), 1, 2)
    assert found.counts == [0, 0]
    assert found.offsets.tolist() == [0, 0]
    assert found.source.numel() == 0
    assert found.token_start.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "count"), [(0, 2, 6), (1, 1, 6), (9, 2, 2), (9, 2, 6), (70, 6, 6)])
def test_taking_and_summing_rows_equal_their_twins_and_are_dual(
    tokens: int, k: int, count: int, dtype: torch.dtype
) -> None:
    m = row_map(random_choice(tokens, k, 6), 0, count)
    x = torch.randn(tokens, 5).to(dtype)
    rows = take_rows(x, m.source)
    assert torch.equal(rows, reference.take_rows(x, m.source))
    slope = torch.randn(rows.shape).to(dtype)
    sums = sum_rows(slope, m)
    # Up to six BF16 rows: five additions, each rounded by up to 2^-8 of a sum no larger than the largest.
    tolerance = FP32 if dtype == torch.float32 else 3 * NEAR[dtype]
    assert_near(sums, reference.sum_rows(slope, m), tolerance)
    inputs = leaves(x)
    (wanted,) = gradients([reference.take_rows(inputs[0], m.source)], [slope], inputs)
    assert_near(sums, wanted.to(dtype), tolerance)
    inputs = leaves(slope)
    again = torch.randn(sums.shape).to(dtype)
    if inputs[0].numel():
        (wanted,) = gradients([reference.sum_rows(inputs[0], m)], [again], inputs)
        assert torch.equal(take_rows(again, m.source), wanted.to(dtype))


def test_tokens_without_rows_get_zero() -> None:
    m = row_map(torch.tensor([[5], [0], [5], [5]]), 0, 2)
    assert sum_rows(torch.ones(1, 3), m).tolist() == [[0.0] * 3, [1.0] * 3, *[[0.0] * 3] * 2]
    m = row_map(torch.tensor([[5], [5]]), 0, 2)
    assert sum_rows(torch.ones(0, 3), m).tolist() == [[0.0] * 3] * 2


COUNTS = [[0, 0, 0], [1, 0, 0], [0, 5, 0], [3, 0, 40], [17, 2, 9]]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(8, 16), (8, 24), (5, 7), (1, 8)])  # the first two suit torch's own grouped_mm
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_mm_equals_its_twin(
    counts: list[int], sizes: tuple[int, int], dtype: torch.dtype, transposed: bool
) -> None:
    x = torch.randn(sum(counts), sizes[0]).to(dtype)
    weight = torch.randn(3, *(sizes[::-1] if transposed else sizes)).to(dtype)
    weight = weight.transpose(1, 2) if transposed else weight  # as the experts' forward hands it over
    groups = Groups.of(counts)
    out = grouped_mm(x, weight, groups)
    assert_near(out, reference.grouped_mm(x, weight, groups), NEAR[dtype])  # BF16 products add up in float32


@pytest.mark.parametrize("counts", COUNTS)
def test_input_gradient_is_the_product_with_the_transposed_weights(counts: list[int]) -> None:
    x, weight, slope = torch.randn(sum(counts), 8), torch.randn(3, 8, 16), torch.randn(sum(counts), 16)
    groups = Groups.of(counts)
    inputs = leaves(x, weight)
    (wanted, _) = gradients([reference.grouped_mm(inputs[0], inputs[1], groups)], [slope], inputs)
    assert_near(grouped_mm(slope, weight.transpose(1, 2), groups), wanted, FP32)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0], [1], [200, 0, 57]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_sums_of_groups_equal_their_twins(counts: list[int], dtype: torch.dtype) -> None:
    groups, rows = Groups.of(counts), sum(counts)
    values, x = torch.randn(len(counts), 7).to(dtype), torch.randn(rows, 7).to(dtype)
    assert torch.equal(rows_of_groups(values, groups, rows), reference.rows_of_groups(values, groups, rows))
    assert_near(sums_of_groups(x, groups), reference.sums_of_groups(x, groups), NEAR[dtype])
