"""Output layer and loss in blocks of tokens, against the twin that makes all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megascale_moe.kernels import blocks, cross_entropy, reference
from megascale_moe.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_loss
from tests.kernels.compare import FP32, assert_near

# BF16: logits of size 8 or so are rounded by up to 2^-8 of that, so a probability moves by 3 %, a gradient as much.
BF16_CHAIN = 8 * 2.0**-8


def sink(total: Tensor) -> Callable[[Tensor, Tensor], None]:
    """Adds the products it is handed to `total`, in float32."""

    def add(a: Tensor, b: Tensor) -> None:
        total.add_(a.float() @ b.float())

    return add


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "block"), [(1, 256), (7, 256), (7, 1), (23, 4), (256, 256)])
def test_loss_and_both_gradients_equal_the_twin(
    tokens: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy.BLOCK_TOKENS, "cpu", block)
    x, weight = torch.randn(tokens, 9).to(dtype), torch.randn(31, 9).to(dtype)
    targets = torch.randint(0, 31, (tokens,))
    targets[tokens // 2] = -100 if tokens > 1 else 3
    found, wanted = torch.zeros(31, 9), torch.zeros(31, 9)
    loss, dx = linear_cross_entropy(x, weight, targets, 0.3, sink(found))
    wanted_loss, wanted_dx = reference.linear_cross_entropy(x, weight, targets, 0.3, sink(wanted))
    tolerance = FP32 if dtype == torch.float32 else BF16_CHAIN
    assert_near(loss, wanted_loss, tolerance)
    assert_near(dx, wanted_dx, tolerance)
    assert_near(found, wanted, tolerance)
    assert_near(linear_cross_entropy_loss(x, weight, targets), wanted_loss, tolerance)


def test_targets_that_do_not_count_leave_no_trace() -> None:
    x, weight = torch.randn(5, 4), torch.randn(6, 4)
    total = torch.zeros(6, 4)
    loss, dx = linear_cross_entropy(x, weight, torch.full((5,), -100), 1.0, sink(total))
    assert loss == 0
    assert not dx.any()
    assert not total.any()


def test_no_tokens() -> None:
    loss, dx = linear_cross_entropy(torch.empty(0, 4), torch.randn(6, 4), torch.empty(0, dtype=torch.long), 1.0, print)
    assert loss == 0
    assert dx.shape == (0, 4)


def test_logits_of_a_thousand_do_not_overflow() -> None:
    x, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    loss, dx = linear_cross_entropy(x, weight, torch.tensor([1]), 1.0, lambda a, b: None)
    assert float(loss) == 2000.0  # log(1 + e^2000)
    assert dx.tolist() == [[2.0]]  # p = (1, 0): 1 x 1 + (0 - 1) x -1


def test_blocked_rows_equal_unblocked(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = torch.randn(40, 8), torch.randn(30, 8), torch.randint(0, 30, (40,))
    whole = linear_cross_entropy(x, weight, targets, 1.0, lambda a, b: None)
    monkeypatch.setattr(blocks, "CACHED_ELEMENTS", 64)
    blocked = linear_cross_entropy(x, weight, targets, 1.0, lambda a, b: None)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocked, strict=True))  # each row's arithmetic is the same
