"""The buffer of a weight's gradient: what the first addition overwrites, dtypes, groups without rows."""

from __future__ import annotations

import pytest
import torch

from megascale_moe.engine.gradient import Gradient
from megascale_moe.kernels.grouped import Groups


def stale(*shape: int, dtype: torch.dtype = torch.float32) -> Gradient:
    """A gradient whose buffer holds rubbish, as after an earlier step."""
    return Gradient(torch.full(shape, float("nan"), dtype=dtype))


def test_nothing_added_is_zero() -> None:
    gradient = stale(3)
    assert gradient.value().tolist() == [0.0] * 3
    gradient.add(torch.ones(3))  # after value() the buffer is a sum of nothing: the next addition adds
    assert gradient.value().tolist() == [1.0] * 3


def test_first_addition_overwrites_and_later_ones_add() -> None:
    gradient = stale(2)
    gradient.add(torch.tensor([1.0, 2.0]))
    gradient.add(torch.tensor([10.0, 20.0]))
    assert gradient.value().tolist() == [11.0, 22.0]
    gradient.reset()
    gradient.add(torch.tensor([5.0, 6.0]))
    assert gradient.value().tolist() == [5.0, 6.0]
    gradient.reset()
    assert gradient.value().tolist() == [0.0, 0.0]


def test_buffer_stays_the_same_memory() -> None:
    """The optimizer's flat buffer is behind it."""
    flat = torch.zeros(6)
    gradient = Gradient(flat[2:6].view(2, 2))
    gradient.add_mm(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert flat.tolist() == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_accumulate_in_the_dtype_of_the_buffer(dtype: torch.dtype) -> None:
    """256 + 1 is 256 in BF16: summed over micro-batches in float32, no product is lost."""
    gradient = stale(1, 1)
    large, one = torch.full((1, 1), 256.0, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    for a in (large, one, one):
        gradient.add_mm(a, one)
    assert gradient.value().item() == 258.0
    assert gradient.buffer.dtype == torch.float32


def test_narrow_buffer_takes_wide_values() -> None:
    gradient = stale(2, dtype=torch.bfloat16)
    gradient.add(torch.tensor([1.0, 2.0]))
    gradient.add(torch.tensor([0.5, 0.5]))
    assert gradient.value().tolist() == [1.5, 2.5]


def test_product_over_no_rows_is_zero() -> None:
    gradient = stale(2, 3)
    gradient.add_mm(torch.empty(2, 0), torch.empty(0, 3))
    assert gradient.value().tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 5], [0, 0, 0]])
def test_grouped_products(counts: list[int], dtype: torch.dtype) -> None:
    """Groups without rows are zero after the first addition and untouched by later ones."""
    rows = sum(counts)
    a, b = torch.randint(-3, 4, (rows, 2)).to(dtype), torch.randint(-3, 4, (rows, 4)).to(dtype)  # exact in BF16
    parts = zip(a.float().split(counts), b.float().split(counts), strict=True)
    wanted = torch.stack([x.t() @ y for x, y in parts])
    gradient = stale(3, 2, 4)
    gradient.add_grouped_mm(a, b, Groups.of(counts))
    assert torch.equal(gradient.value(), wanted)
    gradient.add_grouped_mm(a, b, Groups.of(counts))
    assert torch.equal(gradient.value(), 2 * wanted)
    other = torch.ones(4, 2, dtype=dtype), torch.ones(4, 4, dtype=dtype)
    gradient.add_grouped_mm(*other, Groups.of([0, 4, 0]))
    assert torch.equal(gradient.value()[0], 2 * wanted[0])
    assert torch.equal(gradient.value()[1], 2 * wanted[1] + 4)


def test_counts_must_match_the_groups() -> None:
    with pytest.raises(ValueError, match="zip"):
        stale(3, 2, 4).add_grouped_mm(torch.ones(2, 2), torch.ones(2, 4), Groups.of([1, 1]))
